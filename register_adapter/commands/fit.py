"""The command ``register-adapter fit``: its flags, and what it prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import (
    collect_skipped,
    echo,
    make_console,
    name_flags,
    print_result,
    print_skipped,
    silence_libraries,
)

__all__ = ["fit_command", "print_fit", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fit")(fit_command)


def fit_command(
    model: options.Model,
    images: options.Images,
    output_dir: options.OutputDir,
    num_registers: options.NumRegisters = 1,
    remove: Annotated[
        str, typer.Option(help="What other tokens keep: zero, mean, or outliers (only those are removed).")
    ] = "zero",
    attention_bias: Annotated[
        bool, typer.Option("--attention-bias", help="Constant keys and values in place of a token.")
    ] = False,
    gate: Annotated[
        float | None, typer.Option(help="Bias on the registers' attention logits; -1e9 hides the registers.")
    ] = None,
    rule: options.Rule = "auto",
    threshold: Annotated[
        float | None, typer.Option(help="Norm of an outlier behind --top-block, instead of a rule.")
    ] = None,
    top_block: Annotated[int | None, typer.Option(min=0, help="Last block with register neurons.")] = None,
    num_neurons: Annotated[int | None, typer.Option(min=1, help="How many neurons; default: chosen.")] = None,
    image_sizes: Annotated[
        list[int] | None, typer.Option(min=1, help="Side to resize images to; several are pooled.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=3, help="Use at most this many images; default: all.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch; default: 32, and 8 on a CPU.")
    ] = None,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Repair a model without training: find its register neurons, and move what they do to a register.

    Try it on what the package ships: register-adapter fit planted scenes --out fitted
    """
    silence_libraries(quiet)
    from ..errors import NoArtifactsError
    from .runs.fit import FitArguments, how_to_load, run_fit, write_skipped
    from .runs.launched import is_main_process

    arguments = FitArguments(
        model=model,
        images=images,
        output_dir=output_dir,
        num_registers=num_registers,
        remove=remove,
        attention_bias=attention_bias,
        gate=gate,
        rule=rule,
        threshold=threshold,
        top_block=top_block,
        num_neurons=num_neurons,
        image_sizes=image_sizes or (),
        max_images=max_images,
        batch_size=batch_size,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    try:
        with collect_skipped() as skipped:
            neurons, fit = run_fit(arguments)
    except NoArtifactsError as error:  # good news, and no failure
        if not is_main_process():
            return
        reason = name_flags(str(error), fit_command)
        print_skipped(skipped, None)
        nothing: dict[str, Any] = {"register_neurons": {}, "test_time_fit": None, "reason": reason}
        print_result({**nothing, "skipped": skipped}, lambda: echo(reason), as_json=as_json, quiet=quiet)
        return
    if not is_main_process():
        return
    print_skipped(skipped, write_skipped(skipped, output_dir))
    print_result(
        {"register_neurons": neurons, "test_time_fit": fit, "reason": fit["reason"], "skipped": skipped},
        lambda: print_fit(neurons, fit, output_dir, how_to_load(model, output_dir)),
        as_json=as_json,
        quiet=quiet,
    )


def print_fit(neurons: dict[int, list[int]], fit: dict[str, Any], output_dir: str, loading: str) -> None:
    """Print which neurons were found, and what is left of the outliers by their number."""
    from rich.table import Table

    console = make_console()
    table = Table(title="patches beyond the base's threshold, by number of register neurons (held-out images)")
    table.add_column("neurons", justify="right")
    table.add_column("patches beyond", justify="right")
    for number, share in sorted((int(number), share) for number, share in fit["curve"].items()):
        chosen = number == fit["num_neurons"]
        table.add_row(f"{number}{' *' if chosen else ''}", f"{share:.3%}", style="bold" if chosen else None)
    console.print(table)
    for block, units in neurons.items():
        console.print(f"Block {block}: hidden units {', '.join(map(str, units))}")
    console.print(f"Outliers appear behind block {fit['top_block']} (rule {fit['rule']}). {fit['reason']}")
    console.print(
        "The threshold is the one without registers, behind that block; L2 norms, before the final LayerNorm. "
        "A smaller group may stand apart below it: audit --adapter applies the rule to the model with registers anew.",
        style="dim",
    )
    console.print(f"Written to {output_dir}; {loading}", markup=False)
