"""The verdict: whether patches are artifacts by their norms, or by what they do in attention, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .attention_sketch import TIMES_EVEN
from .layer_report import ratio_of_medians, summarise_layer
from .patch_sketch import Array, Edges
from .report import KIND_WORDS, MOST, ArtifactReport, Evidence, LayerReport, Verdict
from .rules.histogram import BINS, BINS_PER_OCTAVE, bin_edges
from .rules.rules import Rule
from .rules.threshold import Threshold
from .rules.valley import MIN_RATIO
from .sink_report import SinkKind
from .statistics import Statistics

__all__ = ["Finding", "attention_in_words", "attention_line", "judge"]

#: A group of norms is the images' own if the input of the first block has one on the same side, of a size within this
#: factor, and the model has not moved it further off than by this power.
SAME_SHARE, SAME_DISTANCE = 1.5, 1.25
#: Rules that ask whether there are two kinds of tokens at all; who chooses another wants its lines.
_ASKING = ("auto", "mixture")
#: Patches that draw attention are outliers by a line between norms if so many more of them than of others are beyond.
MIN_DIFFERENCE = 0.5


@dataclass(frozen=True)
class Finding:
    """What norms and attention say together.

    Attributes:
        verdict: See :data:`~register_adapter.artifacts.report.Verdict`.
        evidence: What it rests on, ``None`` where it is ``"none"``.
        kind: What the patches that draw most of the attention do, ``None`` where none do.
        first_layer: First layer with a line between norms, ``None`` without any.
        reason: Why, as far as norms say.
        layers: All layers, with the lines that were drawn.
    """

    verdict: Verdict
    evidence: Evidence | None
    kind: SinkKind | None
    first_layer: int | None
    reason: str
    layers: list[LayerReport]


def judge(statistics: Statistics, rule: Rule) -> Finding:
    """The verdict on what was summed.

    Norms speak first; a group that stands apart at the input of the first block already, and stays as it is, is not the
    model's doing. Where they show nothing, and a few patches take most of the attention of a block with values far
    from the others', lines are drawn between the norms of these and others, in the layers where that can be done.

    Args:
        statistics: After the passes.
        rule: What draws the lines between norms.
    """
    layers = [summarise_layer(statistics, index, rule) for index in sorted(statistics.patches)]
    given = _groups(layers[0], statistics)
    layers = layers[:1] + [_without(given, layer, statistics) for layer in layers[1:]]
    verdict, first, reason = _by_norms(layers, statistics)
    # At the input of the first block norms and attention follow the contrast of the patch.
    telling = [layer for layer in layers[1:] if layer.gathered is not None and layer.gathered.telling]
    kind = _kind(telling or layers[1:])
    if verdict != "none":
        return Finding(verdict, "both" if telling else "norms", kind, first, reason, layers)
    if not telling:
        return Finding("none", None, kind, None, reason, layers)
    for layer in telling:
        if not layer.threshold.separated:
            line = attention_line(*statistics.attentions[layer.layer].by_norm())
            if line.separated:
                layers[layer.layer] = summarise_layer(statistics, layer.layer, lambda *_, line=line: line)
    first = next((layer.layer for layer in telling if layers[layer.layer].threshold.separated), None)
    return Finding("present inside only", "attention", kind, first, reason, layers)


def _groups(layer: LayerReport, statistics: Statistics) -> dict[str, tuple[float, float]]:
    """Share of the patches beyond a line, and octaves from the others, by the side that the line is on."""
    if not layer.threshold.separated or layer.threshold.rule not in _ASKING:
        return {}
    edges, bins = Edges(layer.threshold), np.arange(BINS)
    sides = {
        "high": (layer.outlier_share - layer.low_share, bins >= edges.high),
        "low": (layer.low_share, bins < edges.low),
    }
    patches = statistics.patches[layer.layer]
    return {
        side: (share, abs(float(np.log2(ratio_of_medians(patches, beyond)))))
        for side, (share, beyond) in sides.items()
        if share > 0
    }


def _without(given: dict[str, tuple[float, float]], layer: LayerReport, statistics: Statistics) -> LayerReport:
    """A layer without the lines before groups that the input of the first block has as well."""
    kept, words = layer.threshold, []
    for side, (share, octaves) in _groups(layer, statistics).items():
        before, distance = given.get(side, (0.0, 0.0))
        if before / SAME_SHARE <= share <= before * SAME_SHARE and octaves <= distance * SAME_DISTANCE:
            kept = replace(kept, high=float("inf")) if side == "high" else replace(kept, low=0.0)
            words.append(
                f"{share:.2%} of the patches stand apart by {'larger' if side == 'high' else 'smaller'} norms, but "
                f"{before:.2%} do so at the input of the first block already, which is the images' own"
            )
    if not words:
        return layer
    separated = bool(np.isfinite(kept.high) or kept.low > 0)
    reason = "; ".join([*words, *([kept.reason] if separated else [])])
    line = replace(kept, separated=separated, reason=reason)
    return summarise_layer(statistics, layer.layer, lambda *_: line)


def attention_line(usual: Array, drawing: Array) -> Threshold:
    """The line between norms that best tells patches that draw attention from the others.

    Args:
        usual: ``(BINS,)`` number of patches that draw none, by norm.
        drawing: ``(BINS,)`` the same of those that do.
    """
    nothing = Threshold(
        "attention", reason="no line between norms tells the patches that draw attention from the others"
    )
    if not usual.any() or not drawing.any():
        return nothing
    usually, here = (float(np.average(np.arange(BINS), weights=part)) for part in (usual, drawing))
    octaves = (here - usually) / BINS_PER_OCTAVE
    if abs(octaves) < np.log2(MIN_RATIO):
        return nothing
    # How many lie beyond every edge, on the side where those that draw attention are.
    below = [np.concatenate([[0.0], np.cumsum(part)]) for part in (usual, drawing)]
    wrong, right = (part[-1] - part if octaves > 0 else part for part in below)
    at = int((2 * right / (right + wrong + right.max())).argmax())
    caught, taken = float(right[at] / right.max()), float(wrong[at] / wrong.max())
    if caught - taken < MIN_DIFFERENCE:
        return nothing
    edge = float(bin_edges()[at])
    high, low = (edge, 0.0) if octaves > 0 else (float("inf"), edge)
    said = f"{caught:.0%} of the patches that draw attention lie beyond it, and {taken:.1%} of the others"
    return Threshold("attention", high, low, True, said)


def _kind(layers: list[LayerReport]) -> SinkKind | None:
    """What patches do where they draw most attention."""
    gathered = max((layer.gathered for layer in layers if layer.gathered), key=lambda g: g.attention, default=None)
    return gathered.kind if gathered is not None and gathered.attention >= MOST else None


def _by_norms(layers: list[LayerReport], statistics: Statistics) -> tuple[Verdict, int | None, str]:
    """The verdict, the first layer of the outliers, and why, from all layers but the first."""
    runs: list[list[int]] = []
    for layer in layers[1:]:  # at the input of the first block norms follow the contrast of the patch
        if layer.threshold.separated:
            if runs and runs[-1][-1] == layer.layer - 1:
                runs[-1].append(layer.layer)
            else:
                runs.append([layer.layer])
    last = layers[-1].layer
    if runs and runs[-1][-1] == last:
        said = _said(layers[last], statistics)
        return "present", runs[-1][0], f"From layer {runs[-1][0]} on, the last one ({last}) included. {said}"
    longest = max(runs, key=len, default=[])
    if len(longest) >= 2:
        worst = max(longest, key=lambda index: layers[index].outlier_share)
        said = _said(layers[worst], statistics)
        return (
            "present inside only",
            longest[0],
            f"From layer {longest[0]} to {longest[-1]}, not at the last ({last}). {said}",
        )
    alone = f" (layer {', '.join(str(run[0]) for run in runs)} alone does, which does not count)" if runs else ""
    return "none", None, f"No layer from 1 to {last} has outliers{alone}. At the last: {layers[last].threshold.reason}."


def _said(layer: LayerReport, statistics: Statistics) -> str:
    edges = Edges(layer.threshold)
    ratio = ratio_of_medians(statistics.patches[layer.layer], edges.outlying)
    return (
        f"At layer {layer.layer}, {layer.outlier_share:.2%} of the patches are outliers: their median L2 norm is "
        f"{ratio:.2g} times the others'. Rule {layer.threshold.rule}: {layer.threshold.reason}."
    )


def attention_in_words(report: ArtifactReport) -> str:
    """Where the attention goes, in a sentence or two, and whether the verdict rests on it."""
    layer = report.most_telling or report.most_gathered
    gathered = layer.gathered if layer is not None else None
    if layer is None or gathered is None:
        return "Attention was not measured."
    if not gathered.attention:
        return f"No patch receives {TIMES_EVEN:g} times an even share of the attention in any block."
    said = f"in block {layer.layer}, {gathered.patches:.2%} of the patches receive {gathered.attention:.0%} of it"
    ratios = {"norms": gathered.norm_ratio, "values": gathered.value_ratio}
    figures = [f"{name} {ratio:.2g} times" for name, ratio in ratios.items() if ratio is not None]
    said += f", with {' and '.join(figures)} the others' there" if figures else ""
    if report.evidence == "attention":
        rule = f"The rule {report.rule} draws no line between norms, but a few patches draw most of the attention"
        lines = [str(layer.layer) for layer in report.layers if layer.threshold.rule == "attention"]
        drawn = f"Lines that tell them apart by their norms: at layer {', '.join(lines)}."
        return f"{rule}: {said} ({KIND_WORDS[gathered.kind]}). {drawn if lines else 'Their norms do not tell them.'}"
    if not report.unexplained:
        return f"Attention gathers most {said}{f' ({KIND_WORDS[gathered.kind]})' if gathered.telling else ''}."
    blocks = [layer.layer for layer in report.layers if layer.gathered and layer.gathered.attention >= MOST]
    others = f" (over half also in block {', '.join(str(b) for b in blocks if b != layer.layer)})" if blocks[1:] else ""
    why = (
        "Values were not known"
        if gathered.value_ratio is None
        else "Their values are neither far below nor far above the others'"
        if layer.layer
        else "That is at the input of the first block, where attention follows the image"
    )
    return (
        f"But a few patches draw most of the attention: {said}{others}. {why}, so that they need not be artifacts; the "
        f"rule {report.rule} draws no line between their norms and the others'. Look at the attention maps, and try a "
        "rule that draws a line in any case, such as sigma."
    )
