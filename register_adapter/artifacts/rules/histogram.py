"""A histogram of L2 norms that is filled on the model's device and tells quantiles afterwards.

Its bins are evenly spaced in log2 and the same for every model, so it never grows, and two of them can be added. A
quantile read off it is within half a bin of the true one: :data:`RELATIVE_ERROR`. The idea is that of a logarithmic
quantile sketch (DDSketch, arXiv 1908.10693) with a fixed range.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "BINS",
    "BINS_PER_OCTAVE",
    "RELATIVE_ERROR",
    "NormHistogram",
    "accumulator_dtype",
    "bin_centres",
    "bin_edges",
    "bins_of",
    "nearest_edge",
    "weighted_quantile",
]

Array = npt.NDArray[np.float64]

#: Resolution of the histogram.
BINS_PER_OCTAVE = 32
# Norms from 1/256 to 65536, the range of float16, have bins of their own.
_LOWEST, _HIGHEST = -8, 16
#: Number of bins; the first holds everything below the range, the last everything above it.
BINS = (_HIGHEST - _LOWEST) * BINS_PER_OCTAVE + 2
#: Largest relative error of a norm that is known by its bin alone.
RELATIVE_ERROR = 2 ** (0.5 / BINS_PER_OCTAVE) - 1


def bins_of(norms: torch.Tensor) -> torch.Tensor:
    """Int64 indices of the bins that ``norms`` (float, any shape) fall into; not a number counts as above the range."""
    place = (torch.log2(norms.float()) - _LOWEST) * BINS_PER_OCTAVE + 1
    return place.nan_to_num(nan=BINS - 1, posinf=BINS - 1, neginf=0).clamp_(0, BINS - 1).long()


def bin_edges() -> Array:
    """``(BINS + 1,)`` edges of the bins: 0 first, infinity last."""
    inner = 2.0 ** (_LOWEST + np.arange(BINS - 1) / BINS_PER_OCTAVE)
    return np.concatenate([[0.0], inner, [np.inf]])


def bin_centres() -> Array:
    """``(BINS,)`` norms that stand for the bins: geometric means of the edges; the range's ends for the outer two."""
    inner = bin_edges()[1:-1]
    return np.concatenate([inner[:1], np.sqrt(inner[1:] * inner[:-1]), inner[-1:]])


def nearest_edge(norm: float) -> int:
    """Index into :func:`bin_edges` of the edge nearest to ``norm`` in log2; the outer two stand for 0 and infinity."""
    if norm <= 0:
        return 0
    if math.isinf(norm):
        return BINS
    return min(max(round((math.log2(norm) - _LOWEST) * BINS_PER_OCTAVE), 0), BINS - 2) + 1


def weighted_quantile(values: Array, weights: Array, q: float) -> float:
    """The quantile of ``values``, each there ``weights`` times, as ``numpy.quantile`` has it by default (linear).

    Args:
        values: ``(n,)`` in ascending order.
        weights: ``(n,)`` whole numbers, how often each is there.
        q: From 0 to 1.

    Raises:
        ValueError: The weights are all zero.
    """
    ends = np.cumsum(weights)
    if not len(ends) or ends[-1] <= 0:
        raise ValueError("a quantile of no values")
    place = q * (ends[-1] - 1)
    places = np.searchsorted(ends, _around(place), side="right").clip(max=len(values) - 1)
    low, high = values[places].tolist()
    return float(low + (high - low) * (place - math.floor(place)))


def _around(place: float) -> tuple[int, int]:
    return math.floor(place), math.ceil(place)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class NormHistogram:
    """How the norms of one kind of token at one layer are distributed: a histogram, and exact moments beside it.

    Attributes:
        counts: ``(BINS,)`` int64.
        moments: ``(2,)`` sum of the norms and of their squares.
        extremes: ``(2,)`` float32, the smallest norm and the largest.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.moments = torch.zeros(2, dtype=accumulator_dtype(device), device=device)
        self.extremes = torch.tensor([torch.inf, -torch.inf], device=device)

    def add(self, norms: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in norms of any shape that fall into bins ``counts`` ``(BINS,)`` times.

        Args:
            norms: float32.
            counts: How many of them each bin gets.
            weights: 1 for tokens that count and 0 for padding, of the same shape; ``None``: all count.
        """
        self.counts += counts
        wide = norms.to(self.moments.dtype)
        kept = wide if weights is None else wide * weights
        self.moments += torch.stack([kept.sum(), (kept * wide).sum()])
        low = norms if weights is None else norms.masked_fill(weights == 0, torch.inf)
        high = norms if weights is None else norms.masked_fill(weights == 0, -torch.inf)
        self.extremes[0] = torch.minimum(self.extremes[0], low.min())
        self.extremes[1] = torch.maximum(self.extremes[1], high.max())

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [self.counts, self.moments, self.extremes]

    def merge(self, other: NormHistogram) -> None:
        """Add what another one has taken in."""
        self.counts += other.counts.to(self.counts)
        self.moments += other.moments.to(self.moments)
        low, high = other.extremes.to(self.extremes)
        self.extremes[0] = torch.minimum(self.extremes[0], low)
        self.extremes[1] = torch.maximum(self.extremes[1], high)

    def summary(self) -> dict[str, Any]:
        """The fields of a :class:`~register_adapter.artifacts.NormDistribution`; copies to the host."""
        counts = self.counts.cpu().numpy()
        total, squares = self.moments.cpu().double().tolist()
        smallest, largest = self.extremes.cpu().double().tolist()
        number = int(counts.sum())
        if not number:
            return {"count": 0, "mean": 0.0, "std": 0.0, "quantiles": {}, "edges": [], "counts": []}
        mean = total / number
        filled = np.flatnonzero(counts)
        part = slice(int(filled[0]), int(filled[-1]) + 1)
        edges = np.clip(
            bin_edges()[part.start : part.stop + 1], min(smallest, 2.0**_LOWEST), max(largest, 2.0**_HIGHEST)
        )
        values = np.clip(bin_centres(), smallest, largest)
        quantiles = {str(q): weighted_quantile(values, counts.astype(np.float64), q) for q in QUANTILES}
        quantiles.update({"0": smallest, "1": largest})
        return {
            "count": number,
            "mean": mean,
            "std": math.sqrt(max(squares / number - mean**2, 0.0)),
            "quantiles": {key: quantiles[key] for key in sorted(quantiles, key=float)},
            "edges": edges.tolist(),
            "counts": counts[part].tolist(),
        }


#: Quantiles that a report has beside the smallest and the largest norm.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999)
