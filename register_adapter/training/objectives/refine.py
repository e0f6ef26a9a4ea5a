"""Refinement: registers absorb the base's spurious tokens, and clean tokens keep what the whole image says of them.

After "UniRefiner" (arXiv 2605.19622), from its description: three crops of an image go through the student; a clean
patch of a crop must be told from others by the base's token at the same place of the whole image (InfoNCE), the tokens
that take what is spurious are pulled to the base's outliers, and the spatial correlations of a crop are the base's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .base import Batch
from .outliers import AuditedTerm, Outliers
from .terms import Targets, Teacher
from .tokens import Tokens, read_tokens

__all__ = ["RefinementObjective"]

_ABSORBERS = ("registers", "ring")


class _Crop(NamedTuple):
    """A window of every image, in shares of its sides: ``(B,)`` each."""

    top: torch.Tensor
    left: torch.Tensor
    side: torch.Tensor


class RefinementObjective(AuditedTerm):
    """InfoNCE of clean tokens + absorption of spurious ones + spatial correlations.

    Args:
        outliers: As in :class:`AuditedTerm`.
        rule: As there.
        absorber: What takes the spurious tokens: ``"registers"``, or a ``"ring"`` of blanked patches along the border,
            as published.
        num_crops: Crops of an image, default 3.
        temperature: Of InfoNCE, default 0.2.
        absorption: Weight of that term, default 0.1.
        correlation: Weight of that term, default 0.4.
        inconsistent: Cosine between a crop's token and the whole image's at the same place, both of the base, below
            which the token does not count as clean; default 0.5.
        seed: Seed of the crops.
    """

    name = "refine"
    storable = False

    def __init__(
        self,
        outliers: Outliers | None = None,
        rule: str = "auto",
        absorber: str = "registers",
        num_crops: int = 3,
        temperature: float = 0.2,
        absorption: float = 0.1,
        correlation: float = 0.4,
        inconsistent: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(outliers, rule)
        if absorber not in _ABSORBERS:
            raise ValueError(f"absorber must be one of {', '.join(_ABSORBERS)}, got {absorber!r}")
        if num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {num_crops}")
        self.absorber, self.num_crops, self.temperature = absorber, num_crops, temperature
        self.absorption, self.correlation, self.inconsistent = absorption, correlation, inconsistent
        self.seed = seed

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--rule``, ``--absorber`` and ``--num-crops``."""
        super().add_arguments(parser)
        parser.add_argument(
            "--absorber", default="registers", choices=_ABSORBERS, help="What takes spurious tokens, default registers."
        )
        parser.add_argument(
            *("--num-crops", "--num_crops"), type=int, default=3, help="Crops of an image in a step, default 3."
        )

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> RefinementObjective:
        """The objective of the parsed flags."""
        return cls(rule=arguments.rule, absorber=arguments.absorber, num_crops=arguments.num_crops, seed=arguments.seed)

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``patches`` ``(B, P, D)`` of the base and ``spurious`` ``(B, P)``, 1 for its outliers."""
        tokens = teacher.tokens
        spurious = self.line.threshold.mask(tokens.inside[self.line.layer])
        return {"patches": tokens.patches, "spurious": spurious.float()}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """The three terms of each image, ``(B,)``; crops depend on its number and the epoch, and on the seed alone."""
        patches = targets["patches"].to(student.patches.device, torch.float32)
        spurious = targets["spurious"].to(patches.device) > 0.5
        total = self.absorption * self._absorbed(student, patches, spurious)
        for crop in self._crops(batch, patches.device):
            pixels = _cut(batch["pixel_values"], crop, tuple(batch["pixel_values"].shape[-2:]))
            view = read_tokens(model, {**batch, "pixel_values": self._with_ring(pixels, student.grid)})
            base = Teacher(model, batch).run(pixels).patches.float()
            matched = _cut(_as_map(patches, student.grid), crop, student.grid).flatten(2).transpose(1, 2)
            # Where the window shows nothing of an outlier, bilinear weights of it included.
            clean = (
                _cut(_as_map((~spurious).float().unsqueeze(-1), student.grid), crop, student.grid).flatten(1) > 0.999
            )
            clean &= F.cosine_similarity(base, matched, dim=-1) > self.inconsistent
            part = _info_nce(view.patches.float(), matched, clean, self.temperature)
            total = total + (part + self.correlation * _correlation_error(view.patches.float(), matched, clean)) / (
                self.num_crops
            )
        return total

    def _crops(self, batch: Batch, device: torch.device) -> list[_Crop]:
        """Square windows of 25 to 50 % of the area, drawn image by image on the CPU.

        So a batch of two processes has the windows that it has in one, and on any device.
        """
        count = len(batch["pixel_values"])
        numbers = batch.get("index", torch.arange(count)).tolist()
        # An evaluation looks at the same windows every time.
        epochs = batch.get("epoch", torch.zeros(count)).tolist() if torch.is_grad_enabled() else [0] * count
        seeds = [
            (int(number) * 1_000_003 + int(epoch) * 7_919 + self.seed * 104_729) % 2**31
            for number, epoch in zip(numbers, epochs, strict=True)
        ]
        drawn = [torch.rand(self.num_crops, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        crops = []
        for values in torch.stack(drawn, 2):
            side = (0.25 + 0.25 * values[0]).sqrt()
            top, left = ((values[place] * (1 - side)).to(device) for place in (1, 2))
            crops.append(_Crop(top, left, side.to(device)))
        return crops

    def _absorbed(self, student: Tokens, patches: torch.Tensor, spurious: torch.Tensor) -> torch.Tensor:
        """``1 - cosine`` of every spurious token of the base to the register, or ring patch, that is nearest."""
        absorbing = student.registers if self.absorber == "registers" else student.patches[:, _ring(student.grid)]
        if not absorbing.shape[1]:
            return patches.new_zeros(len(patches))
        cosine = F.normalize(patches, dim=-1) @ F.normalize(absorbing.float(), dim=-1).transpose(1, 2)
        weights = spurious.float()
        return ((1.0 - cosine.amax(-1)) * weights).sum(1) / weights.sum(1).clamp_min(1.0)

    def _with_ring(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.absorber == "registers":
            return pixels
        keep = torch.ones(grid[0] * grid[1], device=pixels.device)
        keep[_ring(grid)] = 0.0
        height, width = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
        return pixels * keep.view(grid).repeat_interleave(height, 0).repeat_interleave(width, 1)

    def details(self) -> dict[str, Any]:
        """All that the result depends on."""
        names = ("absorber", "num_crops", "temperature", "absorption", "correlation", "inconsistent", "seed")
        return {**super().details(), **{name: getattr(self, name) for name in names}}


def _ring(grid: tuple[int, int]) -> torch.Tensor:
    """Numbers of the patches along the border, one patch wide for grids of up to 74 patches, as published."""
    height, width = grid
    thick = max(min(grid) // 37, 1)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    border = (rows < thick) | (rows >= height - thick) | (columns < thick) | (columns >= width - thick)
    return border.flatten().nonzero().squeeze(1)


def _cut(maps: torch.Tensor, crop: _Crop, size: tuple[int, ...]) -> torch.Tensor:
    """The windows of maps ``(B, C, H, W)``, resized to ``size`` bilinearly."""
    zero = torch.zeros_like(crop.side)
    # grid_sample's frame has -1 and 1 at the outer edges.
    theta = torch.stack(
        [
            torch.stack([crop.side, zero, 2 * crop.left + crop.side - 1], 1),
            torch.stack([zero, crop.side, 2 * crop.top + crop.side - 1], 1),
        ],
        1,
    )
    places = F.affine_grid(theta, [len(maps), maps.shape[1], *size], align_corners=False)
    return F.grid_sample(maps, places.to(maps), padding_mode="border", align_corners=False)


def _as_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def _info_nce(student: torch.Tensor, matched: torch.Tensor, clean: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE of each image's clean tokens among its own, ``(B,)``."""
    logits = F.normalize(student, dim=-1) @ F.normalize(matched, dim=-1).transpose(1, 2) / temperature
    logits = logits.masked_fill(~clean[:, None, :], -1e4)
    labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(len(logits), -1)
    weights = clean.float()
    return (losses * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def _correlation_error(student: torch.Tensor, matched: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the cosines of all pairs of clean tokens, ``(B,)``."""
    own, base = F.normalize(student, dim=-1), F.normalize(matched, dim=-1)
    error = (own @ own.transpose(1, 2) - base @ base.transpose(1, 2)).square()
    pairs = (clean[:, :, None] & clean[:, None, :]).float()
    return (error * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1.0)
