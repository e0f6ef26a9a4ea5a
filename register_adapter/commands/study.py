"""The command ``register-adapter study``: its flags, and the table it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import collect_skipped, echo, make_console, print_result, print_skipped, print_table, silence_libraries

if TYPE_CHECKING:
    from ..studies import StudyResult

__all__ = ["print_study", "register", "study_command"]


#: Figures of the table and their headings; the page has all of them.
_SHOWN = {"verdict": "audit", "outlier_share": "outliers", "attention_on_outliers": "attention\non them"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("study")(study_command)


def study_command(
    model: options.TransformersModel,
    images: options.Images,
    output_dir: options.OutputDir = "study",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of 16 images of every training.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs, with one seed after the other.")] = 1,
    seed: options.Seed = 0,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="Make this arm only; may be given several times. Default: all.")
    ] = None,
    training: Annotated[bool, typer.Option(help="Make the arms that are trained, too.")] = True,
    rule: options.Rule = "auto",
    max_images: Annotated[int, typer.Option(min=12, help="Use at most this many images, at random.")] = 512,
    batch_size: options.BatchSize = 16,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out whether a model has artifacts, what repairs it and at what cost, and which of it to take.

    An audit, fits, short trainings without labels, and controls, measured on held-out images: a table, study.json and
    a page with the command that follows. Started again it goes on where it stopped.

    Try it on what the package ships: register-adapter study grown mosaics
    """
    silence_libraries(quiet)
    from .runs.study import StudyArguments, run_study

    arguments = StudyArguments(
        model=model,
        images=images,
        output_dir=output_dir,
        steps=steps,
        seed=seed,
        seeds=seeds,
        arms=arms,
        training=training,
        rule=rule,
        max_images=max_images,
        batch_size=batch_size,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    with collect_skipped() as skipped:
        result = run_study(arguments)
    print_skipped(skipped, f"{output_dir}/study.json")
    print_result(result.to_dict(), lambda: print_study(result, output_dir), as_json=as_json, quiet=quiet)


def print_study(result: StudyResult, output_dir: str) -> None:
    """Print the table of arms, what to do, and the commands that do it."""
    console = make_console()
    shown = {**_SHOWN, **({"task": str(result.task)} if result.task else {})}
    made = [row for row in result.rows if row["why_not"] is None]
    parts, seeds = result.values["parts"], result.values["seeds"]
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}: mean (least to largest)"
    print_table(
        console,
        f"{result.values['model']}: {parts['report']} held-out images, {said}",
        ["arm", *shown.values()],
        [[row["name"], *(result.cell(row, name) for name in shown)] for row in made],
        [row["name"] == result.arm for row in made],
    )
    for row in result.rows:
        if row["why_not"] is not None:
            console.print(f"{row['name']}: not made; {row['why_not']}", style="dim")
    console.print(f"Verdict: {result.verdict}", style="bold")
    console.print(f"What to do: {result.headline}", style="bold")
    for reason in result.reasons:
        console.print(reason)
    for command in result.commands:
        echo(f"  {command}")
    if result.adapter is not None:
        console.print(f"The adapter of this study is in {result.adapter}")
    console.print(
        "Outliers: patches, by L2 norms before the final LayerNorm, in the block with most; attention: to where the "
        "model as it is has them. The page has more figures, and definitions.",
        style="dim",
    )
    console.print(f"Written to {output_dir}: study.json, index.html, arms/")
