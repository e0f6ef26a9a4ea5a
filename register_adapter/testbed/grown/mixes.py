"""Images mixed in pairs, with what is asked of them: MixUp and CutMix for mosaics."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .mosaics import Mosaics

__all__ = ["MIXES", "mixed"]


def _mixup(count: int, grid: int, rng: torch.Generator) -> torch.Tensor:
    """One share for a whole image."""
    return torch.rand(count, 1, generator=rng).expand(-1, grid**2)


def _cutmix(count: int, grid: int, rng: torch.Generator) -> torch.Tensor:
    """A rectangle of whole tiles, of any share of the image, comes from the other one."""
    share, top, left = torch.rand(3, count, 1, generator=rng)
    side = (share.sqrt() * grid).round()
    rows, columns = (torch.arange(grid) - (start * (grid - side + 1)).floor() for start in (top, left))
    inside = [(places >= 0) & (places < side) for places in (rows, columns)]
    rectangle: torch.Tensor = inside[0][:, :, None] & inside[1][:, None, :]
    return (~rectangle).flatten(1).float()


def _either(count: int, grid: int, rng: torch.Generator) -> torch.Tensor:
    """One or the other for each image."""
    chosen = torch.rand(count, 1, generator=rng) < 0.5
    return torch.where(chosen, _mixup(count, grid, rng), _cutmix(count, grid, rng))


#: How much of every tile ``(B, P)`` is the image's own, by name; shares are drawn evenly from 0…1.
MIXES: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "mixup": _mixup,
    "cutmix": _cutmix,
    "either": _either,
}


def mixed(batch: Mosaics, grid: int, mix: str, seed: int) -> Mosaics:
    """A batch in which each image is mixed with the next one; pixels, targets and weights alike.

    A tile that asks still has to say what the asked tile of its own image held, which may have been cut away.

    Args:
        batch: Images of ``grid * grid`` tiles.
        grid: Tiles on a side.
        mix: A name in :data:`MIXES`; ``""`` leaves the batch as it is.
        seed: Seed of the shares.

    Raises:
        ValueError: There is no such mix.
    """
    if not mix:
        return batch
    if mix not in MIXES:
        raise ValueError(f"mix={mix!r:.100} is unknown; there are {', '.join(map(repr, MIXES))}, and '' for none")
    count, size = len(batch.images), batch.images.shape[-1] // grid
    share = MIXES[mix](count, grid, torch.Generator().manual_seed(seed))
    pixels = share.reshape(count, 1, grid, grid).repeat_interleave(size, 2).repeat_interleave(size, 3)

    def blend(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return own * values + (1 - own) * values.roll(-1, 0)

    return batch._replace(
        images=blend(batch.images.float(), pixels).round().to(torch.uint8),
        targets=blend(batch.targets, share[..., None]),
        weights=blend(batch.weights, share),
    )
