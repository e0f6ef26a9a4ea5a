"""What the demo prints."""

from __future__ import annotations

from typing import Any

__all__ = ["print_demo"]


def print_demo(report: dict[str, Any], output_dir: str) -> None:
    """Print the demo's table, what it says, and where its files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['arguments']['num_eval_images']} held-out pictures")
    table.add_column("model")
    headings = ("outlier patches", "largest norm / median", "accuracy", "patch drift", "CLS drift")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["name"],
            f"{row['outlier_share']:.2%}",
            f"{row['largest_norm']:.1f}",
            *(_number(row[key], form) for key, form in _FORMATS.items()),
        )
    console = Console()
    console.print(table)
    console.print(
        "Outliers: patch tokens over 3 times the median L2 norm, last block, before the final LayerNorm. "
        "Drift: mean of 1 - cosine to the first line, at the same place.",
        style="dim",
    )
    console.print(_verdict(report["rows"]))
    console.print(
        f"Adapter: {report['adapter_bytes'] / 1000:.1f} kB, loaded again in a fresh process with identical outputs.\n"
        f"Written to {output_dir}: {', '.join(report['written'])}"
    )


_FORMATS = {"accuracy": ".1%", "patch_drift": ".4f", "cls_drift": ".4f"}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(rows: list[dict[str, Any]]) -> str:
    """What each arm leaves of the outliers, beside what the untrained control leaves."""
    shares = {row["arm"]: row["outlier_share"] for row in rows}
    before = shares["before"]
    if before == 0:
        return "No outlier patches were found before; there was nothing to repair."
    left = {arm: share / before for arm, share in shares.items()}
    said = f"Of the outlier patches, trained registers leave {left['trained']:.0%}, random ones {left['control']:.0%}"
    if "test_time" in left:
        said += f", the test-time register {left['test_time']:.0%}, both {left['both']:.0%}"
    said += "."
    if left["trained"] > 0.05:
        said += " Trained registers alone do not repair this model fully."
    return said
