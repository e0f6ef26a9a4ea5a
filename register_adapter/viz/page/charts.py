"""Charts of an audit as SVG; a page's own colours reach them through the names of their classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ...artifacts.report import ArtifactReport, LayerReport
from .markup import Markup, element

__all__ = ["attention_profile", "histogram", "norm_profile", "norm_range"]

#: Bars in a histogram, at most.
_BARS = 56
_KINDS = {"cls": "CLS", "register": "registers"}


def norm_range(report: ArtifactReport) -> tuple[float, float]:
    """The smallest and the largest patch norm of all layers, of tokens and of medians of other kinds of tokens."""
    edges = [edge for layer in report.layers for edge in _patch_edges(layer)]
    edges += [norms.quantiles["0.5"] for layer in report.layers for norms in layer.norms.values() if norms.count]
    edges = [value for value in edges if 0 < value < math.inf]
    if not edges:
        return 1.0, 10.0
    low, high = min(edges), max(edges)
    return (low, high) if high > 1.05 * low else (low / 1.05, high * 1.05)


def _patch_edges(layer: LayerReport) -> tuple[float, ...]:
    norms = layer.norms.get("patch")
    return (norms.edges[0], norms.edges[-1]) if norms is not None and norms.counts else ()


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high) - math.log(low)

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / span  # nothing, as of registers that are zero, stands at the start
        return round(start + min(max(share, 0.0), 1.0) * (end - start), 2)

    return place


def _ticks(low: float, high: float) -> list[float]:
    """Round values in a range, at most six or so."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 6:
            break
    return ticks or [low, high]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, words: str, anchor: str = "middle") -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor)


