"""The command ``register-adapter demo``: its flags, and the table it prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import make_console, print_result, silence_libraries

__all__ = ["demo_command", "print_demo", "register"]

#: Columns that may be empty, and how their numbers are written.
_FORMATS = {"accuracy": ".1%", "patch_drift": ".4f", "cls_drift": ".4f"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo_command)


def demo_command(
    output_dir: options.OutputDir = "demo",
    model: Annotated[str | None, typer.Option(help="Your model: name on the Hub, or folder.")] = None,
    images: Annotated[str | None, typer.Option(help="Your images: a folder with one sub-folder per class.")] = None,
    num_registers: options.NumRegisters = 4,
    max_train_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 150,
    batch_size: options.BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.01,
    num_eval_images: Annotated[int, typer.Option(min=2, help="Held-out images, at most.")] = 256,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train registers on a model with artifacts, and measure before and after.

    Writes adapters, a figure and demo.json. Without --model and --images it runs on the small ViT with planted
    artifacts that the package ships.
    """
    silence_libraries(quiet)
    from .runs.demo import DemoArguments, run_demo

    arguments = DemoArguments(
        output_dir=output_dir,
        model=model,
        images=images,
        num_registers=num_registers,
        max_train_steps=max_train_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        num_eval_images=num_eval_images,
        seed=seed,
        progress=not quiet,
    )
    report = run_demo(arguments)
    print_result(report, lambda: print_demo(report, output_dir), as_json=as_json, quiet=quiet)


def print_demo(report: dict[str, Any], output_dir: str) -> None:
    """Print the demo's table, what it says, and where its files are."""
    from rich.table import Table

    table = Table(title=f"{report['arguments']['num_eval_images']} held-out images")
    table.add_column("model")
    for heading in ("outlier patches", "largest norm / median", "accuracy", "patch drift", "CLS drift"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["name"],
            f"{row['outlier_share']:.2%}",
            f"{row['largest_norm']:.1f}",
            *(_number(row[key], form) for key, form in _FORMATS.items()),
        )
    console = make_console()
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
