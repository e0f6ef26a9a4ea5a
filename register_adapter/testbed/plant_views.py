"""How a model sees its images while artifacts are planted: perturbed views, the targets, what goes into an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..artifacts.norms import neighbour_similarity
from ..towers.tower import Tower
from .control import random_registers

__all__ = ["Target", "Tokens", "View", "inputs_of", "look"]


@dataclass(frozen=True)
class View:
    """One way of looking at the images: a perturbation that the neurons must not mind."""

    num_registers: int = 0
    std: float = 0.02
    noise: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Target:
    """Where artifacts shall fall: cells of the patch grid ``(h, w)``, there on patches more similar than ``limit``."""

    cells: torch.Tensor
    grid: tuple[int, int]
    limit: float

    @classmethod
    def choose(cls, similarity: torch.Tensor, share: float, seed: int) -> Target:
        """Random plain cells, as many as it takes for ``share`` of all patches; ``similarity`` is ``(B, h, w)``."""
        _, height, width = similarity.shape
        limit = similarity.flatten().quantile(0.5).item()
        rate = (similarity > limit).float().mean(0).flatten()
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
        order = order[rate[order] >= rate.median()]
        enough = int((rate[order].cumsum(0) < share * height * width).sum()) + 1
        return cls(order[:enough], (height, width), limit)

    def labels(self, similarity: torch.Tensor) -> torch.Tensor:
        """``(B, patches)`` bool for similarities ``(B, h', w')`` of a grid that may be another than the chosen one."""
        _, height, width = similarity.shape
        rows, columns = self.cells // self.grid[1], self.cells % self.grid[1]
        chosen = torch.zeros(height, width, dtype=torch.bool)
        chosen[(2 * rows + 1) * height // (2 * self.grid[0]), (2 * columns + 1) * width // (2 * self.grid[1])] = True
        return (chosen & (similarity > self.limit)).flatten(1)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what goes into ``module``."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class Tokens:
    """Inputs of an MLP under one view: ``(T, D)`` of other tokens, ``(B, patches, D)``, ``(B, patches)`` targets."""

    others: torch.Tensor
    patches: torch.Tensor
    targets: torch.Tensor


@torch.no_grad()
def look(
    model: nn.Module, tower: Tower, block: int, pixel_values: torch.Tensor, view: View, target: Target, seed: int
) -> Tokens:
    """What goes into the MLP of a block under one view."""
    images = pixel_values.float()
    if view.scale != 1.0:
        patch = tower.patch_size or 1
        size = [round(side * view.scale / patch) * patch for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    if view.noise:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        images = images + view.noise * noise.to(images.device)
    images = images.to(pixel_values.dtype)
    with (
        random_registers(model, view.num_registers, view.std, seed),
        inputs_of(tower.block_part(block, "mlp_in")) as seen,
    ):
        tower.run(images)
    tokens = seen[0].float().cpu()
    first = tower.prefix + view.num_registers
    return Tokens(
        tokens[:, :first].flatten(0, 1), tokens[:, first:], target.labels(neighbour_similarity(tower, images).cpu())
    )
