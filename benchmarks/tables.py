"""Reports that grow row by row; figures over seeds in a cell, and lines between two comments of a Markdown file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["cell", "merge_rows", "put_between", "read_rows", "row_key", "write_report"]


def cell(values: Iterable[float], digits: int, factor: float = 1.0) -> str:
    """Mean, and the range over the seeds where there is one."""
    scaled = [value * factor for value in values]
    low, high = (f"{value:.{digits}f}" for value in (min(scaled), max(scaled)))
    mean = f"{fmean(scaled):.{digits}f}"  # sum() rounds in another way since Python 3.12
    return mean if low == high else f"{mean} ({low}…{high})"


def put_between(page: Path, name: str, lines: Iterable[str]) -> None:
    """Write lines between ``<!-- name: … -->`` and ``<!-- /name -->``; the other text of the page stays.

    Raises:
        ValueError: The page lacks one of the comments.
    """
    text = page.read_text("utf-8")
    start, end = text.find(f"<!-- {name}:"), text.find(f"<!-- /{name} -->")
    if start < 0 or end < start:
        raise ValueError(f"{page} must have the comments <!-- {name}: ... --> and <!-- /{name} -->")
    start = text.index("-->", start) + 3
    page.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:], "utf-8")


def read_rows(path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a report has already; none if there is no report.

    Raises:
        SystemExit: They are of another config.
    """
    if not path.is_file():
        return []
    before = json.loads(path.read_text("utf-8"))
    if before["config"] != config:
        raise SystemExit(f"{path} has rows of another config, {before['config']}; name another file with --out")
    return list(before["rows"])


def row_key(row: dict[str, Any]) -> tuple[str, str, int]:
    """What tells the rows of a report apart: arm (or variant), model and seed."""
    return row["arm"] if "arm" in row else row["variant"], row["model"], row["seed"]


def merge_rows(paths: Iterable[Path], config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of several reports; where two are of one case, that of the later report.

    Raises:
        SystemExit: A report is of another config.
    """
    return list({row_key(row): row for path in paths for row in read_rows(path, config)}.values())


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report whole, or leave the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    new.replace(path)
