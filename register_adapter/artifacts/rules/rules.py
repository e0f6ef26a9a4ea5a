"""Rules that say which norms are outlying: a table of small functions behind one interface.

A rule takes the norms of the patch tokens at one layer, as ``values`` in ascending order and ``weights``, how often
each is there. Exact norms have weights of one; the bins of a :class:`~register_adapter.artifacts.NormHistogram` stand
for their centres. It returns a :class:`~register_adapter.artifacts.Threshold`. The fixed norm and its size (150 for
DINOv2-g) are those of arXiv 2309.16588, mean + 3 standard deviations that of arXiv 2506.08010.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .histogram import Array, weighted_quantile
from .mixture import mixture_rule
from .threshold import Threshold
from .valley import valley_rule

__all__ = ["RULES", "Rule", "apply_rule", "resolve_rule", "rule_name"]

#: ``(values, weights) -> Threshold``; both ``(n,)`` float64, values in ascending order.
Rule = Callable[[Array, Array], Threshold]

# Median absolute deviation of a normal distribution, in units of its standard deviation.
_NORMAL = 1.4826


def fixed(values: Array, weights: Array, threshold: float = 150.0) -> Threshold:
    """Norms above a threshold given by hand."""
    return _beyond("fixed", values, weights, high=threshold, why=f"threshold {threshold:g}, given")


def sigma(values: Array, weights: Array, k: float = 3.0, two_sided: bool = False) -> Threshold:
    """Norms above the mean plus ``k`` standard deviations, and below the mean minus as many."""
    mean = float(np.average(values, weights=weights))
    std = float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
    low = max(mean - k * std, 0.0) if two_sided else 0.0
    why = f"mean {mean:.4g} {'±' if two_sided else '+'} {k:g} standard deviations of {std:.4g}"
    return _beyond(_sided("sigma", two_sided), values, weights, mean + k * std, low, why)


def percentile(values: Array, weights: Array, percent: float = 98.0, two_sided: bool = False) -> Threshold:
    """Norms above a percentile, or half of the rest at either end; there are always as many."""
    rest = (100.0 - percent) / (2 if two_sided else 1)
    high = weighted_quantile(values, weights, (100.0 - rest) / 100)
    low = weighted_quantile(values, weights, rest / 100) if two_sided else 0.0
    said = f"percentiles {rest:g} and {100 - rest:g}" if two_sided else f"percentile {percent:g}"
    return _beyond(_sided("percentile", two_sided), values, weights, high, low, f"{said} of all norms")


def mad(values: Array, weights: Array, k: float = 6.0, two_sided: bool = False) -> Threshold:
    """Log-norms above the median plus ``k`` times 1.4826 MAD, and below the median minus as much."""
    kept = values > 0
    logs, counts = np.log(values[kept]), weights[kept]
    if not counts.sum():
        return Threshold(_sided("mad", two_sided), reason="all norms are zero")
    median = weighted_quantile(logs, counts, 0.5)
    away = np.abs(logs - median)
    order = np.argsort(away, kind="stable")
    spread = _NORMAL * weighted_quantile(away[order], counts[order], 0.5)
    low = float(np.exp(median - k * spread)) if two_sided else 0.0
    why = f"median {np.exp(median):.4g}, times or over exp({k:g} · 1.4826 MAD of {spread / _NORMAL:.3g}) of log-norms"
    return _beyond(_sided("mad", two_sided), values, weights, float(np.exp(median + k * spread)), low, why)


def _sided(name: str, two_sided: bool) -> str:
    return f"two_sided_{name}" if two_sided else name


def _beyond(name: str, values: Array, weights: Array, high: float, low: float = 0.0, why: str = "") -> Threshold:
    """The threshold of a rule without a test for two kinds of tokens: separated wherever something lies beyond it."""
    threshold = Threshold(name, high, low)
    share = float(weights[threshold.outliers(values)].sum() / weights.sum())
    return Threshold(name, high, low, share > 0, f"{why}: {share:.2%} of the patches lie beyond it")


#: Name -> rule. ``"auto"`` is the audit's own, see :mod:`register_adapter.artifacts.rules.valley`.
RULES: dict[str, Rule] = {
    "auto": valley_rule,
    "fixed": fixed,
    "sigma": sigma,
    "percentile": percentile,
    "mad": mad,
    "mixture": mixture_rule,
    "two_sided_sigma": partial(sigma, two_sided=True),
    "two_sided_percentile": partial(percentile, two_sided=True),
    "two_sided_mad": partial(mad, two_sided=True),
}

# What a number behind the name of a rule means, as in "fixed:75".
_NUMBERS = {"fixed": "threshold", "sigma": "k", "percentile": "percent", "mad": "k"}


def resolve_rule(rule: str | Rule) -> Rule:
    """A rule by its name, with a number behind it where it takes one (``"fixed:75"``, ``"mad:8"``), or as it is.

    Raises:
        ValueError: There is no such rule, or it takes no such number.
        TypeError: It is neither a name nor a function.
    """
    if not isinstance(rule, str):
        if not callable(rule):
            raise TypeError(
                f"rule must be a name ({', '.join(RULES)}) or a function of (values, weights), got {rule!r:.80}"
            )
        return rule
    name, colon, number = rule.partition(":")
    if name not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
    if not colon:
        return RULES[name]
    argument = _NUMBERS.get(name.removeprefix("two_sided_"))
    if argument is None:
        raise ValueError(f"the rule {name!r} takes no number, found {rule!r}; these do: {', '.join(_NUMBERS)}")
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"{number!r} behind the rule {name!r} is not a number; write 'fixed:75', say") from error
    if not value > 0 or (argument == "percent" and value >= 100):
        raise ValueError(f"the number behind the rule {name!r} is out of range: {number}")
    return partial(RULES[name], **{argument: value})


def rule_name(rule: str | Rule) -> str:
    """What a report calls a rule."""
    if isinstance(rule, str):
        return rule
    return str(getattr(rule, "__name__", None) or type(rule).__name__)


def apply_rule(rule: str | Rule, norms: Any) -> Threshold:
    """Apply a rule to exact norms, a tensor or an array of any shape."""
    detach = getattr(norms, "detach", None)
    values = np.sort(np.asarray(detach().float().cpu() if detach else norms, dtype=np.float64).ravel())
    return resolve_rule(rule)(values, np.ones_like(values))
