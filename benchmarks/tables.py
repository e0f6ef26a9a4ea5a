"""Figures over seeds in a cell, and lines between two comments of a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["cell", "put_between"]


def cell(values: Iterable[float], digits: int, factor: float = 1.0) -> str:
    """Mean, and the range over the seeds where there is one."""
    scaled = [value * factor for value in values]
    low, high = (f"{value:.{digits}f}" for value in (min(scaled), max(scaled)))
    mean = f"{sum(scaled) / len(scaled):.{digits}f}"
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
