"""Registers that start as what the base's own outlier patches are when they enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..artifacts.auditing import audit_outliers
from ..errors import NoArtifactsError
from ..features.trace import capture
from ..towers.modes import evaluating
from ..tuner.registers import RegisterTokens
from .start import Start

__all__ = ["start_from_outliers"]


def start_from_outliers(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    num_registers: int = 4,
    *,
    how: Literal["mean", "samples"] = "samples",
    insert_layer: int = 0,
    deep: bool = False,
    rule: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Start:
    """Where registers start that take the place of outlier patches: at the values of such patches.

    A patch is an outlier by the audit's rule, at the layer with the largest share of them. Registers that enter before
    a block start from what those patches are there: with ``insert_layer=0`` from their embeddings, position included;
    behind the block that makes them outliers from their large values; deep registers block by block.

    Args:
        model: The base model, without adapters.
        batches: Images as the model takes them, ``(B, 3, H, W)`` each, on its device.
        num_registers: Number R of registers.
        how: ``"samples"`` of outlier patches drawn at random, each another register; or their ``"mean"``, with noise of
            a hundredth of its mean size, since equal registers stay equal for ever.
        insert_layer: As in :class:`RegisterConfig`.
        deep: As there.
        rule: The audit's rule.
        seed: Seed of the draw and of the noise.
        **options: Further arguments of :class:`RegisterConfig`, but for ``key_value``, which has no tokens.

    Returns:
        The config's arguments, and what writes the values.

    Raises:
        NoArtifactsError: The audit finds none, or none that norms tell from other patches.
        ValueError: ``how`` is neither of the two, ``insert_layer`` is not a block, or the registers are no tokens.

    Example:
        >>> start = start_from_outliers(base, batches)
        >>> model = add_registers(base, **start.options)
        >>> start.fill(find_register_layer(model).tokens("default"))
    """
    if how not in ("mean", "samples"):
        raise ValueError(f"how must be mean or samples, got {how!r}")
    if options.get("key_value"):
        raise ValueError("init='outliers' is for tokens; key/value pairs (key_value=True) start from init='normal'")
    report = audit_outliers(model, batches, rule)
    chosen = report.most_outlying
    if chosen is None:
        raise NoArtifactsError(f"{report.name} has no outliers on these images ({report.reason}); use another init")
    blocks = len(report.layers) - 1
    if not 0 <= insert_layer < blocks:
        raise ValueError(f"insert_layer must be a block of the model, 0 to {blocks - 1}, got {insert_layer}")
    at = range(insert_layer, blocks if deep else insert_layer + 1)
    tokens: list[torch.Tensor] = []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            with capture(model, attentions=False) as trace:
                model(pixel_values=batch)
            outlying = chosen.threshold.mask(trace.patches(chosen.layer))
            tokens.append(torch.stack([trace.patches(layer)[outlying].float().cpu() for layer in at]))
    values = _chosen(torch.cat(tokens, 1), num_registers, how, torch.Generator().manual_seed(seed))
    record = {"init": "outliers", "how": how, "rule": chosen.threshold.rule, "layer": chosen.layer}
    return Start(
        {
            "num_registers": num_registers,
            "insert_layer": insert_layer,
            "deep": deep,
            "init": "outliers",
            "test_time_fit": {**record, "num_images": {"init": sum(len(batch) for batch in batches)}},
            **options,
        },
        lambda new: _fill(new, values if deep else values[0]),
    )


def _chosen(tokens: torch.Tensor, number: int, how: str, generator: torch.Generator) -> torch.Tensor:
    """``(layers, R, D)`` of outlier tokens ``(layers, K, D)``."""
    if how == "samples":
        # With repetition only where there are fewer outliers than registers.
        order = torch.cat([torch.randperm(tokens.shape[1], generator=generator) for _ in range(number)])
        return tokens[:, order[:number]]
    mean = tokens.mean(1, keepdim=True).repeat(1, number, 1)
    noise = torch.randn(mean.shape, generator=generator)
    return mean + 0.01 * noise * mean.abs().mean(-1, keepdim=True)


@torch.no_grad()
def _fill(tokens: RegisterTokens, values: torch.Tensor) -> None:
    tokens.weight.copy_(values)
