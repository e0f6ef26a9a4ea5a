"""From what a pass has summed to the figures of a report, layer by layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import RegisterAdapterError
from .attention_sketch import TIMES_EVEN
from .patch_sketch import Array, Edges, PatchSketch
from .report import FAR_ABOVE, FAR_BELOW, MOST, LayerReport, MassiveChannel, NormDistribution
from .rules.histogram import RELATIVE_ERROR, bin_centres, bin_edges, nearest_edge, weighted_quantile
from .rules.rules import Rule
from .rules.threshold import Threshold
from .statistics import Statistics

__all__ = ["DEFINITIONS", "ratio_of_medians", "summarise_layer", "threshold_at"]

_CHANNELS = 8

#: What every figure of a report is.
DEFINITIONS = {
    "layer": "Index into the hidden states: 0 is the input of the first block, i + 1 the output of block i. "
    "All before the final LayerNorm.",
    "norms": "L2 norm of a token's hidden state, taken in float32, by kind: patches, CLS (and distillation token), "
    "registers (native ones and adapters'). Mean, standard deviation, smallest and largest are exact; quantiles are "
    f"those of a histogram with 32 bins an octave, so they are within {RELATIVE_ERROR:.2%}.",
    "threshold": "The report's rule, applied to the norms of all patches of all images at this layer. Norms above high "
    "or below low are outliers. Either is moved to the nearest edge of the histogram, by at most "
    f"{RELATIVE_ERROR:.2%}; every share below is exact for the threshold as it is given here. The rules auto and "
    "mixture draw no line before a group that layer 0 has as well: it is the images' own. Where the verdict rests "
    "on attention alone, a threshold of the rule attention is the line that best tells gathered patches from others.",
    "outlier_share": "Outliers over all patch tokens of the layer; low_share: those below the lower line.",
    "images_with_outliers": "Share of the images with at least one outlier at this layer; where there are outliers on "
    "both sides, the number of images with both is interpolated between lines an eighth of an octave apart.",
    "per_image": "Mean over images of the number of outliers, and its (population) standard deviation.",
    "massive_channels": "The channels with the largest |activation| over all patch tokens, and that over the median "
    "over channels of the same.",
    "similarity": "Cosine of a patch to its up to 4 neighbours, mean over them, right behind the patch embedding, "
    "without position; the mean over outliers and over the other patches.",
    "border_distance": "Distance to the nearest border of the patch grid, in patches, 0 at the border; the mean.",
    "position_map": "Share of the images in which the patch at a place of the grid (h, w) is an outlier.",
    "recurrence": "Chance that the place of an outlier has an outlier in another image, over the mean share of "
    "outliers: 1 means that places are not remembered.",
    "attention": "Attention after softmax in the block that reads this layer, by head: the sum over the keys of a "
    "kind, mean over the images; from_all: mean over all queries, from_cls: of the first token. Outliers by the norm "
    "and line of this layer.",
    "gathered": f"The patches that each receive at least {TIMES_EVEN:g} times an even share of the attention in the "
    "block that reads this layer (mean over heads and queries), whatever their norms: their share of all patches, the "
    "share of the attention that they receive together, and the geometric mean of their norms over the others'; the "
    "same of their values' norms, head by head, weighted by the attention that they receive there.",
    "first_layer": "Start of the run of layers at which the rule finds two kinds of tokens that reaches the last "
    "layer, or else of the longest run. Layer 0 is left out: there norms follow the contrast of the patch.",
    "verdict": "present: separated at the last layer. present inside only: at two or more layers in a row, not at "
    "the last; or no layer is, and in a block but the first the gathered patches receive at least "
    f"{MOST:.0%} of the attention, with values of at most {FAR_BELOW:g} times (no-op) or at least {FAR_ABOVE:g} times "
    "(broadcast) the others' norms. none: otherwise.",
    "evidence": "norms, attention or both: which of the two conditions hold. kind: what the gathered patches are in "
    "the block where they receive most.",
}


def threshold_at(statistics: Statistics, layer: int, rule: Rule) -> Threshold:
    """What a rule says about one layer, its lines moved to the nearest edges of the histogram."""
    threshold = rule(*statistics.norms(layer))
    edges = bin_edges()
    return replace(
        threshold, high=float(edges[nearest_edge(threshold.high)]), low=float(edges[nearest_edge(threshold.low)])
    )


def ratio_of_medians(patches: PatchSketch, outlying: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> float:
    """Median norm of the outliers over that of the other patches."""
    values, counts = bin_centres(), patches.counts()
    if not counts[outlying].sum() or not counts[~outlying].sum():
        return 1.0
    medians = [weighted_quantile(values[part], counts[part], 0.5) for part in (outlying, ~outlying)]
    return medians[0] / medians[1]


def summarise_layer(statistics: Statistics, layer: int, rule: Rule) -> LayerReport:
    """All figures of one layer.

    Raises:
        RegisterAdapterError: The hidden states hold infinities or what is not a number.
    """
    patches = statistics.patches[layer]
    if not bool(patches.histogram.moments.isfinite().all()):
        raise RegisterAdapterError(
            f"the hidden states at layer {layer} are not finite: the model overflows, as in float16, or its weights "
            "are "
            "damaged. Audit it in bfloat16 or float32."
        )
    threshold = threshold_at(statistics, layer, rule)
    edges = Edges(threshold)
    counts = patches.counts()
    histograms = {"patch": patches.histogram, **statistics.others[layer]}
    outliers, total = float(counts[edges.outlying].sum()), float(counts.sum())
    mean, std = patches.per_image(edges)
    places = patches.places(edges)
    return LayerReport(
        layer=layer,
        norms={kind: NormDistribution(**histogram.summary()) for kind, histogram in histograms.items()},
        threshold=threshold,
        outlier_share=outliers / total,
        low_share=float(counts[: edges.low].sum()) / total,
        images_with_outliers=patches.images_with_outliers(edges),
        per_image_mean=mean,
        per_image_std=std,
        massive_channels=_massive_channels(patches),
        similarity=patches.mean_similarity(edges),
        border_distance=_border_distance(places, statistics),
        position_map=_position_map(places, statistics),
        recurrence=patches.recurrence(edges),
        attention=statistics.attentions[layer].shares(edges) if layer in statistics.attentions else None,
        gathered=statistics.attentions[layer].gathered() if layer in statistics.attentions else None,
    )


def _massive_channels(patches: PatchSketch) -> list[MassiveChannel]:
    if patches.channels is None:
        return []
    largest = patches.channels.cpu().double()
    usual = max(float(largest.median()), 1e-30)
    return [
        MassiveChannel(int(channel), float(largest[channel]), float(largest[channel]) / usual)
        for channel in largest.argsort(descending=True, stable=True)[:_CHANNELS]
    ]


def _border_distance(places: Array | None, statistics: Statistics) -> dict[str, float] | None:
    if places is None or statistics.grid is None:
        return None
    height, width = statistics.grid
    rows, columns = np.indices((height, width)).reshape(2, -1)
    distance = np.minimum.reduce([rows, columns, height - 1 - rows, width - 1 - columns])
    others = statistics.num_images - places
    pairs = (("outlier", places), ("other", others))
    return {key: float((distance * number).sum() / number.sum()) for key, number in pairs if number.sum()}


def _position_map(places: Array | None, statistics: Statistics) -> list[list[float]] | None:
    if places is None or statistics.grid is None:
        return None
    shares = (places / statistics.num_images).reshape(statistics.grid)
    return [[float(share) for share in row] for row in shares]
