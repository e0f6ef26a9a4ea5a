"""The command ``register-adapter demo``: its flags, and the table it prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import make_console, print_result, silence_libraries

__all__ = ["demo_command", "print_demo", "register"]

#: Columns, and how their numbers are written.
_FORMATS = {"outlier_share": ".2%", "largest_norm": ".1f", "accuracy": ".1%", "patch_drift": ".4f", "cls_drift": ".4f"}


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
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs, with one seed after the other.")] = 1,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train registers on a model with artifacts, and measure before and after.

    Writes adapters, a figure and demo.json. With --seeds 3 everything is done three times, and the table shows mean
    and range. Without --model and --images it runs on the small ViT with planted artifacts that the package ships.
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
        seeds=seeds,
        progress=not quiet,
    )
    report = run_demo(arguments)
    print_result(report, lambda: print_demo(report, output_dir), as_json=as_json, quiet=quiet)


def print_demo(report: dict[str, Any], output_dir: str) -> None:
    """Print the demo's table, what it says, and where its files are."""
    from rich.table import Table

    runs = report.get("runs", [report])
    counts = " or ".join(str(count) for count in sorted({run["eval_images"] for run in runs}))
    first = report["arguments"]["seed"]
    seeds = f"seeds {first} to {first + len(runs) - 1}: mean (least to largest)" if len(runs) > 1 else f"seed {first}"
    table = Table(title=f"{counts} held-out images, {seeds}")
    table.add_column("model")
    for heading in ("outlier patches", "largest norm / median", "accuracy", "patch drift", "CLS drift"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        table.add_row(row["name"], *(_number(row, key, form) for key, form in _FORMATS.items()))
    console = make_console()
    console.print(table)
    console.print(
        "Outliers: patch tokens over 3 times the median L2 norm, last block, before the final LayerNorm. "
        "Drift: mean of 1 - cosine to the first line, at the same place.",
        style="dim",
    )
    if report["trains_head"]:
        console.print(
            "Accuracy: the head is trained in every line, with the registers where these are trained, otherwise "
            "without any.",
            style="dim",
        )
    console.print(_verdict(runs))
    if len(runs) == 1:
        console.print("This is one seed; trained lines differ with seed and CPU. --seeds 3 shows by how much.")
    console.print(
        f"Adapter: {report['adapter_bytes'] / 1000:.1f} kB, loaded again in a fresh process with identical outputs.\n"
        f"Written to {output_dir}: {', '.join(report['written'])}"
    )


def _number(row: dict[str, Any], key: str, form: str) -> str:
    """A value, with its range over the seeds where there are several; ``-`` where it was not measured."""
    if row[key] is None:
        return "-"
    least, largest = (f"{value:{form}}" for value in row.get("ranges", {}).get(key, (row[key], row[key])))
    return f"{row[key]:{form}}" + (f" ({least} to {largest})" if least != largest else "")


def _verdict(runs: list[dict[str, Any]]) -> str:
    """What each arm leaves of the outliers, beside what the untrained control leaves, over all seeds."""
    left: dict[str, list[float]] = {}
    for run in runs:
        shares = {row["arm"]: row["outlier_share"] for row in run["rows"]}
        if shares["before"] == 0:
            return "No outlier patches were found before; there was nothing to repair."
        for arm, share in shares.items():
            left.setdefault(arm, []).append(share / shares["before"])
    said = f"Of the outlier patches, trained registers leave {_span(left['trained'])}, random ones "
    said += _span(left["control"])
    if "test_time" in left:
        said += f", the test-time register {_span(left['test_time'])}, both {_span(left['both'])}"
    said += "."
    if max(left["trained"]) > 0.05:
        said += " Trained registers alone do not repair this model fully."
    return said


def _span(shares: list[float]) -> str:
    least, largest = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return least if least == largest else f"{least} to {largest}"
