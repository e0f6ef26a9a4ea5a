"""The repair benchmark's rows as tables in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import cell, put_between

__all__ = ["write_table"]

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


def _table(rows: list[dict[str, Any]]) -> list[str]:
    arms = dict.fromkeys(row["arm"] for row in rows)
    headings = ["arm", *(heading for heading, *_ in _COLUMNS), "trained parameters", "seconds", "seeds", "steps", "on"]
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join(['---'] * len(headings))} |"]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        cells = [cell((row[key] for row in mine), digits, factor) for _, key, factor, digits in _COLUMNS]
        seconds = cell((row["seconds"] for row in mine), 0)
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
    put_between(path, "repair", ["", *parts])
