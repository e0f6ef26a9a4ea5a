"""Where registers look: their rows of the attention maps, block by block, reduced as they come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from ...errors import UnsupportedModelError
from ...features.attention_maps import record_attention_maps
from ...features.grid import watch_patches
from ...features.passes import Batch
from .states import Registers

__all__ = ["RegisterMaps"]

_Array = npt.NDArray[np.float32]


class RegisterMaps:
    """Sums over the registers' attention maps of many images, and the maps of the first ones.

    Args:
        registers: The registers.
        block: The block whose maps are kept.
        num_maps: Of how many images.
    """

    def __init__(self, registers: Registers, block: int, num_maps: int) -> None:
        blocks, count = registers.num_blocks, registers.count
        self.grid: tuple[int, int] | None = None
        self._registers, self._block, self._num_maps = registers, block, num_maps
        self._kept: list[_Array] = []
        self._images = 0
        self._similarity = np.zeros((blocks, count, count))
        self._shares = np.zeros((blocks, count, 3))

    def look(self, batch: Batch) -> None:
        """Run the tower over a batch and take its maps in."""
        tower, rows = self._registers.tower, dict[int, torch.Tensor]()

        def keep(block: int, attention: torch.Tensor) -> None:
            """Of every map, the registers' rows ``(B, H, R, N)``."""
            where = self._registers.where(self._registers.inside(block))
            rows[block] = attention[:, :, where].float().clone()

        with watch_patches(tower) as grid, record_attention_maps(tower, keep):
            tower.run(batch.inputs)
        length = rows[self._block].shape[-1] - self._registers.inside(self._block).first_patch
        try:
            shape: tuple[int, int] | None = grid.shape(batch.size, length, batch.inputs)
        except UnsupportedModelError:
            shape = None
        if self._images and shape != self.grid:
            raise ValueError(f"images of several sizes: {self.grid} patches, then {shape}; give images of one size")
        self.grid = shape
        for block, row in rows.items():
            self._add(block, row)
        self._images += batch.size
        if (missing := self._num_maps - sum(map(len, self._kept))) > 0:
            first = self._registers.inside(self._block).first_patch
            height, width = shape or (1, length)
            maps = rows[self._block][:missing, :, :, first : first + height * width]
            self._kept.append(maps.reshape(*maps.shape[:3], height, width).cpu().numpy())

    def _add(self, block: int, rows: torch.Tensor) -> None:
        layout = self._registers.inside(block)
        count = rows.shape[2]
        mean = rows.mean(1)  # over heads: (B, R, N)
        maps = F.normalize(mean[..., layout.first_patch :].double(), dim=-1)
        self._similarity[block, :count, :count] += (maps @ maps.transpose(1, 2)).sum(0).cpu().numpy()
        bounds = (layout.first_patch, mean.shape[-1]), (0, layout.num_cls), (layout.num_cls, layout.first_patch)
        for number, (start, stop) in enumerate(bounds):
            self._shares[block, :count, number] += mean[..., start:stop].sum(-1).double().sum(0).cpu().numpy()

    def attention(self) -> _Array:
        """``(B, H, R, h, w)``, ``(B, H, R, 1, P)`` without a grid."""
        return np.concatenate(self._kept)

    def similarity(self) -> _Array:
        """``(L, R, R)``; NaN for registers that are not there."""
        similarity = (self._similarity / self._images).astype(np.float32)
        for block, count in enumerate(self._counts()):
            similarity[block, count:], similarity[block, :, count:] = np.nan, np.nan
        return similarity

    def shares(self) -> _Array:
        """``(L, R, 3)``; NaN for registers that are not there."""
        shares = (self._shares / self._images).astype(np.float32)
        for block, count in enumerate(self._counts()):
            shares[block, count:] = np.nan
        return shares

    def _counts(self) -> list[int]:
        return [self._registers.count_in(block) for block in range(self._registers.num_blocks)]
