"""A mixture of one or two normal distributions of log-norms, and the test whether there are two.

Written out, because scikit-learn's ``GaussianMixture`` takes no weights, and expanding a histogram of millions of
tokens to be fitted would undo what the histogram is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .histogram import BINS_PER_OCTAVE, Array
from .threshold import Threshold

__all__ = ["Components", "fit_mixture", "mixture_rule"]

# A component narrower than this (in ln) is a single bin or a repeated value.
_LEAST_STD = np.log(2) / BINS_PER_OCTAVE
# More values than this are rounded before they are fitted.
_MANY = 4096
#: What counts as two kinds of tokens, beside a lower BIC: the minority's share, Ashman's D, the ratio of the modes, and
#: the mixture's density at its lowest between the means over its height at the minority's mean.
MAX_SHARE, MIN_SEPARATION, MIN_RATIO, MAX_VALLEY = 0.15, 3.0, 1.6, 0.25


@dataclass(frozen=True)
class Components:
    """A fitted mixture: ``(k,)`` each, in ascending order of the means, and its Bayesian information criterion."""

    shares: Array
    means: Array
    stds: Array
    bic: float

    def density(self, logs: Array) -> Array:
        """``(k, n)`` density of each component, times its share."""
        away = (logs - self.means[:, None]) / self.stds[:, None]
        density: Array = self.shares[:, None] * np.exp(-0.5 * away**2) / (self.stds[:, None] * np.sqrt(2 * np.pi))
        return density


def fit_mixture(logs: Array, weights: Array, components: int = 2, steps: int = 300) -> Components:
    """Expectation maximisation from several first splits; the likeliest is returned. Deterministic.

    Args:
        logs: ``(n,)`` in ascending order.
        weights: ``(n,)`` how often each is there.
        components: 1 or 2.
        steps: Most steps of one run.
    """
    total = float(weights.sum())
    parameters = 3 * components - 1
    if components == 1:
        starts = [np.ones((1, len(logs)))]
    else:
        place = np.cumsum(weights) / total
        starts = [np.stack([place <= q, place > q]).astype(float) for q in (0.02, 0.1, 0.5, 0.9, 0.95, 0.98, 0.995)]
    best: Components | None = None
    for membership in starts:
        if (membership @ weights <= 0).any():
            continue
        likelihood = -np.inf
        for _ in range(steps):
            mass = membership * weights
            sizes = mass.sum(1).clip(1e-9)
            means = mass @ logs / sizes
            stds = np.sqrt((mass * (logs - means[:, None]) ** 2).sum(1) / sizes).clip(_LEAST_STD)
            fitted = Components(sizes / total, means, stds, 0.0)
            density = fitted.density(logs)
            whole = density.sum(0).clip(1e-300)
            before, likelihood = likelihood, float(weights @ np.log(whole))
            membership = density / whole
            if likelihood - before < 1e-9 * total:
                break
        order = np.argsort(means)
        bic = parameters * np.log(total) - 2 * likelihood
        if best is None or bic < best.bic:
            best = Components(fitted.shares[order], means[order], stds[order], float(bic))
    if best is None:  # one value alone
        return fit_mixture(logs, weights, 1, steps)
    return best


def mixture_rule(values: Array, weights: Array) -> Threshold:
    """Two normal distributions of log-norms, if the BIC and the sizes of the effects say that there are two.

    The line is where a token belongs to either with the same probability. A lower BIC alone means little: among many
    tokens any skewness is worth a second component. So the smaller component must be a minority, far off
    (Ashman's D), and behind a valley.
    """
    kept = (values > 0) & (weights > 0)
    if weights[kept].sum() < 3:
        return Threshold("mixture", reason="too few norms to judge")
    logs, counts = np.log(values[kept]), weights[kept]
    if len(logs) > _MANY:  # a tenth of a per cent is finer than any spread that counts
        logs, place = np.unique(logs.round(3), return_inverse=True)
        counts = np.bincount(place, weights=counts).astype(np.float64)
    single, two = (fit_mixture(logs, counts, number) for number in (1, 2))
    if len(two.means) < 2:
        return Threshold("mixture", reason="all norms are the same")
    minority = int(np.argmin(two.shares))
    (low, high), share = two.means, float(two.shares[minority])
    separation = float((high - low) / np.sqrt((two.stds**2).mean()))
    path = np.linspace(low, high, 512)
    parts = two.density(path)
    whole = parts.sum(0)
    depth = float(whole.min() / max(whole[0 if minority == 0 else -1], 1e-300))
    ratio = float(np.exp(high - low))
    said = (
        f"{share:.2%} of the patches, {ratio:.1f} times off (Ashman's D {separation:.1f}, "
        f"{depth:.2f} of its peak density in the gap, BIC {two.bic - single.bic:+.4g})"
    )
    holds = (
        two.bic < single.bic
        and share <= MAX_SHARE
        and separation >= MIN_SEPARATION
        and ratio >= MIN_RATIO
        and depth <= MAX_VALLEY
    )
    if not holds:
        return Threshold("mixture", reason=f"the norms form one group; what comes nearest to a second: {said}")
    said = f"the norms form two groups, the smaller of {said}"
    crossing = int(np.argmin(np.abs(np.log(parts[0].clip(1e-300)) - np.log(parts[1].clip(1e-300)))))
    line = float(np.exp(path[crossing]))
    return (
        Threshold("mixture", low=line, separated=True, reason=said)
        if minority == 0
        else Threshold("mixture", line, 0.0, True, said)
    )
