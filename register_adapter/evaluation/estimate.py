"""A mean over tokens with its standard error over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "mean_over_images"]


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: Mean over the tokens.
        standard_error: Standard error of it over images; tokens of one image are not counted as independent. NaN with
            a single image.
        num_images: Number of images.
        num_tokens: Number of tokens.
    """

    value: float
    standard_error: float
    num_images: int
    num_tokens: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, ``value`` ± 1.96 standard errors (normal approximation)."""
        half = 1.96 * self.standard_error
        return self.value - half, self.value + half


def mean_over_images(values: npt.ArrayLike, images: npt.ArrayLike | None = None) -> Estimate:
    """Mean of ``(T,)`` values over tokens, with the linearised standard error of a ratio of sums over images.

    For one value an image that is the usual standard error of a mean.

    Args:
        values: One value a token.
        images: ``(T,)``, which image each token is from; ``None``: every value is of an image of its own.

    Raises:
        ValueError: There is no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        raise ValueError("an estimate needs at least one value")
    groups: Any = np.arange(len(numbers)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]
    count = int(groups.max()) + 1
    sizes = np.bincount(groups, minlength=count)
    sums = np.bincount(groups, weights=numbers, minlength=count)
    mean = float(numbers.mean())
    error = float("nan")
    if count > 1:
        error = float(np.sqrt(count / (count - 1) * np.square(sums - mean * sizes).sum()) / sizes.sum())
    return Estimate(mean, error, count, len(numbers))
