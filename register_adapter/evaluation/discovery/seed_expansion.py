"""LOST: the object grows from the patch that resembles fewest others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from ...errors import MissingExtraError
from .boxes import DiscoveredObject, as_batch, box_of, check_sizes, component

__all__ = ["LostObject", "lost", "lost_batch"]


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
    kernels = _kernels.get(batch.device.type, _WITH_TORCH)
    degrees = kernels.degrees(batch, -bias)
    # On the CPU and with the authors' dtype and options, so that ties come out as theirs do on any device.
    order = torch.stack([torch.argsort(-degree.float(), descending=True) for degree in degrees])[:, :k_patches]
    lowest = kernels.rows(batch, order)
    similar = (lowest @ lowest[:, 0, :, None])[..., 0] + bias > 0
    # Σ A[s, p] over S is F_p · Σ F_s: the whole of A is never needed.
    kept = similar.to(batch.dtype)
    support = (kept[:, None] @ lowest)[:, 0]
    foreground = kernels.projected(batch, support) + bias * kept.sum(1, keepdim=True) > 0
    objects = []
    masks, similars = foreground.cpu().numpy().reshape(-1, *grid), similar.cpu().numpy()
    for number, (degree, first) in enumerate(zip(degrees.numpy(), order.numpy(), strict=True)):
        seed = int(first[0])
        mask = component(masks[number], seed)
        box = box_of(mask, patch_size, size)
        objects.append(LostObject(seed, mask, box, (patch_size, patch_size), degree, first[similars[number]]))
    return objects


class _Kernels(NamedTuple):
    """What takes time, for one kind of device.

    Attributes:
        degrees: From ``(B, P, D)`` and a threshold of similarity to ``(B, P)`` int64 on the CPU.
        rows: From ``(B, P, D)`` and places ``(B, k)`` on the CPU to ``(B, k, D)``.
        projected: From ``(B, P, D)`` and ``(B, D)`` to their products ``(B, P)``.
    """

    degrees: Callable[[torch.Tensor, float], torch.Tensor]
    rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    projected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _degrees(features: npt.NDArray[Any], threshold: float) -> npt.NDArray[np.int64]:
    """Similarities are symmetric: each is computed once, in one half of a matrix, and counted for both of its patches.

    SciPy's product takes a quarter of the time of torch's on AMD's processors. It is one call, as threads of BLAS wait
    for each other in every one: on a machine that is busy that is what takes time.
    """
    try:
        from scipy.linalg.blas import get_blas_funcs
    except ImportError as error:
        raise MissingExtraError("object discovery", "scipy", "testbed") from error
    (product,) = get_blas_funcs(("syrk",), (features,))
    positive = threshold < product(1.0, features.T, trans=1).T
    degrees: npt.NDArray[Any] = (
        np.count_nonzero(positive, axis=1) + positive.sum(0, dtype=np.int32) - 2 * positive.diagonal()
    )
    # The other half holds zeros, len - 1 in a row and the column of the same number.
    total: npt.NDArray[np.int64] = degrees.astype(np.int64) - (len(features) - 1) * (threshold < 0)
    return total


def _degrees_by_torch(batch: torch.Tensor, threshold: float) -> torch.Tensor:
    positive = batch @ batch.transpose(1, 2) > threshold
    return (positive.sum(2) - positive.diagonal(dim1=1, dim2=2).long()).cpu()


_WITH_TORCH = _Kernels(
    degrees=_degrees_by_torch,
    rows=lambda batch, order: torch.take_along_dim(batch, order.to(batch.device)[..., None], 1),
    projected=lambda batch, directions: (batch @ directions[..., None])[..., 0],
)
# The short ones in one thread: those of torch would wait for those of BLAS.
_WITH_NUMPY = _Kernels(
    degrees=lambda batch, threshold: torch.from_numpy(np.stack([_degrees(x, threshold) for x in batch.numpy()])),
    rows=lambda batch, order: torch.from_numpy(np.take_along_axis(batch.numpy(), order.numpy()[..., None], 1)),
    projected=lambda batch, given: torch.from_numpy(np.einsum("bpd,bd->bp", batch.numpy(), given.numpy())),
)
#: Kind of device -> its kernels; any other has torch's.
_kernels = {"cpu": _WITH_NUMPY}
