"""What a label-free objective reads of a forward pass: tokens behind the final LayerNorm, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...features.grid import watch_patches
from ...features.layout import tower_of
from ...features.passes import keep_layer
from ...features.prefix import continued_from
from ...towers.modes import evaluating
from .base import Batch

__all__ = [
    "Tokens",
    "base_alone",
    "copy_of_base",
    "has_both_towers",
    "prefix_key",
    "read_base",
    "read_tokens",
    "with_switch",
    "without_prefix",
]

# Where models put the one vector that stands for an image, the most specific first.
_SUMMARIES = ("image_embeds", "pooler_output")
_PREFIX = "prefix."


def prefix_key(block: int) -> str:
    """Key in an item, a batch or a store, of the sequence that comes into a block."""
    return f"{_PREFIX}{block}"


def without_prefix(batch: Batch) -> Batch:
    """A batch whose pass begins at the first block."""
    return {key: value for key, value in batch.items() if not key.startswith(_PREFIX)}


@dataclass(frozen=True)
class Tokens:
    """Tokens of one forward pass; behind the final LayerNorm where the model norms its patch tokens.

    Attributes:
        cls: ``(B, C, D)``: CLS and the like, C is 0 without any.
        registers: ``(B, R, D)``: the adapters' registers in the last block, R is 0 without any.
        patches: ``(B, P, D)``.
        inside: Index into ``hidden_states`` to the patch tokens ``(B, P, D)`` there, before any final LayerNorm; the
            last one always.
        summary: ``(B, E)``: image embedding or pooled output, CLS or the patches' mean where there is none.
        grid: Rows and columns ``(h, w)`` of the patches.
        output: What the model returned.
    """

    cls: torch.Tensor
    registers: torch.Tensor
    patches: torch.Tensor
    inside: dict[int, torch.Tensor]
    summary: torch.Tensor
    grid: tuple[int, int]
    output: Any

    @property
    def before_norm(self) -> torch.Tensor:
        """``(B, P, D)``: the patch tokens as they leave the last block, whose norms tell outliers."""
        return self.inside[max(self.inside)]


def read_tokens(model: nn.Module, batch: Batch, layers: Collection[int] = ()) -> Tokens:
    """Run a model, which may be wrapped for distributed training, and read its tokens.

    Args:
        model: It is called as it is given.
        batch: ``pixel_values`` ``(B, 3, H, W)``, and for a model with a text tower maybe ``input_ids`` ``(T, L)``.
            The sequence ``(B, N, D)`` that comes into block k, under ``prefix_key(k)``, has the pass begin there.
        layers: Indices into ``hidden_states`` whose patch tokens are read too.

    Raises:
        ValueError: A layer is to be read that is passed by.
    """
    inner: nn.Module = extract_model_from_parallel(model)
    tower, layer = tower_of(inner)
    last = len(tower.part("blocks"))
    inputs = {"pixel_values": batch["pixel_values"], **_texts(inner, batch)}
    begin = next((key for key in batch if key.startswith(_PREFIX)), None)
    block = int(begin.removeprefix(_PREFIX)) if begin is not None else 0
    if min({*layers, last}) < block:
        raise ValueError(f"hidden_states[{min(layers)}] is read, which a pass that begins at block {block} lacks")
    with watch_patches(tower) as patch_grid, ExitStack() as stack:
        if begin is not None:
            stack.enter_context(continued_from(tower, block, batch[begin]))
        kept = {index: stack.enter_context(keep_layer(tower, index)) for index in {*layers, last}}
        output = model(**inputs)
        # Registers may enter between two of the layers.
        counts = {index: layer.count_at(max(index - 1, 0)) if layer is not None else 0 for index in kept}
    hidden, first = kept[last][0], tower.prefix + counts[last]
    grid = patch_grid.shape(len(hidden), hidden.shape[1] - first, inputs)
    size = grid[0] * grid[1]
    inside = {
        index: kept[index][0][:, tower.prefix + count : tower.prefix + count + size] for index, count in counts.items()
    }
    normed = tower.normed(hidden)
    cls, patches = normed[:, : tower.prefix], normed[:, first : first + size]
    summary = next((value for name in _SUMMARIES if (value := getattr(output, name, None)) is not None), None)
    if summary is None:
        summary = cls[:, 0] if tower.prefix else patches.mean(1)
    return Tokens(cls, normed[:, tower.prefix : first], patches, inside, summary, grid, output)


def read_base(model: nn.Module, batch: Batch, layers: Collection[int] = ()) -> Tokens:
    """The same of the frozen base: adapters off, evaluation mode, no gradient; the model is as before afterwards.

    Args:
        model: With registers or other adapters, and maybe wrapped for distributed training.
        batch: As for :func:`read_tokens`.
        layers: As there.
    """
    with base_alone(model) as inner:
        return read_tokens(inner, without_prefix(batch), layers)


@contextmanager
def base_alone(model: nn.Module) -> Iterator[nn.Module]:
    """The model, not wrapped for distributed training, with its adapters off and in evaluation mode meanwhile.

    Args:
        model: As for :func:`read_base`.

    Raises:
        TypeError: Its adapters have no switch.
    """
    inner = with_switch(model)
    with evaluating(inner, seed=None), inner.disable_adapter():
        yield inner


def with_switch(model: nn.Module) -> Any:
    """The model, not wrapped for distributed training, whose ``disable_adapter()`` gives the base's outputs.

    Args:
        model: As for :func:`read_base`.

    Raises:
        TypeError: It has no such method.
    """
    inner: Any = extract_model_from_parallel(model)
    if not hasattr(inner, "disable_adapter"):
        raise TypeError(
            f"the objective compares with the frozen base, and needs a model with disable_adapter(), such as those of "
            f"add_registers, get_peft_model and compose; found {type(inner).__name__}, which has none"
        )
    return inner


def copy_of_base(model: nn.Module) -> nn.Module:
    """The base without adapters, as a module of its own that shares the frozen parameters.

    Args:
        model: With adapters, not wrapped for distributed training yet.

    Raises:
        TypeError: As for :func:`with_switch`.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    copied: Any = copy.deepcopy(with_switch(model), shared)
    base: nn.Module = copied.unload()
    return base


def has_both_towers(model: nn.Module) -> bool:
    """Whether it embeds images and texts, with one scale between them, as CLIP and SigLIP do; adapters may be on it."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    return hasattr(base, "logit_scale") and all(hasattr(config, f"{kind}_config") for kind in ("text", "vision"))


def _texts(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """What a text tower takes; two tokens, whose embedding nobody reads, where the batch has no texts."""
    if not has_both_towers(model):
        return {}
    given: dict[str, torch.Tensor] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return given or {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=batch["pixel_values"].device)}