def _svg(width: int, height: int, label: str, *children: Iterable[Markup] | Markup | None) -> Markup:
    return element("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_="chart")


def histogram(layer: LayerReport, limits: tuple[float, float]) -> Markup:
    """Histogram of the patch norms of one layer; both axes are logarithmic, the thresholds are drawn.

    Args:
        layer: What was found there.
        limits: Ends of the axis of norms, the same for all layers of a model.
    """
    width, height, left, top, bottom = 320, 150, 34, 8, 122
    right = width - 8
    place = _log_scale(*limits, left, right)
    norms = layer.norms.get("patch")
    usual, outlying = _bars(layer, limits)
    most = max([1, *usual.values(), *outlying.values()])
    unit = (bottom - top) / (math.log10(most) + 0.3)
    step = (right - left) / _BARS

    def bars(counts: dict[int, int], kind: str) -> Iterable[Markup]:
        for bar, count in counts.items():
            tall = round((math.log10(count) + 0.3) * unit, 2)
            x = round(left + bar * step, 2)
            yield element("rect", x=x, y=bottom - tall, width=round(step * 0.92, 2), height=tall, class_=kind)

    thresholds = [norm for norm in (layer.threshold.low, layer.threshold.high) if limits[0] <= norm <= limits[1]]
    kind = "threshold" if layer.threshold.separated else "threshold unsure"
    marks = [
        element("path", d=f"M{x} {bottom - 1}l4 -8h-8z", class_=f"mark {name}")
        for name in _KINDS
        if name in layer.norms and layer.norms[name].count
        for x in [place(layer.norms[name].quantiles["0.5"])]
    ]
    axis = [_line(left, bottom, right, bottom, "axis")]
    for power in range(0, int(math.log10(most)) + 1):
        y = round(bottom - (power + 0.3) * unit, 2)
        axis += [_line(left, y, right, y, "grid"), _text(left - 5, y + 4, _short(10**power), "end")]
    for tick in _ticks(*limits):
        axis += [
            _line(place(tick), bottom, place(tick), bottom + 4, "axis"),
            _text(place(tick), bottom + 17, f"{tick:g}"),
        ]
    label = f"Histogram of patch norms at layer {layer.layer}"
    if norms is not None and norms.count:
        label += f": median {norms.quantiles['0.5']:.3g}, largest {norms.quantiles['1']:.3g}"
        label += f", {layer.outlier_share:.2%} outliers"
    lines = [_line(place(norm), top, place(norm), bottom, kind) for norm in thresholds]
    return _svg(width, height, label, axis, bars(usual, "bar"), bars(outlying, "bar outlier"), lines, marks)


def _short(number: int) -> str:
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number // limit}{letter}"
    return str(number)


def _bars(layer: LayerReport, limits: tuple[float, float]) -> tuple[dict[int, int], dict[int, int]]:
    """Tokens by bar, usual ones and outliers; the report's finer bins are put together."""
    usual: dict[int, int] = {}
    outlying: dict[int, int] = {}
    norms = layer.norms.get("patch")
    if norms is None:
        return usual, outlying
    index = _log_scale(*limits, 0, _BARS)
    for low, high, count in zip(norms.edges[:-1], norms.edges[1:], norms.counts, strict=True):
        if count:
            centre = math.sqrt(max(low, 1e-12) * high) if math.isfinite(high) else low
            bar = min(int(index(centre)), _BARS - 1)
            side = outlying if layer.threshold.separated and layer.threshold.outliers(centre) else usual
            side[bar] = side.get(bar, 0) + count
    return usual, outlying


def norm_profile(report: ArtifactReport) -> Markup:
    """How the patch norms grow over the layers: median, 1st to 99th percentile, largest, and the thresholds."""
    width, height, left, right, top, bottom = 640, 250, 54, 12, 12, 214
    layers = [layer for layer in report.layers if (n := layer.norms.get("patch")) is not None and n.count]
    low, high = norm_range(report)
    up = _log_scale(low, high, bottom, top)
    across = (width - left - right) / max(len(report.layers), 1)

    def x(layer: LayerReport) -> float:
        return round(left + (layer.layer + 0.5) * across, 2)

    def points(name: str) -> list[tuple[float, float]]:
        return [(x(layer), up(max(layer.norms["patch"].quantiles[name], low))) for layer in layers]

    band = [*points("0.99"), *reversed(points("0.01"))]
    thresholds = [
        _line(x(layer) - 0.4 * across, up(norm), x(layer) + 0.4 * across, up(norm), "threshold")
        for layer in layers
        if layer.threshold.separated
        for norm in (layer.threshold.low, layer.threshold.high)
        if low <= norm <= high
    ]
    dots = [
        element("circle", cx=at, cy=y, r=3.5, class_="dot outlier" if layer.threshold.separated else "dot")
        for layer, (at, y) in zip(layers, points("1"), strict=True)
    ]
    every = max(1, len(report.layers) // 16)
    axis = [_line(left, bottom, width - right, bottom, "axis"), _text((left + width) / 2, height - 2, "layer")]
    axis += [_text(x(layer), bottom + 16, str(layer.layer)) for layer in report.layers if layer.layer % every == 0]
    for tick in _ticks(low, high):
        axis += [
            _line(left, up(tick), width - right, up(tick), "grid"),
            _text(left - 6, up(tick) + 4, f"{tick:g}", "end"),
        ]
    label = f"Patch norms of {report.name} by layer: {_norms_seen(layers)}"
    return _svg(
        width,
        height,
        label,
        axis,
        element("polygon", points=_path(band), class_="band"),
        element("polyline", points=_path(points("0.5")), class_="median"),
        dots,
        thresholds,
    )


def _norms_seen(layers: Sequence[LayerReport]) -> str:
    if not layers:
        return "no patches"
    first, last = (layers[place].norms["patch"].quantiles["0.5"] for place in (0, -1))
    most = max(layers, key=lambda layer: layer.norms["patch"].quantiles["1"])
    apart = [str(layer.layer) for layer in layers if layer.threshold.separated]
    return (
        f"the median goes from {first:.3g} at layer {layers[0].layer} to {last:.3g} at layer {layers[-1].layer}, the "
        f"largest is {most.norms['patch'].quantiles['1']:.3g} at layer {most.layer}; "
        + (f"thresholds are drawn at layers {', '.join(apart)}" if apart else "no threshold is drawn")
    )


def attention_profile(report: ArtifactReport) -> Markup | None:
    """Who receives the attention in every block: stacked shares, mean over queries and heads; ``None`` without any."""
    shares_by_layer = [
        (layer.layer, layer.attention.from_all) for layer in report.layers if layer.attention is not None
    ]
    if not shares_by_layer:
        return None
    width, height, left, right, top, bottom = 640, 250, 54, 12, 12, 214
    across = (width - left - right) / len(report.layers)
    bars, axis = [], []
    for place, shares in shares_by_layer:
        below = 0.0
        for kind in ("outlier", "cls", "register", "other"):
            heads = shares.get(kind) or [0.0]
            share = sum(heads) / len(heads)
            x, y = left + (place + 0.12) * across, bottom - min(below + share, 1.0) * (bottom - top)
            tall = share * (bottom - top)
            bars.append(
                element(
                    "rect", x=_two(x), y=_two(y), width=_two(0.76 * across), height=_two(tall), class_=f"bar {kind}"
                )
            )
            below += share
    every = max(1, len(report.layers) // 16)
    for layer in report.layers:
        if layer.layer % every == 0:
            axis.append(_text(_two(left + (layer.layer + 0.5) * across), bottom + 16, str(layer.layer)))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _two(bottom - share * (bottom - top))
        kind = "axis" if share == 0 else "grid"
        axis += [_line(left, y, width - right, y, kind), _text(left - 6, y + 4, f"{share:.0%}", "end")]
    axis.append(_text((left + width) / 2, height - 2, "layer"))
    label = f"Shares of attention by layer in {report.name}: {_shares_seen(shares_by_layer)}"
    return _svg(width, height, label, axis, bars)


def _shares_seen(shares_by_layer: Sequence[tuple[int, dict[str, list[float]]]]) -> str:
    kinds = (("outlier", "outliers"), ("cls", "CLS"), ("register", "registers"), ("other", "other patches"))
    said = []
    for kind, words in kinds:
        means = {place: sum(shares[kind]) / len(shares[kind]) for place, shares in shares_by_layer if shares.get(kind)}
        if any(means.values()):
            most = max(means, key=lambda place: means[place])
            said.append(f"{words} receive at most {means[most]:.1%}, at layer {most}")
    return "; ".join(said) or "none is received"


def _two(value: float) -> float:
    return round(value, 2)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)
