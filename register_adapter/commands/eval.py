"""The command ``register-adapter eval``: its flags, and the table it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import collect_skipped, make_console, print_result, print_skipped, print_table, silence_libraries

if TYPE_CHECKING:
    from ..evaluation import TaskReport

__all__ = ["eval_command", "print_task", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(eval_command)


def eval_command(
    task: Annotated[
        str, typer.Argument(help="Task: knn, linear, segmentation, depth, zero-shot or discovery.", show_default=False)
    ],
    model: options.Model,
    data: Annotated[
        str, typer.Argument(help="Folder with the task's data, see docs/evaluation.md; scenes for drawn images.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folder or name of an adapter, measured beside the model; repeatable.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", "--out", help="Folder for eval.json and index.html.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(min=1, help="knn: neighbours; repeatable. [10, 20, 100, 200]")] = None,
    temperature: Annotated[float, typer.Option(help="knn: temperature of the votes.")] = 0.07,
    feature: Annotated[str, typer.Option(help="knn: cls, mean, cls+mean, or auto.")] = "auto",
    head: Annotated[str, typer.Option(help="depth: bins or ridge.")] = "bins",
    size: options.ImageSize = None,
    classes: Annotated[str | None, typer.Option(help="zero-shot: JSON, from folders to names of classes.")] = None,
    templates: Annotated[str | None, typer.Option(help="zero-shot: file of prompts with {} for the name.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="zero-shot: folder or name of a tokenizer; default: the model's own.")
    ] = None,
    annotations: Annotated[str | None, typer.Option(help="discovery: COCO annotation file.")] = None,
    split: Annotated[str, typer.Option(help="discovery: list of images of a VOC devkit.")] = "trainval",
    features: Annotated[
        str, typer.Option(help="discovery: keys, queries, values or tokens, in the rows of reference settings.")
    ] = "keys",
    sweep: Annotated[
        bool, typer.Option("--sweep/--no-sweep", help="discovery: settings chosen on held-out images too.")
    ] = True,
    store: Annotated[
        str | None,
        typer.Option(help="Folder for features, which are then computed once; not for zero-shot, discovery."),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images of each set, at random.")
    ] = None,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model and its adapters on a downstream task, side by side.

    Try it on what the package ships: register-adapter eval knn planted scenes --out report
    """
    silence_libraries(quiet)
    from .runs.tasks import RESULT, EvalArguments, run_eval

    arguments = EvalArguments(
        task=task,
        model=model,
        data=data,
        adapters=adapter or (),
        output_dir=output_dir,
        k=k or (10, 20, 100, 200),
        temperature=temperature,
        feature=feature,
        head=head,
        size=size,
        classes=classes,
        templates=templates,
        tokenizer=tokenizer,
        annotations=annotations,
        split=split,
        features=features,
        sweep=sweep,
        store=store,
        max_images=max_images,
        batch_size=batch_size,
        seed=seed,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    with collect_skipped() as skipped:
        report = run_eval(arguments)
    print_skipped(skipped, f"{output_dir}/{RESULT}" if output_dir else None)
    print_result(report.to_dict(), lambda: print_task(report, output_dir), as_json=as_json, quiet=quiet)


def print_task(report: TaskReport, output_dir: str | None = None) -> None:
    """Print the table of an evaluation, and where it is written."""
    console = make_console()
    learned = f"{report.num_train} training images, " if report.num_train else ""
    title = f"{report.task}: {learned}{report.num_test} test images"
    print_table(console, title, report.header, report.cells())
    for note in [*report.choices(), *report.notes]:
        console.print(note)
    console.print(
        "In brackets 95 % intervals (bootstrap over test images); differences are paired by image.", style="dim"
    )
    if output_dir is not None:
        console.print(f"Written to {output_dir}: eval.json, index.html")
