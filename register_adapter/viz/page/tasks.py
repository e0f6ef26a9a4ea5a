"""The result of an evaluation as one HTML page: figures with their intervals, every choice, per-class figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...evaluation.downstream import Score, TaskReport, TaskRow
from ...utils.staging import write_text
from .frame import environment_block, page_text, section
from .markup import Markup, element
from .tables import Table, show_table

__all__ = ["write_task_page"]


def write_task_page(path: str | Path, report: TaskReport, *, title: str = "Evaluation") -> Path:
    """Write what an evaluation measured as one self-contained HTML page, see :func:`register_adapter.viz.write_page`.

    Args:
        path: File to write; folders above it are made.
        report: From an ``evaluate_…`` function.
        title: Heading of the page.

    Returns:
        The path of the file.

    Raises:
        ValueError: The report has no rows.
    """
    if not report.rows:
        raise ValueError("nothing to show: the report has no rows")
    sections = [
        section("result", "Result", _interval_chart(report), show_table(_result_table(report)), _notes(report)),
        section("choices", "Choices", [show_table(table) for table in _choice_tables(report)]),
        section("models", "Models", show_table(_model_table(report))),
    ]
    links = [("result", "Result"), ("choices", "Choices"), ("models", "Models")]
    learned = [f"{report.num_train:,} training images"] if report.num_train else []
    lead = [report.task, *learned, f"{report.num_test:,} test images", report.metric.heading]
    write_text(path, page_text(title, lead, links, sections, environment_block("Settings", report.settings)))
    return Path(path)


def _result_table(report: TaskReport) -> Table:
    rows = [
        [
            row.setting,
            row.model,
            (row.score.value, row.score.words(report.metric)),
            (None, "–")
            if row.difference is None
            else (row.difference.value, row.difference.words(report.metric, signed=True)),
        ]
        for row in report.rows
    ]
    note = "In brackets 95 % intervals (bootstrap over test images); differences are paired by image."
    columns = ["setting", "model", report.metric.heading, "difference to the base"]
    return Table(report.task, columns, rows, note=_said(report, note))


def _said(report: TaskReport, note: str) -> str:
    definition = report.metric.definition
    return f"{report.metric.name}: {definition}. {note}"


def _notes(report: TaskReport) -> Markup | None:
    lines = [*report.notes]
    if report.skipped:
        lines.append(f"{len(report.skipped)} images were left out: {', '.join(report.skipped[:10])}")
    return element("ul", [element("li", line) for line in lines]) if lines else None


def _choice_tables(report: TaskReport) -> list[Table]:
    """What was chosen in each row; what was tried for it; figures of classes."""
    names = list(dict.fromkeys(key for row in report.rows for key in row.chosen if not _is_long(row.chosen[key])))
    tables = [
        Table(
            "Chosen",
            ["setting", "model", *names],
            [[row.setting, row.model, *(_cell(row.chosen.get(name)) for name in names)] for row in report.rows],
        )
    ]
    tried = [(row, entry) for row in report.rows for entry in row.chosen.get("tried", ())]
    if tried:
        columns = list(dict.fromkeys(key for _, entry in tried for key in entry))
        rows = [[row.setting, row.model, *(_cell(entry.get(key)) for key in columns)] for row, entry in tried]
        note = "Figures on images that are held out of the training set, or of the test set."
        tables.append(Table("Tried", ["setting", "model", *columns], rows, note=note))
    classes = list(dict.fromkeys(name for row in report.rows for name in row.chosen.get("per_class", {})))
    if classes:
        heads = [f"{row.model}, {row.setting}" if _several(report) else row.model for row in report.rows]
        rows = [[name, *(row.chosen.get("per_class", {}).get(name) for row in report.rows)] for name in classes]
        tables.append(Table("Classes", ["class", *heads], rows, bars=frozenset(heads)))
    return tables


def _several(report: TaskReport) -> bool:
    return len({row.setting for row in report.rows}) > 1


def _is_long(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value)
    )


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " × ".join(map(str, value))
    return str(value) if isinstance(value, bool) else value


def _model_table(report: TaskReport) -> Table:
    names = list(dict.fromkeys(key for about in report.models.values() for key in about))

    def words(value: Any) -> Any:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {'yes' if held else 'no'}" for key, held in value.items())
        return value

    rows = [[name, *(words(about.get(key)) for key in names)] for name, about in report.models.items()]
    return Table(
        "Models",
        ["model", *(name.replace("_", " ") for name in names)],
        rows,
        note="norm: whether tokens go through the final LayerNorm.",
    )


def _interval_chart(report: TaskReport) -> Markup:
    """Every row as a dot with its interval, settings one below the other."""
    width, left, right, step, top = 640, 260, 24, 22, 10
    rows = report.rows
    low, high = _limits([row.score for row in rows])
    bottom = top + step * len(rows) + 6
    factor = 100 if report.metric.percent else 1

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (width - left - right), 2)

    shown: list[Markup] = [_line(left, bottom, width - right, bottom, "axis")]
    for tick in _ticks(low, high):
        words = element("text", f"{factor * tick:.4g}", x=across(tick), y=bottom + 16, text_anchor="middle")
        shown += [_line(across(tick), top, across(tick), bottom, "grid"), words]
    base = rows[0].model
    for place, row in enumerate(rows):
        y = top + step * (place + 0.5)
        kind = "dot" if row.model == base else "dot outlier"
        name = _shortened(f"{row.setting} · {row.model}")
        shown += [
            element("text", name, x=left - 8, y=y + 4, text_anchor="end"),
            _line(across(row.score.low), y, across(row.score.high), y, "axis"),
            element("circle", cx=across(row.score.value), cy=y, r=4, class_=kind),
        ]
    label = f"{report.metric.name} with intervals: {'; '.join(_in_words(report, row) for row in rows)}"
    svg = element("svg", shown, viewBox=f"0 0 {width} {bottom + 22}", role="img", aria_label=label, class_="chart")
    return element("figure", svg, element("figcaption", f"{report.metric.heading}, 95 % intervals"))


def _in_words(report: TaskReport, row: TaskRow) -> str:
    return f"{row.setting}, {row.model}: {row.score.words(report.metric)}"


def _limits(scores: Sequence[Score]) -> tuple[float, float]:
    ends = [end for score in scores for end in (score.low, score.high, score.value) if math.isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    pad = 0.05 * (high - low) or 0.05
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Round values, six at most."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _shortened(words: str, most: int = 40) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"
