"""TokenCut: the graph of patches is cut in two where least is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from ...errors import MissingExtraError
from .boxes import DiscoveredObject, as_batch, box_of, check_sizes, component

__all__ = ["TokenCutObject", "tokencut", "tokencut_batch"]

#: Relative difference below which components of an eigenvector are equal: patches can have the same neighbours.
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class TokenCutObject(DiscoveredObject):
    """What TokenCut finds in an image.

    Attributes:
        eigenvector: ``(h, w)`` float64, the second smallest generalised eigenvector; positive at the seed's side.
        bipartition: ``(h, w)`` bool, the seed's side of the cut, of which ``mask`` is one component.
        eigenvalues: The second and the third smallest. Where they are equal (a graph whose patches all resemble each
            other has only equal ones), the eigenvector, and with it the cut, is the solver's choice and means nothing.
    """

    eigenvector: npt.NDArray[np.float64]
    bipartition: npt.NDArray[np.bool_]
    eigenvalues: tuple[float, float]


def tokencut(
    features: npt.ArrayLike | torch.Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int] | None = None,
    tau: float = 0.2,
    eps: float = 1e-5,
) -> TokenCutObject:
    """Find one object by TokenCut (Wang et al., arXiv 2202.11539).

    Patches whose cosine is above ``tau`` are connected by an edge of weight 1, all others by one of weight ``eps``. The
    second smallest eigenvector of ``(D - A) x = λ D x``, D the sums of A's rows, is cut at its mean; the seed is the
    patch of largest absolute value (of equal ones the first), and the object the component of its side that holds it.
    Defaults are those of the authors' code.

    It is computed from the eigenvectors of ``D^-½ (D - A) D^-½`` in float64, which gives the same vectors several times
    as fast: by SciPy on the CPU, by torch on other devices.

    Args:
        features: ``(P, D)``, one row a patch, row by row, without CLS and registers; NumPy or torch, on any device.
        grid: ``(h, w)``, the patches of the image, those of its padding included.
        patch_size: Side of a patch in pixels.
        image_size: ``(H, W)`` of the image in pixels, without padding; ``None``: all of the grid.
        tau: The cosine above which patches are connected.
        eps: Weight of the other edges, above 0.

    Raises:
        ValueError: Shapes do not fit each other, features are not finite, there are fewer than three patches, or
            ``eps`` is not above 0.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> tokencut(keys, grid=(37, 37), patch_size=14, image_size=(518, 518)).box
    """
    batch = as_batch(features)
    if len(batch) > 1:
        raise ValueError(f"features of {len(batch)} images; give tokencut_batch (B, P, D)")
    return tokencut_batch(batch, grid=grid, patch_size=patch_size, image_size=image_size, tau=tau, eps=eps)[0]


def tokencut_batch(
    features: npt.ArrayLike | torch.Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int] | None = None,
    tau: float = 0.2,
    eps: float = 1e-5,
) -> list[TokenCutObject]:
    """:func:`tokencut` of several images of one size, on the device of the features.

    Args:
        features: ``(B, P, D)``.
        grid: See :func:`tokencut`, as all that follow.
        patch_size: Side of a patch.
        image_size: ``(H, W)``.
        tau: The cosine above which patches are connected.
        eps: Weight of the other edges.

    Raises:
        ValueError: See :func:`tokencut`.
        MissingExtraError: SciPy is not installed.
    """
    batch = as_batch(features)
    size = check_sizes(batch.shape[1], grid, patch_size, image_size)
    if batch.shape[1] < 3:
        raise ValueError(f"an image of {batch.shape[1]} patches cannot be cut: TokenCut needs at least three")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, so that every patch has edges, got {eps}")
    batch = F.normalize(batch, dim=-1)
    connected = batch @ batch.transpose(1, 2) > tau
    weights = torch.where(connected, 1.0, torch.tensor(eps, dtype=torch.float64, device=batch.device))
    scale = weights.sum(-1).rsqrt()
    # The largest eigenvalues of the scaled weights are the smallest of the Laplacian, 1 minus them.
    scaled = weights * scale[:, None] * scale[..., None]
    objects = []
    for matrix, factor in zip(scaled, scale.cpu().numpy(), strict=True):
        values, vector = _second_largest(matrix)
        objects.append(_cut(vector * factor, values, grid, patch_size, size))
    return objects


def _second_largest(matrix: torch.Tensor) -> tuple[tuple[float, float], npt.NDArray[np.float64]]:
    """The second and third largest eigenvalue of a symmetric ``(P, P)`` float64, and the eigenvector of the second."""
    size = len(matrix)
    if matrix.device.type == "cpu":
        try:
            from scipy.linalg import eigh
        except ImportError as error:
            raise MissingExtraError("object discovery", "scipy", "testbed") from error
        third, second = 0, 1
        values, vectors = eigh(
            matrix.numpy(), subset_by_index=[size - 3, size - 2], check_finite=False, overwrite_a=True
        )
    else:
        third, second = size - 3, size - 2
        values, vectors = (part.cpu().numpy() for part in torch.linalg.eigh(matrix))
    return (float(values[second]), float(values[third])), vectors[:, second]


def _cut(
    vector: npt.NDArray[np.float64],
    values: tuple[float, float],
    grid: tuple[int, int],
    patch_size: int,
    image_size: tuple[int, int],
) -> TokenCutObject:
    side = vector > vector.mean()
    size = np.abs(vector)
    seed = int(np.argmax(size >= size.max() * (1 - _TIE)))  # the first: equal ones differ by rounding alone
    sign = 1.0 if side[seed] else -1.0
    bipartition = (side if side[seed] else ~side).reshape(grid)
    mask = component(bipartition, seed)
    return TokenCutObject(
        seed,
        mask,
        box_of(mask, patch_size, image_size),
        (patch_size, patch_size),
        (sign * vector).reshape(grid),
        bipartition,
        (1.0 - values[0], 1.0 - values[1]),
    )
