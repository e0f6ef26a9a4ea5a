"""From patches to a box: the component around a seed, its box in pixels, and how well boxes overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import MissingExtraError

__all__ = ["Box", "DiscoveredObject", "as_batch", "box_of", "check_sizes", "component", "iou"]

#: ``(x0, y0, x1, y1)`` in pixels, half open.
Box = tuple[float, float, float, float]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DiscoveredObject:
    """The one object that a method finds in an image.

    Attributes:
        seed: Index of the patch that it grew from, row by row.
        mask: ``(h, w)`` bool, its patches; the seed is one of them.
        box: ``(x0, y0, x1, y1)`` in pixels, half open, tight around the mask and clipped to the image.
        patch_size: ``(height, width)`` of a patch in the same pixels.
    """

    seed: int
    mask: _Mask
    box: Box
    patch_size: tuple[float, float]


def component(foreground: _Mask, seed: int) -> _Mask:
    """The patches of ``foreground`` that are connected with a seed; only neighbours on the four sides are.

    Args:
        foreground: ``(h, w)`` bool.
        seed: Index of a patch, row by row. It belongs to its component even if it is not in the foreground.

    Returns:
        ``(h, w)`` bool.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        from scipy.ndimage import label
    except ImportError as error:
        raise MissingExtraError("object discovery", "scipy", "testbed") from error
    place = np.unravel_index(seed, foreground.shape)
    if not foreground[place]:
        alone = np.zeros_like(foreground)
        alone[place] = True
        return alone
    labels = label(foreground)[0]
    connected: _Mask = labels == labels[place]
    return connected


def box_of(mask: _Mask, patch_size: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box around a mask of patches, in pixels, clipped to the image (patches of padding stick out of it).

    Args:
        mask: ``(h, w)`` bool with at least one patch.
        patch_size: Side of a patch in pixels.
        image_size: ``(H, W)`` of the image in pixels.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = image_size
    return (
        int(columns[0]) * patch_size,
        int(rows[0]) * patch_size,
        min((int(columns[-1]) + 1) * patch_size, width),
        min((int(rows[-1]) + 1) * patch_size, height),
    )


def iou(boxes: npt.ArrayLike, truths: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Intersection over union of every box with every true box.

    Args:
        boxes: ``(n, 4)``, x0 y0 x1 y1, half open.
        truths: ``(m, 4)``.

    Returns:
        ``(n, m)``; 0 for a pair without area.
    """
    first = np.asarray(boxes, np.float64).reshape(-1, 1, 4)
    second = np.asarray(truths, np.float64).reshape(1, -1, 4)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(np.maximum(given[..., 2:] - given[..., :2], 0), axis=-1) for given in (first, second)]
    union = areas[0] + areas[1] - shared
    shares: npt.NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return shares


def as_batch(features: Any) -> torch.Tensor:
    """Features of one image ``(P, D)`` or of several ``(B, P, D)`` as a tensor ``(B, P, D)``, where they lie.

    float64 stays float64, everything else becomes float32.

    Raises:
        ValueError: They have another shape, or are not finite.
    """
    tensor = features.detach() if isinstance(features, torch.Tensor) else torch.as_tensor(np.asarray(features))
    if tensor.ndim not in (2, 3) or not tensor.numel():
        raise ValueError(f"features must be (P, D), one row a patch, got the shape {tuple(tensor.shape)}")
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    # A sum that is finite has no other terms, and is quicker than a look at each.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError("features hold NaN or infinity, so that patches cannot be compared; does the model overflow?")
    return tensor if tensor.ndim == 3 else tensor[None]


def check_sizes(
    patches: int, grid: tuple[int, int], patch_size: int, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """The size of the image ``(H, W)``, all of the grid where it is not given.

    Raises:
        ValueError: There are not ``h * w`` patches, or the image does not fit the grid.
    """
    height, width = grid
    if height * width != patches:
        raise ValueError(
            f"grid={tuple(grid)} has {height * width} patches, and features have {patches} rows; leave CLS and "
            "registers out"
        )
    covered = height * patch_size, width * patch_size
    if image_size is None:
        return covered
    for side, pixels in zip(image_size, covered, strict=True):
        if abs(side - pixels) >= patch_size:
            raise ValueError(
                f"image_size={tuple(image_size)} (height, width) does not fit a grid of {height} × {width} patches of "
                f"{patch_size} px"
            )
    return image_size[0], image_size[1]
