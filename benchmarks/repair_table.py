"""The repair benchmark's rows as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["write_table"]

_BEGIN, _END = "<!-- repair: made by benchmarks/repair.py -->", "<!-- /repair -->"
#: Heading, key of a row, factor and digits.
_COLUMNS = (
    ("outliers, %", "outlier_share", 100, 2),
    ("cosine, planted", "cosine_planted", 1, 3),
    ("cosine, elsewhere", "cosine_other", 1, 3),
    ("accuracy, %", "accuracy", 100, 1),
    ("CLS drift", "cls_drift", 1, 3),
)
#: Short names of machines.
_SHORT = {"NVIDIA H100 80GB HBM3": "H100", "AMD EPYC": "CPU"}


def _cell(values: Iterable[float], factor: float, digits: int) -> str:
    """Mean, and the range over the seeds where there is one."""
    scaled = [value * factor for value in values]
    low, high = (f"{value:.{digits}f}" for value in (min(scaled), max(scaled)))
    mean = f"{sum(scaled) / len(scaled):.{digits}f}"
    return mean if low == high else f"{mean} ({low}…{high})"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    arms = dict.fromkeys(row["arm"] for row in rows)
    headings = ["arm", *(heading for heading, *_ in _COLUMNS), "trained parameters", "seconds", "seeds", "steps", "on"]
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join(['---'] * len(headings))} |"]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        cells = [_cell((row[key] for row in mine), factor, digits) for _, key, factor, digits in _COLUMNS]
        seconds = _cell((row["seconds"] for row in mine), 1, 0)
        cells += [str(mine[0]["parameters"] or ""), seconds, str(len(mine)), *_where(mine)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _where(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Optimiser steps, and what the rows were computed on, each named once."""
    steps, machines = (sorted({row.get(key) or "" for row in rows}, key=str) for key in ("steps", "hardware"))
    return ", ".join(map(str, steps)), ", ".join(_SHORT.get(name, name) for name in machines)


def write_table(report: dict[str, Any], path: Path) -> None:
    """Write the tables between two comments of the file; its other text stays."""
    parts, config = [], report["config"]
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        seeds = sorted({row["seed"] for row in rows})
        twin, before = rows[0]["accuracy_twin"], rows[0]["outlier_share_before"]
        parts += [
            f"### {model}",
            "",
            f"Clean twin: accuracy {twin:.1%}. Outliers before: {before:.2%}. Seeds {', '.join(map(str, seeds))}; "
            f"{config['steps']} steps, or those in the column, of {config['batch']} images; "
            f"{config['images']} held-out images.",
            "",
            *_table(rows),
            "",
        ]
    block = "\n".join([_BEGIN, "", *parts, _END])
    text = path.read_text("utf-8") if path.is_file() else f"# Results\n\n{_BEGIN}\n{_END}\n"
    start, end = text.index(_BEGIN), text.index(_END) + len(_END)
    path.write_text(text[:start] + block + text[end:], "utf-8")
