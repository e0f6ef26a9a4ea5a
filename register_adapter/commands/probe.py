"""The command ``register-adapter probe``: its flags, and the tables it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import collect_skipped, make_console, print_result, print_skipped, print_table, silence_libraries

if TYPE_CHECKING:
    from ..evaluation import ProbeReport, RegisterReport
    from .runs.probe import Probed

__all__ = ["print_probes", "probe_command", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("probe")(probe_command)


def probe_command(
    model: options.Model,
    images: options.LabelledImages,
    output_dir: options.OutputDir,
    adapter: Annotated[str | None, typer.Option(help="Folder or name of an adapter, to be probed too.")] = None,
    rule: options.Rule = "auto",
    layer: Annotated[
        int, typer.Option(help="Layer: 0 is the input of the first block, -1 the output of the last one.")
    ] = -1,
    min_images: Annotated[int, typer.Option(min=10, help="Fewest images with outliers.")] = 100,
    max_images: Annotated[int | None, typer.Option(min=1, help="Use at most this many images, at random.")] = None,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out what tokens hold (position, pixels, class of the image), and what registers do.

    Writes probes.json, and registers.json if there are registers.
    Try it on what the package ships: register-adapter probe planted scenes --out probes
    """
    silence_libraries(quiet)
    from .runs.probe import ProbeArguments, run_probes, to_dict

    arguments = ProbeArguments(
        model=model,
        images=images,
        output_dir=output_dir,
        adapter=adapter,
        rule=rule,
        layer=layer,
        min_images=min_images,
        max_images=max_images,
        batch_size=batch_size,
        seed=seed,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    with collect_skipped() as skipped:
        probed = run_probes(arguments)
    print_skipped(skipped, f"{output_dir}/probes.json")
    print_result(to_dict(probed), lambda: print_probes(probed, output_dir), as_json=as_json, quiet=quiet)


def print_probes(probed: Sequence[Probed], output_dir: str) -> None:
    """Print a table for each model, and one for its registers."""
    console = make_console()

    def show(title: str, report: ProbeReport | RegisterReport) -> None:
        print_table(console, title, report.header, report.cells())

    for name, probes, registers, note in probed:
        show(f"{name}: {probes.num_images} images, layer {probes.layer} of {probes.num_layers - 1}", probes)
        for row in probes.rows:
            if row.note:
                console.print(f"{row.tokens}: {row.note}")
        if probes.threshold is not None:
            console.print(f"Outliers by the rule {probes.threshold.rule}: {probes.threshold.reason}")
        if probes.skipped:
            console.print(f"{len(probes.skipped)} bad images were skipped; probes.json names them.")
        if registers is None:
            console.print(f"No register analysis: {note}")
            continue
        show(f"{name}: {len(registers.names)} registers, {registers.num_images} images", registers)
        for line in registers.notes:
            console.print(line)
    console.print(
        "Value ± standard error over test images; in brackets the best guess that does not look at the token. "
        "States before the final LayerNorm.",
        style="dim",
    )
    written = "probes.json, registers.json" if any(model.registers for model in probed) else "probes.json"
    console.print(f"Written to {output_dir}: {written}")
