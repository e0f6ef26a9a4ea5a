"""What is kept of the patch tokens of one layer, by the bin of their norm, so that a line can be drawn afterwards.

A rule can look at all images before it says which norms are outlying, although no token is kept: whatever is asked of
the outliers later (where they fall, how many an image has, how similar to their neighbours they are) is summed for
every bin of the norm histogram, or for every edge between two bins. All sizes depend on the number of bins and patches
alone.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from .rules.histogram import BINS, NormHistogram, accumulator_dtype, nearest_edge
from .rules.threshold import Threshold

__all__ = ["Edges", "PatchSketch"]

Array = npt.NDArray[np.float64]
# Joint figures of low and high outliers are a square: they are kept for every 4th edge, and interpolated.
_COARSE = 4


class Edges:
    """A threshold as edges of the histogram: bins from ``high`` on, and those below ``low``, hold outliers."""

    def __init__(self, threshold: Threshold) -> None:
        self.high, self.low = nearest_edge(threshold.high), nearest_edge(threshold.low)

    @property
    def outlying(self) -> npt.NDArray[np.bool_]:
        """``(BINS,)``: which bins hold outliers."""
        bins = np.arange(BINS)
        return (bins >= self.high) | (bins < self.low)


class PatchSketch:
    """Sums over the patch tokens of one layer, see the module.

    Args:
        device: Where the hidden states are.

    Attributes:
        histogram: Of the norms.
        num_images: Number of images.
        by_edge: ``(4, BINS + 1)`` sums over the images, for every edge: the squared number of patches above it, of
            those below it, and the number of images with any above, with any below.
        both: ``(2, edges, edges)`` for every 4th edge: sum of (number below the first) times (number above the
            second), and the number of images with some of either.
        positions: ``(BINS, patches)`` int32, how often a patch at that place falls into a bin; ``None`` where places
            are not known, or not the same in all images.
        similarity: ``(BINS,)`` sum of the similarity to the neighbours; ``None`` where it is not known.
        channels: ``(D,)`` largest |activation| of every channel.
    """

    def __init__(self, device: torch.device) -> None:
        exact = accumulator_dtype(device)
        coarse = len(range(0, BINS + 1, _COARSE))
        self.histogram = NormHistogram(device)
        self.num_images = 0
        self.by_edge = torch.zeros(4, BINS + 1, dtype=exact, device=device)
        self.both = torch.zeros(2, coarse, coarse, device=device)
        self.positions: torch.Tensor | None = None
        self.similarity: torch.Tensor | None = torch.zeros(BINS, dtype=exact, device=device)
        self.channels: torch.Tensor | None = None
        self._placed = True

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        optional = (self.positions, self.similarity, self.channels)
        return [
            *self.histogram.tensors(),
            self.by_edge,
            self.both,
            *(tensor for tensor in optional if tensor is not None),
        ]

    def add(
        self,
        patches: torch.Tensor,
        norms: torch.Tensor,
        bins: torch.Tensor,
        valid: torch.Tensor | None,
        similarity: torch.Tensor | None,
        placed: bool,
    ) -> None:
        """Take in one batch.

        Args:
            patches: ``(B, P, D)`` hidden states.
            norms: ``(B, P)`` float32.
            bins: ``(B, P)`` int64, their bins.
            valid: ``(B, P)`` float32, 0 for padding; ``None``: all count.
            similarity: ``(B, P)`` to the neighbours, if known.
            placed: Whether a patch has the same place as in the other images.
        """
        batch, number = norms.shape
        weights = torch.ones_like(norms) if valid is None else valid
        images = norms.new_zeros(batch, BINS).scatter_add_(1, bins, weights)
        self.histogram.add(norms, images.sum(0).round().long(), valid)
        self.num_images += batch
        # How many patches of each image lie above every edge, and below it.
        above = torch.cat([images.flip(1).cumsum(1).flip(1), images.new_zeros(batch, 1)], dim=1)
        below = above[:, :1] - above
        any_above, any_below = (above > 0).to(above.dtype), (below > 0).to(above.dtype)
        exact = self.by_edge.dtype
        self.by_edge += torch.stack(
            [part.sum(0, dtype=exact) for part in (above.square(), below.square(), any_above, any_below)]
        )
        few = slice(None, None, _COARSE)
        self.both[0] += below[:, few].T @ above[:, few]
        self.both[1] += any_below[:, few].T @ any_above[:, few]
        self._add_places(bins, number, placed)
        if similarity is None or self.similarity is None:
            self.similarity = None
        else:
            values = (similarity * weights).flatten().to(self.similarity)
            self.similarity.scatter_add_(0, bins.flatten(), values)
        flat = patches if valid is None else patches * valid.to(patches.dtype)[..., None]
        # One dimension after the other: both at once are slow on a CPU where the prefix is sliced off.
        largest = torch.maximum(flat.amax(1).amax(0), -flat.amin(1).amin(0)).float()
        self.channels = largest if self.channels is None else torch.maximum(self.channels, largest)

    def merge(self, other: PatchSketch) -> None:
        """Add what another one has taken in."""
        self.histogram.merge(other.histogram)
        self.num_images += other.num_images
        self.by_edge += other.by_edge.to(self.by_edge)
        self.both += other.both.to(self.both)
        known = self.positions is not None and other.positions is not None
        if known and self.positions.shape == other.positions.shape:  # type: ignore[union-attr]
            self.positions += other.positions.to(self.positions)  # type: ignore[operator, union-attr]
        else:
            self.positions, self._placed = None, False
        if self.similarity is not None and other.similarity is not None:
            self.similarity += other.similarity.to(self.similarity)
        else:
            self.similarity = None
        largest = [part.to(self.both.device) for part in (self.channels, other.channels) if part is not None]
        self.channels = torch.stack(largest).amax(0) if largest else None

    def _add_places(self, bins: torch.Tensor, number: int, placed: bool) -> None:
        known = self.positions is None or self.positions.shape[1] == number
        self._placed = self._placed and placed and known
        if not self._placed:
            self.positions = None
            return
        if self.positions is None:
            self.positions = torch.zeros(BINS, number, dtype=torch.int32, device=bins.device)
        index = (bins * number + torch.arange(number, device=bins.device)).flatten()
        self.positions.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def counts(self) -> Array:
        """``(BINS,)`` number of patches in each bin."""
        counts: Array = self.histogram.counts.cpu().numpy().astype(np.float64)
        return counts

    def images_with_outliers(self, edges: Edges) -> float:
        """Share of the images that have at least one outlier."""
        _, _, above, below = self.by_edge.cpu().numpy()
        number = above[edges.high] + below[edges.low] - self._joint(1, edges)
        return float(number / max(self.num_images, 1))

    def per_image(self, edges: Edges) -> tuple[float, float]:
        """Mean and standard deviation over images of the number of outliers."""
        above, below, _, _ = self.by_edge.cpu().numpy()
        squares = above[edges.high] + below[edges.low] + 2 * self._joint(0, edges)
        number = max(self.num_images, 1)
        mean = float(self.counts()[edges.outlying].sum()) / number
        return mean, math.sqrt(max(float(squares) / number - mean**2, 0.0))

    def _joint(self, which: int, edges: Edges) -> float:
        """A figure of images with outliers on both sides; nought where a side has none."""
        if edges.low == 0 or edges.high == BINS:
            return 0.0
        table = self.both[which].cpu().double().numpy()
        rows, columns = (_interpolation(edge / _COARSE, len(table)) for edge in (edges.low, edges.high))
        return float(rows @ table @ columns)

    def places(self, edges: Edges) -> Array | None:
        """``(patches,)`` number of images in which the patch at that place is an outlier."""
        if self.positions is None:
            return None
        places: Array = self.positions.cpu().numpy()[edges.outlying].sum(0, dtype=np.float64)
        return places

    def recurrence(self, edges: Edges) -> float | None:
        """Chance that an outlier's place is one in another image too, over the mean share of outliers."""
        places = self.places(edges)
        if places is None or self.num_images < 2 or not places.sum():
            return None
        again = (places * (places - 1)).sum() / (places.sum() * (self.num_images - 1))
        return float(again / (places.sum() / (self.num_images * len(places))))

    def mean_similarity(self, edges: Edges) -> dict[str, float] | None:
        """Mean similarity to the neighbours by key ``"outlier"`` and ``"other"``, where there are any."""
        if self.similarity is None:
            return None
        return means(self.similarity.cpu().double().numpy(), self.counts(), edges.outlying)


def _interpolation(place: float, length: int) -> Array:
    """``(length,)`` weights of the two entries around ``place``."""
    weights = np.zeros(length)
    low = min(int(place), length - 1)
    weights[low] += 1 - (place - low)
    weights[min(low + 1, length - 1)] += place - low
    return weights


def means(sums: Array, counts: Array, outlying: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Means of outliers and of the others from sums and counts by bin; without a key for a kind that is empty."""
    by_kind = {}
    for key, part in (("outlier", outlying), ("other", ~outlying)):
        if counts[part].sum():
            by_kind[key] = float(sums[part].sum() / counts[part].sum())
    return by_kind
