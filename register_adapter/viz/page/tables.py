"""Tables of a page: the rows of every layer, of the models side by side, and whatever else a caller has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...artifacts.report import ArtifactReport, LayerReport
from ...artifacts.sink_report import TOKEN_NAMES, SinkReport
from .markup import Markup, element

__all__ = [
    "Table",
    "channel_table",
    "head_table",
    "layer_table",
    "model_table",
    "norm_table",
    "over_median",
    "percent",
    "place_table",
    "rule_table",
    "show_table",
    "sink_table",
]

_MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table to show; its columns can be sorted.

    Attributes:
        title: What stands above it.
        columns: Headings.
        rows: One list a row. Numbers are shown with three digits, ``None`` as a dash; a pair ``(value, "text")`` is
            sorted by its value and shown as the text.
        note: What stands below it.
        bars: Columns of shares from 0 to 1 that get a bar.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    bars: frozenset[str] = field(default_factory=frozenset)


def show_table(table: Table) -> Markup:
    """The table in a box of its own that scrolls sideways where it is wider than the page."""
    numeric = [all(_is_number(row[place]) for row in table.rows) for place in range(len(table.columns))]
    head = [
        element("th", name, scope="col", data_sort=True, class_="number" if number else None)
        for name, number in zip(table.columns, numeric, strict=True)
    ]
    rows = [
        element("tr", [_cell(value, name in table.bars) for name, value in zip(table.columns, row, strict=True)])
        for row in table.rows
    ]
    inner = element(
        "table", element("caption", table.title), element("thead", element("tr", head)), element("tbody", *rows)
    )
    note = element("p", table.note, class_="note") if table.note else None
    return element(
        "div", element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=table.title), note
    )


def _is_number(value: Any) -> bool:
    value = value[0] if isinstance(value, tuple) else value
    return value is None or isinstance(value, int | float)


def _cell(value: Any, bar: bool) -> Markup:
    number = _is_number(value)
    value, words = value if isinstance(value, tuple) else (value, _words(value))
    missing = value is None or (number and not math.isfinite(value))
    share = f"--share:{min(max(value, 0), 1):.4f}" if bar and number and not missing else None
    kinds = [name for name, is_so in (("number", number), ("share", share), ("long", len(words) > 40)) if is_so]
    # Nine digits are enough to sort by, and nothing is what stands last.
    key = "" if missing else f"{value:.9g}" if number else str(value)
    return element("td", words, class_=" ".join(kinds) or None, style=share, data_value=key)


def _words(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _MISSING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> tuple[float | None, str]:
    """A share as a cell of a table: its value, and how it is shown."""
    if value is None:
        return None, _MISSING
    return value, "0%" if value == 0 else f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def _times(value: float | None) -> tuple[float | None, str]:
    return (None, _MISSING) if value is None else (value, f"{value:.2f} ×")


def over_median(layer: LayerReport) -> float | None:
    """Largest patch norm of a layer over the median."""
    norms = layer.norms.get("patch")
    if norms is None or not norms.count or not norms.quantiles["0.5"]:
        return None
    return norms.quantiles["1"] / norms.quantiles["0.5"]


def model_table(reports: Sequence[ArtifactReport]) -> Table:
    """The models of a page side by side, one row each."""
    rows = []
    for report in reports:
        last, worst = report.layers[-1], max(report.layers, key=lambda layer: layer.outlier_share)
        rows.append(
            [
                *(report.name, report.verdict, report.first_layer),
                *(percent(last.outlier_share), _times(over_median(last)), percent(last.images_with_outliers)),
                *(percent(worst.outlier_share), worst.layer if worst.outlier_share else None),
                *(report.num_registers, report.native_registers),
            ]
        )
    columns = (
        *("model", "verdict", "from layer", "outliers, last layer", "largest /\u00a0median, last layer"),
        *("images with outliers", "most outliers", "at layer", "registers", "native registers"),
    )
    return Table("Models side by side", columns, rows)


_LAYERS = (
    "Layer 0 is the input of the first block, layer i + 1 the output of block i. Norms: L2, before the final LayerNorm."
)
_ATTENTION = "Attention: of all queries, mean over heads, in the block that reads these tokens."


def layer_table(report: ArtifactReport) -> Table:
    """One row per layer: the norms, the threshold, and what lies beyond it."""
    rows = []
    for layer in report.layers:
        norms = layer.norms.get("patch")
        median = norms.quantiles["0.5"] if norms is not None and norms.count else None
        gathered = layer.gathered.attention if layer.gathered is not None else None
        rows.append(
            [
                *(layer.layer, median, _times(over_median(layer)), _threshold(layer)),
                *(percent(layer.outlier_share), percent(layer.images_with_outliers)),
                (layer.per_image_mean, f"{layer.per_image_mean:.2f} ± {layer.per_image_std:.2f}"),
                *(percent(_mean_shares(layer).get("outlier")), percent(gathered)),
            ]
        )
    columns = (
        *("layer", "median norm", "largest /\u00a0median", "threshold", "outliers", "images with outliers"),
        *("outliers per image", "attention to outliers", "attention to few patches"),
    )
    bars = frozenset({"outliers", "images with outliers", *columns[-2:]})
    note = f"{_LAYERS} A threshold in brackets does not separate two groups of patches. {_ATTENTION} To few patches: "
    note += "to those that each receive at least five times an even share."
    return Table("Layer by layer", columns, rows, note, bars)


def _threshold(layer: LayerReport) -> tuple[float | None, str]:
    low, high = layer.threshold.low, layer.threshold.high
    lines = [f"< {low:.3g}"] if low else []
    lines += [f"> {high:.3g}"] if math.isfinite(high) else []
    if not lines:
        return None, _MISSING
    words = ", ".join(lines)
    return (high if math.isfinite(high) else low), words if layer.threshold.separated else f"({words})"


def rule_table(report: ArtifactReport) -> Table:
    """What the rule says about every layer, in words."""
    rows = [
        [layer.layer, "yes" if layer.threshold.separated else "no", layer.threshold.reason] for layer in report.layers
    ]
    return Table("What the rule says", ("layer", "two groups", "why"), rows, f"Rule {report.rule}.")


def place_table(report: ArtifactReport) -> Table:
    """Where outliers are, what their surroundings are like, and who receives the attention."""
    rows = []
    for layer in report.layers:
        similarity, border = layer.similarity or {}, layer.border_distance or {}
        shares = _mean_shares(layer)
        rows.append(
            [
                *(layer.layer, percent(layer.low_share), layer.recurrence),
                *(similarity.get("outlier"), similarity.get("other"), border.get("outlier"), border.get("other")),
                *(percent(shares.get(name)) for name in ("cls", "register", "other")),
                percent(_mean_shares(layer, of_cls=True).get("outlier")),
            ]
        )
    columns = (
        *("layer", "outliers of low norm", "recurrence of places", "similarity, outliers", "similarity, others"),
        *("border distance, outliers", "border distance, others", "attention to CLS", "attention to registers"),
        *("attention to others", "attention of CLS to outliers"),
    )
    return Table("Places and attention", columns, rows, f"{_LAYERS} {_ATTENTION}", frozenset(columns[-4:]))


def _mean_shares(layer: LayerReport, of_cls: bool = False) -> dict[str, float]:
    if layer.attention is None:
        return {}
    shares = layer.attention.from_cls if of_cls else layer.attention.from_all
    return {name: sum(heads) / len(heads) for name, heads in (shares or {}).items() if heads}


def sink_table(sinks: SinkReport) -> Table | None:
    """The sinks of every head that has some, one row a head and kind of token; ``None`` without any."""
    rows = [
        [
            *(head.block, head.head, TOKEN_NAMES[token], part.kind, part.per_image, percent(part.attention)),
            *(part.value_ratio, part.stable_rank, head.stable_rank),
            *(percent(part.no_op), percent(part.broadcast)),
        ]
        for head in sinks.heads
        for token, part in head.tokens.items()
    ]
    columns = (
        *("block", "head", "tokens", "kind", "sinks per image", "attention", "value ratio", "stable rank"),
        *("stable rank, all images", "no-op", "broadcast"),
    )
    bars = frozenset({"attention", "no-op", "broadcast"})
    note = "Block i reads layer i. What a sink, its ratio and the stable rank are is under Definitions."
    return Table("Attention sinks, head by head", columns, rows, note, bars) if rows else None


_KINDS = {"patch": "patches", "cls": "CLS", "register": "registers"}


def norm_table(report: ArtifactReport) -> Table:
    """Norms of every kind of token in every layer."""
    quantiles = ("0", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99", "1")
    rows = [
        [layer.layer, words, norms.count, norms.mean, norms.std, *(norms.quantiles.get(name) for name in quantiles)]
        for layer in report.layers
        for kind, words in _KINDS.items()
        if (norms := layer.norms.get(kind)) is not None and norms.count
    ]
    names = ("smallest", *(f"{float(name):.0%}" for name in quantiles[1:-1]), "largest")
    columns = ("layer", "tokens", "number", "mean", "std", *names)
    return Table("Quantiles of norms", columns, rows, "L2 norms before the final LayerNorm.")


def channel_table(report: ArtifactReport, most: int = 3) -> Table:
    """The largest channels of every layer."""
    rows = [
        [layer.layer, channel.channel, channel.largest, _times(channel.over_median)]
        for layer in report.layers
        for channel in layer.massive_channels[:most]
    ]
    columns = ("layer", "channel", "largest |activation|", "over the median channel")
    return Table(
        "Massive channels", columns, rows, f"The {most} largest channels of every layer, over all patch tokens."
    )


def head_table(report: ArtifactReport) -> Table | None:
    """Share of attention that outliers receive, one row per block, one column per head; ``None`` without any."""
    layers = [layer for layer in report.layers if layer.attention is not None and layer.outlier_share]
    if not layers:
        return None
    heads = max(len(layer.attention.from_all["outlier"]) for layer in layers if layer.attention is not None)
    rows = []
    for layer in layers:
        shares = layer.attention.from_all["outlier"] if layer.attention is not None else []
        padded = [*shares, *[None] * (heads - len(shares))]
        rows.append([layer.layer, percent(layer.outlier_share), *(percent(share) for share in padded)])
    columns = ("layer", "outliers", *(f"head {head}" for head in range(heads)))
    note = "Beside it their share of all patch tokens, which they would get from a head that treats all patches alike."
    return Table("Attention that outliers receive, head by head", columns, rows, note, frozenset(columns[1:]))
