"""The audit's own rule: a second mode of log-norms, far off, small, and behind an empty valley.

Norms of a clean model differ too: objects and smooth background can make two modes, and tails are long. What such
distributions lack is the valley: artifacts are few and far off, and almost no token lies between them and the rest
("Vision Transformers Need Registers", arXiv 2309.16588, figure 3). The line is drawn in the valley, on either side of
the bulk: artifacts can have outlying low norms too (OpenAI CLIP).

The constants were chosen on planted and clean models, and are reported on others: see docs/audit.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .histogram import BINS_PER_OCTAVE, Array
from .threshold import Threshold

__all__ = ["Split", "best_split", "valley_rule"]

#: Width of the Gaussian that smooths the histogram, in octaves.
BANDWIDTH = 0.1
#: Least density in the valley over the peak of the outliers, at most.
MAX_VALLEY = 0.35
#: What counts as the valley's ground when the line is drawn: its least density plus this share of the outliers' peak.
FLAT = 0.1
#: Geometric mean of the outliers over that of the rest, at least (or one over it).
MIN_RATIO = 1.6
#: Ashman's D of the two groups' log-norms, at least: distance of the means over the root mean square deviation.
MIN_SEPARATION = 3.0
#: Outliers are a minority: share of all patches, and the least number of them.
MAX_SHARE, MIN_SHARE, MIN_COUNT = 0.15, 2e-4, 4


@dataclass(frozen=True)
class Split:
    """A valley of the log-norms' distribution, with what lies beyond it.

    Attributes:
        norm: The norm in the valley.
        share: Share of the patches beyond it.
        count: Number of them.
        ratio: Geometric mean of the norms beyond over that of the rest; above 1 also on the low side.
        valley: Least density in between over the peak of those beyond.
        separation: Ashman's D.
    """

    norm: float
    share: float
    count: float
    ratio: float
    valley: float
    separation: float

    @property
    def separated(self) -> bool:
        """Whether these are two kinds of tokens, and not one with a tail."""
        return (
            MIN_SHARE <= self.share <= MAX_SHARE
            and self.count >= MIN_COUNT
            and self.ratio >= MIN_RATIO
            and self.separation >= MIN_SEPARATION
            and self.valley <= MAX_VALLEY
        )

    @property
    def said(self) -> str:
        """Its figures in words."""
        return f"{self.share:.2%} of the patches, with norms {self.ratio:.1f} times"

    @property
    def gap(self) -> str:
        """How clear the gap is."""
        return (
            f"in the gap the density is {self.valley:.2f} of the group's peak, {MAX_VALLEY} at most; "
            f"Ashman's D {self.separation:.1f}, {MIN_SEPARATION:g} at least"
        )

    @property
    def missing(self) -> str:
        """What it lacks to be a group of its own."""
        lacks = {
            f"they are too many, over {MAX_SHARE:.0%}": self.share > MAX_SHARE,
            "they are too few to judge": self.share < MIN_SHARE or self.count < MIN_COUNT,
            f"they are too near, under {MIN_RATIO} times": self.ratio < MIN_RATIO,
            f"the two groups overlap, Ashman's D {self.separation:.1f}, under {MIN_SEPARATION:g}": self.separation
            < MIN_SEPARATION,
            f"the gap is not clear, {self.valley:.2f} of their peak density in it, over {MAX_VALLEY}": self.valley
            > MAX_VALLEY,
        }
        return ", and ".join(words for words, true in lacks.items() if true)


#: Side of the bulk -> what norms there are, and how far off.
_SIDES = {"high": ("larger", "as large as the others'"), "low": ("smaller", "as small as the others'")}


def valley_rule(values: Array, weights: Array) -> Threshold:
    """Draw the line in the valley between the bulk and a few far off, on either side; none where there is no valley."""
    sides = {}
    for name, sign in (("high", 1.0), ("low", -1.0)):
        sides[name] = best_split(values, weights, sign)
    separated = {name: split for name, split in sides.items() if split is not None and split.separated}
    if not separated:
        rest = [
            f"{split.said} {_SIDES[name][1]}, but {split.missing}" for name, split in sides.items() if split is not None
        ]
        nearest = f"; what comes nearest to one: {'; '.join(rest)}" if rest else ""
        return Threshold("auto", reason=f"the norms form one group, and no smaller group stands apart{nearest}")
    high, low = separated.get("high"), separated.get("low")
    return Threshold(
        "auto",
        high.norm if high else float("inf"),
        low.norm if low else 0.0,
        True,
        "; ".join(
            f"a gap sets a group of {_SIDES[name][0]} norms apart: {split.said} {_SIDES[name][1]} ({split.gap})"
            for name, split in separated.items()
        ),
    )


def best_split(values: Array, weights: Array, sign: float = 1.0) -> Split | None:
    """The deepest valley above the median (``sign`` -1: below it) with a minority beyond it; ``None`` without any.

    Args:
        values: ``(n,)`` norms.
        weights: ``(n,)`` how often each is there.
        sign: Which side.
    """
    kept = (values > 0) & (weights > 0)
    if not kept.any():
        return None
    logs, counts = sign * np.log2(values[kept]), weights[kept]
    places, mass = _binned(logs, counts)
    density = _smooth(mass)
    total = float(mass.sum())
    middle = int(np.searchsorted(np.cumsum(mass), total / 2))
    splits = []
    for peak in range(middle + 1, len(density) - 1):
        if density[peak] <= density[peak - 1] or density[peak] < density[peak + 1]:
            continue
        between = density[middle : peak + 1]
        lowest = middle + int(between.argmin())
        if 0 < mass[lowest + 1 :].sum() <= MAX_SHARE * total:
            mode = lowest + int(density[lowest:].argmax())
            at = middle + _line(places[middle : mode + 1], density[middle : mode + 1], sign)
            splits.append(_measure(places, mass, at, float(between.min() / density[peak]), sign))
    fitting = [split for split in splits if split.separated]
    # Among those that hold, the one with most beyond it: what lies behind a second valley lies behind the first too.
    if fitting:
        return max(fitting, key=lambda split: split.count)
    return min(splits, key=lambda split: split.valley, default=None)


def _binned(logs: Array, counts: Array) -> tuple[Array, Array]:
    """Centres and mass of bins of the histogram's width over the range, with room for smoothing at the ends."""
    bins = np.floor(logs * BINS_PER_OCTAVE).astype(int)
    room = BINS_PER_OCTAVE
    first = int(bins.min()) - room
    length = int(bins.max()) - first + room + 1
    mass = np.bincount(bins - first, weights=counts, minlength=length).astype(np.float64)
    return (np.arange(len(mass)) + first + 0.5) / BINS_PER_OCTAVE, mass


