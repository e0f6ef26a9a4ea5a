"""Position embeddings at another image size, interpolated with antialiasing.

Bicubic interpolation to a smaller grid looks at 4 × 4 neighbours, however far apart the new places are. What is finer
than the new grid is not averaged out but folded down, and a striping artifact appears in norms and attention maps.
"Vision Transformers Need Registers" (arXiv 2309.16588) interpolates with antialiasing for that reason. timm and DINOv2
with registers do so by themselves; ViT, DINOv2, CLIP and others in transformers do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..towers.tower import Tower
from .threads import in_this_thread

__all__ = ["antialiased_positions"]

_MODES = ("bilinear", "bicubic")


@contextmanager
def antialiased_positions(tower: Tower) -> Iterator[None]:
    """Let the tower's own interpolation of its position embeddings be antialiased, while the context lasts.

    Nothing is patched and no forward is copied: calls of ``torch.nn.functional.interpolate`` that the tower makes
    before its first block, or in the module that adds positions between blocks, get ``antialias=True`` if they make a
    grid of tokens ``(…, D, h, w)`` smaller. Enlarging needs none and stays as the model does it. A tower whose
    interpolation is antialiased anyway, or which has none (OpenCLIP, torchvision, rotary embeddings), computes what it
    always does.

    It works in the thread that entered the context.

    Args:
        tower: The vision tower, from :func:`register_adapter.towers.find_tower`.

    Example:
        >>> with antialiased_positions(tower):
        ...     tower.run(pixel_values)
    """
    mode = _Antialias(tower.hidden_size)

    def start(module: nn.Module, args: Any) -> None:
        mode.active = True

    def stop(module: nn.Module, *_: Any) -> None:
        mode.active = False

    first: nn.Module = tower.part("blocks")[0]
    between: nn.Module | None = tower.part("positions_between")
    with ExitStack() as stack:
        for module in (tower.module, between):
            if module is not None:
                stack.callback(module.register_forward_pre_hook(in_this_thread(start)).remove)
                stack.callback(module.register_forward_hook(in_this_thread(stop), always_call=True).remove)
        stack.callback(first.register_forward_pre_hook(in_this_thread(stop)).remove)
        stack.enter_context(mode)
        yield


class _Antialias(TorchFunctionMode):
    """Sets ``antialias=True`` in interpolations to a smaller grid, while ``active``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.active = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.active and func is F.interpolate:
            return self.interpolate(*args, **kwargs)
        return func(*args, **kwargs)

    def interpolate(
        self, input: torch.Tensor, size: Any = None, scale_factor: Any = None, **options: Any
    ) -> torch.Tensor:
        """``F.interpolate``, antialiased where a grid of position embeddings gets smaller."""
        # BEiT's tables of relative positions have heads for channels, and so do their (N, N) biases.
        grid = input.ndim == 4 and input.shape[1] == self.width and options.get("mode") in _MODES
        if not grid or not _shrinks(tuple(input.shape[-2:]), size, scale_factor):
            return F.interpolate(input, size, scale_factor, **options)
        # Antialiasing is not implemented for half precision on a CPU.
        wide = input if input.dtype == torch.float64 else input.float()
        return F.interpolate(wide, size, scale_factor, **{**options, "antialias": True}).to(input.dtype)


def _shrinks(grid: tuple[int, ...], size: Any, scale_factor: Any) -> bool:
    if size is not None:
        sides = size if isinstance(size, tuple | list | torch.Size) else (size, size)
        return any(int(new) < old for new, old in zip(sides, grid, strict=True))
    factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,)
    return any(factor < 1 for factor in factors)
