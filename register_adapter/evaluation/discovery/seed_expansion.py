"""LOST: the object grows from the patch that resembles fewest others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from .boxes import DiscoveredObject, as_batch, box_of, check_sizes, component

__all__ = ["LostObject", "lost", "lost_batch"]

#: Patches that are compared with all others at a time: their similarities then stay in the processor's cache.
_ROWS = 128


@dataclass(frozen=True, eq=False)
class LostObject(DiscoveredObject):
    """What LOST finds in an image.

    Attributes:
        degree: ``(P,)`` int64, with how many other patches each has a positive similarity.
        similars: ``(S,)`` int64, those of the patches of lowest degree that resemble the seed, lowest degree first.
    """

    degree: npt.NDArray[np.int64]
    similars: npt.NDArray[np.int64]


def lost(
    features: npt.ArrayLike | torch.Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int] | None = None,
    k_patches: int = 100,
    bias: float = 0.0,
    normalize: bool = False,
) -> LostObject:
    """Find one object by LOST (Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels").

    With the similarity ``A = F Fᵀ + bias`` a patch's degree is the number of *other* patches q with ``A[p, q] > 0``, as
    in the authors' code (the paper, arXiv 2109.14279, has ≥ 0). The seed is the patch of lowest degree; the set S holds
    those of the ``k_patches`` patches of lowest degree with ``A[seed, s] > 0``; the object is the component of the
    patches p with ``Σ A[s, p] > 0`` over S that holds the seed. Defaults are those of the authors' code.

    Patches of one degree are ordered as that code orders them, by torch's sort on the CPU, wherever the features lie.
    A seed that does not resemble itself (a bias below -1, features of zeros) is the whole object; that code raises.

    Args:
        features: ``(P, D)``, one row a patch, row by row, without CLS and registers; NumPy or torch, on any device.
        grid: ``(h, w)``, the patches of the image, those of its padding included.
        patch_size: Side of a patch in pixels.
        image_size: ``(H, W)`` of the image in pixels, without padding; ``None``: all of the grid.
        k_patches: Number of patches of lowest degree that can support the seed.
        bias: Added to every similarity.
        normalize: Whether rows are scaled to length 1 before.

    Raises:
        ValueError: Shapes do not fit each other, features are not finite, or ``k_patches`` is below 1.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> lost(keys, grid=(37, 37), patch_size=14, image_size=(518, 518)).box
    """
    batch = as_batch(features)
    if len(batch) > 1:
        raise ValueError(f"features of {len(batch)} images; give lost_batch (B, P, D)")
    return lost_batch(
        batch,
        grid=grid,
        patch_size=patch_size,
        image_size=image_size,
        k_patches=k_patches,
        bias=bias,
        normalize=normalize,
    )[0]


def lost_batch(
    features: npt.ArrayLike | torch.Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int] | None = None,
    k_patches: int = 100,
    bias: float = 0.0,
    normalize: bool = False,
) -> list[LostObject]:
    """:func:`lost` of several images of one size, on the device of the features.

    Args:
        features: ``(B, P, D)``.
        grid: See :func:`lost`, as all that follow.
        patch_size: Side of a patch.
        image_size: ``(H, W)``.
        k_patches: Number of supporting patches.
        bias: Added to every similarity.
        normalize: Whether rows are scaled to length 1.

    Raises:
        ValueError: See :func:`lost`.
        MissingExtraError: SciPy is not installed.
    """
    batch = as_batch(features)
    size = check_sizes(batch.shape[1], grid, patch_size, image_size)
    if k_patches < 1:
        raise ValueError(f"k_patches must be at least 1, got {k_patches}")
    if normalize:
        batch = F.normalize(batch, dim=-1)
    count = _counters.get(batch.device.type, _count_by_torch)
    degrees = count(batch, -bias)
    # On the CPU and with the authors' dtype and options, so that ties come out as theirs do on any device.
    order = torch.stack([torch.argsort(-degree.float(), descending=True) for degree in degrees])[:, :k_patches]
    lowest = torch.stack([image[chosen] for image, chosen in zip(batch, order.to(batch.device), strict=True)])
    similar = (lowest @ lowest[:, 0, :, None])[..., 0] + bias > 0
    # Σ A[s, p] over S is F_p · Σ F_s: the whole of A is never needed.
    kept = similar.to(batch.dtype)
    support = (kept[:, None] @ lowest).transpose(1, 2)
    foreground = (batch @ support)[..., 0] + bias * kept.sum(1, keepdim=True) > 0
    objects = []
    masks, similars = foreground.cpu().numpy().reshape(-1, *grid), similar.cpu().numpy()
    for number, (degree, first) in enumerate(zip(degrees.numpy(), order.numpy(), strict=True)):
        seed = int(first[0])
        mask = component(masks[number], seed)
        box = box_of(mask, patch_size, size)
        objects.append(LostObject(seed, mask, box, (patch_size, patch_size), degree, first[similars[number]]))
    return objects


def _count_by_numpy(batch: torch.Tensor, threshold: float) -> torch.Tensor:
    """``(B, P)`` int64 degrees; NumPy's product is twice as fast as torch's on AMD's processors."""
    return torch.from_numpy(np.stack([_degrees(image, threshold) for image in batch.numpy()]))


def _degrees(features: npt.NDArray[Any], threshold: float) -> npt.NDArray[np.int64]:
    """Similarities are symmetric, so that each is computed once, and counted for both of its patches."""
    patches = len(features)
    degrees = np.zeros(patches, np.int64)
    room = np.empty(_ROWS * patches, features.dtype)
    for start in range(0, patches, _ROWS):
        stop = min(start + _ROWS, patches)
        rows, columns = features[start:stop], features[start:]
        similar = np.matmul(rows, columns.T, out=room[: len(rows) * len(columns)].reshape(len(rows), -1))
        positive = similar > threshold
        degrees[start:stop] += np.count_nonzero(positive, axis=1) - positive.diagonal()
        degrees[stop:] += positive[:, stop - start :].sum(0, dtype=np.int16)
    return degrees


def _count_by_torch(batch: torch.Tensor, threshold: float) -> torch.Tensor:
    positive = batch @ batch.transpose(1, 2) > threshold
    return (positive.sum(2) - positive.diagonal(dim1=1, dim2=2).long()).cpu()


#: Kind of device -> what counts degrees there; any other: torch.
_counters: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {"cpu": _count_by_numpy}