def _smooth(mass: Array) -> Array:
    """The mass under a Gaussian of width :data:`BANDWIDTH`."""
    width = BANDWIDTH * BINS_PER_OCTAVE
    reach = int(np.ceil(4 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    smooth: Array = np.convolve(mass, kernel / kernel.sum(), "full")[reach:-reach]
    return smooth


def _line(places: Array, density: Array, sign: float) -> int:
    """Where in the valley between the bulk (first place) and the outliers' peak (last) the line is drawn.

    Halfway between the two norms (between the arithmetic and the geometric mean), as near to it as the valley reaches:
    a token that got less than half of what makes an outlier is not one.
    """
    norms = 2.0 ** (sign * places)
    ground = np.flatnonzero(density <= density.min() + FLAT * density[-1])
    halfway = ((norms[0] + norms[-1]) / 2 + np.sqrt(norms[0] * norms[-1])) / 2
    return int(ground[np.abs(norms[ground] - halfway).argmin()])


def _measure(places: Array, mass: Array, at: int, depth: float, sign: float) -> Split:
    """The figures of a split behind bin ``at``."""
    groups = []
    for part in (slice(None, at + 1), slice(at + 1, None)):
        mean = np.average(places[part], weights=mass[part])
        groups.append((mean, np.average((places[part] - mean) ** 2, weights=mass[part])))
    (low, low_variance), (high, high_variance) = groups
    # The width of a bin is the least spread that can be seen.
    spread = np.sqrt(max((low_variance + high_variance) / 2, (1 / BINS_PER_OCTAVE) ** 2))
    edge = (places[at] + places[at + 1]) / 2
    beyond = float(mass[at + 1 :].sum())
    return Split(
        float(2.0 ** (sign * edge)),
        beyond / float(mass.sum()),
        beyond,
        float(2.0 ** (high - low)),
        depth,
        float((high - low) / spread),
    )
