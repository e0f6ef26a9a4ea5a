"""Several runs of the demo, with one seed each, as one table of means and ranges."""

from __future__ import annotations

from statistics import fmean
from typing import Any

__all__ = ["combine_runs"]


def combine_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs have in common.

    Args:
        runs: What each seed gave, in the form of ``demo.json``.

    Returns:
        ``rows``: arms of any run, with the mean of each number over the runs that have it, and ``ranges`` of its least
        and largest value; ``runs``; and of the first run the sizes, which depend on no seed.
    """
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            arms.setdefault(row["arm"], []).append(row)
    return {
        "rows": [_combine_rows(rows) for rows in arms.values()],
        "eval_images": runs[0]["eval_images"],
        "trains_head": runs[0]["trains_head"],
        "adapter_bytes": runs[0]["adapter_bytes"],
        "reload_identical": all(run["reload_identical"] for run in runs),
        "runs": runs,
    }


def _combine_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    combined: dict[str, Any] = {"arm": rows[0]["arm"], "name": rows[0]["name"], "num_seeds": len(rows), "ranges": {}}
    for key in rows[0].keys() - {"arm", "name"}:
        values = [row[key] for row in rows if row[key] is not None]
        combined[key] = fmean(values) if values else None
        if values:
            combined["ranges"][key] = [min(values), max(values)]
    return combined
