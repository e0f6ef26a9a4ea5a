"""The command ``register-adapter audit``: its flags, and the table it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import collect_skipped, make_console, print_result, print_skipped, print_table, silence_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from ..artifacts import ArtifactReport, LayerReport, SinkReport

__all__ = ["audit_command", "print_reports", "register"]


_HEADINGS = (
    *("layer", "median\nnorm", "largest /\nmedian", "outlier\npatches", "threshold"),
    *("attention\nto\noutliers", "attention\nto few\npatches"),
)
_SINKS = ("block", "tokens", "heads", "sinks\nper image", "attention", "value\nratio", "stable\nrank")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit")(audit_command)


def audit_command(
    model: options.Model,
    images: options.Images,
    output_dir: options.OutputDir = "report",
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folder or name of an adapter; may be given several times.")
    ] = None,
    rule: options.Rule = "auto",
    attentions: Annotated[bool, typer.Option(help="Sum attention maps; without them it is faster.")] = True,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Tell attention sinks by their kind, head by head; slower.")
    ] = False,
    batch_size: options.BatchSize = 32,
    max_images: options.MaxImages = None,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out whether a model has artifacts, with and without adapters: a table, audit.json and a page.

    Try it on what the package ships: register-adapter audit planted scenes
    """
    silence_libraries(quiet)
    from .runs.audit import AuditArguments, run_audit
    from .runs.launched import is_main_process

    arguments = AuditArguments(
        model=model,
        images=images,
        output_dir=output_dir,
        adapters=adapter or (),
        rule=rule,
        attentions=attentions,
        sinks=sinks,
        batch_size=batch_size,
        max_images=max_images,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    with collect_skipped() as skipped:
        reports, no_images = run_audit(arguments)
    if not is_main_process():
        return
    # Those of all processes, where there are several.
    print_skipped(reports[0].environment.get("skipped") or skipped, f"{output_dir}/audit.json")
    print_result(
        {"reports": [report.to_dict() for report in reports]},
        lambda: print_reports(reports, output_dir, no_images),
        as_json=as_json,
        quiet=quiet,
    )


def print_reports(reports: list[ArtifactReport], output_dir: str, no_images: str | None = None) -> None:
    """Print a table for each report, and its verdict."""
    console = make_console()
    for report in reports:
        title = f"{report.name}: {report.num_images} images, rule {report.rule}"
        bold = [layer.threshold.separated and layer.layer > 0 for layer in report.layers]
        print_table(console, title, _HEADINGS, [_cells(layer) for layer in report.layers], bold)
        console.print(f"Verdict: {report.summary}", style="bold")
        console.print(report.reason)
        if skipped := report.environment.get("skipped"):
            console.print(f"{len(skipped)} bad images were skipped; audit.json names them.")
        if report.sinks is not None:
            _print_sinks(console, report.name, report.sinks)
    console.print(
        "L2 norms of patch tokens, before the final LayerNorm; layer 0 is the input of the first block and decides "
        "nothing. Attention: mean over heads and queries, in the block that reads the layer; to few patches: to those "
        "that receive at least five times an even share each.",
        style="dim",
    )
    if no_images:
        console.print(f"The page has no images: {no_images}")
    console.print(f"Written to {output_dir}: audit.json, index.html")


def _print_sinks(console: Console, name: str, sinks: SinkReport) -> None:
    from ..artifacts.sink_report import TOKEN_NAMES

    if rows := sinks.by_block():
        cells = [
            (
                *(str(row.block), TOKEN_NAMES[row.token], row.words, f"{row.sinks.per_image:.2f}"),
                *(f"{row.sinks.attention:.1%}", f"{row.sinks.value_ratio:.2g}", f"{row.sinks.stable_rank:.2f}"),
            )
            for row in rows
        ]
        print_table(console, f"{name}: attention sinks", _SINKS, cells)
    console.print(sinks.summary, style="bold")
    for advice in sinks.advice:
        console.print(advice)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    quantiles = layer.norms["patch"].quantiles
    median = quantiles["0.5"]
    limits = [f"> {layer.threshold.high:.4g}"] if layer.threshold.high != float("inf") else []
    limits += [f"< {layer.threshold.low:.4g}"] if layer.threshold.low else []
    attention = "-"
    if layer.attention is not None:
        shares = layer.attention.from_all["outlier"]
        attention = f"{sum(shares) / len(shares):.1%}"
    gathered = "-" if layer.gathered is None else f"{layer.gathered.attention:.1%}"
    return (
        str(layer.layer),
        f"{median:.4g}",
        f"{quantiles['1'] / max(median, 1e-30):.2f}",
        f"{layer.outlier_share:.2%}",
        ", ".join(limits) or "-",
        attention,
        gathered,
    )
