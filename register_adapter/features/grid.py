"""Where patch tokens lie in the image, and the pixels they are made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from ..towers.tower import Tower
from .layout import TokenLayout
from .threads import in_this_thread

__all__ = ["PatchGrid", "patch_tokens", "watch_patches"]


class PatchGrid:
    """The windows of the convolution that embeds patches, as it saw them in the last forward pass.

    Args:
        tower: The vision tower.
    """

    def __init__(self, tower: Tower) -> None:
        self._kind = type(tower.module).__name__
        self._shuffles = "noise" in inspect.signature(tower.module.forward).parameters
        self._pixels: torch.Tensor | None = None
        self._shape: tuple[int, int] | None = None
        part = tower.part("patch_embedding")
        self._part: nn.Module | None = part if isinstance(part, nn.Module) else None
        self._convolution = getattr(part, "base_layer", part)  # an adapter's layer (LoRA) around it

    def seen(self, batch: int) -> bool:
        """Whether a 2-D convolution embedded the patches of the last forward pass, once for each of B images."""
        return self._pixels is not None and len(self._pixels) == batch

    def shape(self, batch: int, num_tokens: int, inputs: Any = None) -> tuple[int, int]:
        """``(h, w)``: the first ``h * w`` tokens behind CLS and registers are the patches, row by row.

        Args:
            batch: Number of images.
            num_tokens: Number of tokens behind CLS and registers.
            inputs: What went into the tower.

        Raises:
            UnsupportedModelError: Places of the patches are not known: no 2-D convolution embeds them once for every
                image, some are hidden, or they are shuffled (MAE).
        """
        if self._shape is None or not self.seen(batch):
            raise self._unknown("it does not embed them by a 2-D convolution, once for every image")
        count = self._shape[0] * self._shape[1]
        if count > num_tokens:
            raise self._unknown(f"{count} are embedded, and {num_tokens} tokens stand behind CLS and registers")
        if self._shuffles:
            noise = inputs.get("noise") if isinstance(inputs, Mapping) else None
            order = torch.arange(count)
            if noise is None or not all(torch.equal(row.argsort().cpu(), order) for row in noise):
                raise self._unknown(f"it shuffles them; give it noise=torch.arange({count}.) for every image")
        return self._shape

    def pixels(self) -> torch.Tensor:
        """``(B, h * w, C * kernel height * kernel width)`` float32: what each patch is embedded from (normalised)."""
        convolution = self._convolution
        assert self._pixels is not None
        kernel, stride = convolution.kernel_size, convolution.stride
        padding = 0 if convolution.padding == "valid" else convolution.padding
        windows = F.unfold(self._pixels.float(), kernel, dilation=convolution.dilation, padding=padding, stride=stride)
        return windows.transpose(1, 2)

    def _unknown(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"where the patches of {self._kind} lie is not known: {why}")

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        fits = isinstance(output, torch.Tensor) and output.ndim == 4 and isinstance(self._convolution, nn.Conv2d)
        self._pixels = args[0] if fits and self._convolution.padding != "same" else None
        self._shape = (output.shape[2], output.shape[3]) if self._pixels is not None else None


@contextmanager
def watch_patches(tower: Tower) -> Iterator[PatchGrid]:
    """A :class:`PatchGrid` that every forward pass inside the context fills."""
    grid = PatchGrid(tower)
    if grid._part is None:
        yield grid
        return
    handle = grid._part.register_forward_hook(in_this_thread(grid._keep))
    try:
        yield grid
    finally:
        handle.remove()


def patch_tokens(
    tower: Tower, tokens: torch.Tensor, layout: TokenLayout, grid: PatchGrid, inputs: Any = None
) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """The patches among the tokens of a pass, without CLS, registers, and what stands behind the patches (YOLOS).

    Args:
        tower: The tower.
        tokens: ``(B, N, D)``, the whole sequence at one layer.
        layout: Of that layer.
        grid: Of the same pass.
        inputs: What went into the tower.

    Returns:
        ``(B, P, D)``, and ``(h, w)``; ``None`` for a tower that is given its patches.

    Raises:
        UnsupportedModelError: Where the patches lie is not known, see :meth:`PatchGrid.shape`.
    """
    behind = tokens[:, layout.first_patch :]
    if tower.part("patch_embedding") is None:
        return behind, None
    rows, columns = grid.shape(len(behind), behind.shape[1], inputs)
    return behind[:, : rows * columns], (rows, columns)
