"""The attention-bias form: a constant key and value in every block, in place of the register that gives them."""

from __future__ import annotations

from typing import Any

import torch

from ..data.batches import Batch
from ..tuner.layer import RegisterLayer
from .team import Team

__all__ = ["constant_pairs"]


@torch.no_grad()
def constant_pairs(layer: RegisterLayer, adapter_name: str, batches: list[Batch], team: Team) -> torch.Tensor:
    """Mean keys and values of an adapter's registers over images.

    What a register holds hardly depends on the image (arXiv 2402.17762), so its mean can stand for it (section 5 of
    arXiv 2506.08010).

    Args:
        layer: The registers; only this adapter is active, its registers start at block 0.
        adapter_name: Name of the adapter.
        batches: Images, of this process.
        team: The processes of the fit.

    Returns:
        ``(blocks, 2, R, D)`` keys and values, as key/value registers have them.

    Raises:
        ValueError: The model has fewer key heads than query heads, for which key/value registers have no room.
    """
    count, start = layer.tokens(adapter_name).count, layer.prefix
    sums: dict[int, Any] = {}
    images = 0

    def record(block: int, key: torch.Tensor, value: torch.Tensor) -> None:
        nonlocal images
        images += key.shape[0] if block == 0 else 0
        both = torch.stack([key, value])[:, :, :, start : start + count]  # (2, B, H, R, d)
        sums[block] = sums.get(block, 0) + both.float().sum(1).transpose(1, 2).flatten(2)

    def work() -> tuple[torch.Tensor | None, int]:
        with layer.recording_pairs(record):
            for batch in batches:
                layer.tower.run(batch)
        return torch.stack([sums[block] for block in sorted(sums)]).cpu() if sums else None, images

    parts = team.run(work)
    total = torch.stack([own for own, _ in parts if own is not None]).sum(0)
    pairs = total / sum(seen for _, seen in parts)
    if pairs.shape[-1] != layer.tower.hidden_size:
        raise ValueError(
            f"{type(layer.tower.module).__name__} has keys of {pairs.shape[-1]} values for tokens of "
            f"{layer.tower.hidden_size}; key/value registers need as many"
        )
    return pairs
