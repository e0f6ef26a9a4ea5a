"""Confidence intervals of a mean over images by resampling them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap_mean"]


def bootstrap_mean(
    values: npt.ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one value an image.

    Args:
        values: ``(n,)``; for a paired difference the differences, image by image.
        level: Share of the resamples inside the interval.
        resamples: How often the n images are drawn with replacement.
        seed: Seed of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: There is no value.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size:
        raise ValueError("an interval needs at least one value")
    # How often each of the different values is drawn: hits and misses have two, however many images there are.
    kinds, counts = np.unique(numbers, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(numbers.size, counts / numbers.size, size=resamples)
    low, high = np.quantile(drawn @ kinds / numbers.size, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
