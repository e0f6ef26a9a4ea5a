"""Confidence intervals over images by resampling them: of a mean, and of what is computed from sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap_mean", "bootstrap_ratio"]

#: Resamples whose draws are in memory together.
_AT_ONCE = 200


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


def bootstrap_ratio(
    counts: npt.ArrayLike,
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of what is computed from sums over images, such as a mean IoU.

    Args:
        counts: ``(n, ...)``, what each image adds to the sums.
        statistic: From sums ``(resamples, ...)`` to figures ``(resamples,)``.
        level: Share of the resamples inside the interval.
        resamples: How often the n images are drawn with replacement.
        seed: Seed of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: There is no image.
    """
    added = np.asarray(counts, np.float64)
    if not len(added):
        raise ValueError("an interval needs at least one image")
    flat = added.reshape(len(added), -1)
    rng = np.random.default_rng(seed)
    figures = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = rng.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=min(_AT_ONCE, resamples - start))
        figures.append(statistic((drawn @ flat).reshape(len(drawn), *added.shape[1:])))
    low, high = np.nanquantile(np.concatenate(figures), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
