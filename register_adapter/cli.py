"""The command line: ``register-adapter``."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Run ``register-adapter``; every error of the package's own ends as one line, without a traceback."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the command line needs typer and rich: pip install 'register-adapter[cli]'")
    from .errors import RegisterAdapterError

    try:
        _app()()
    except (RegisterAdapterError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _app() -> Any:
    import typer

    app = typer.Typer(
        help="Register tokens for vision transformers.", no_args_is_help=True, pretty_exceptions_enable=False
    )

    @app.callback()
    def version_callback() -> None:
        """Register tokens for vision transformers."""

    @app.command()
    def version() -> None:
        """Print the version."""
        from . import __version__

        typer.echo(__version__)

    @app.command()
    def demo(
        output_dir: str = typer.Option(
            "demo", "--output_dir", "--out", help="Folder for adapter, figure and demo.json."
        ),
        model: str | None = typer.Option(None, help="Your model: name on the Hub, or folder."),
        images: str | None = typer.Option(None, help="Your pictures: a folder with one sub-folder a class."),
        num_registers: int = typer.Option(4, "--num_registers", min=1, help="Number of registers."),
        max_train_steps: int = typer.Option(150, "--max_train_steps", min=1, help="Optimiser steps."),
        batch_size: int = typer.Option(32, "--batch_size", min=1, help="Pictures a step."),
        learning_rate: float = typer.Option(0.01, "--learning_rate", help="Peak learning rate."),
        num_eval_images: int = typer.Option(256, "--num_eval_images", min=2, help="Held-out pictures, at most."),
        seed: int = typer.Option(0, help="Seed of everything random."),
    ) -> None:
        """Train registers on a model with artifacts; measure before and after.

        Without --model and --images it runs on the small ViT with planted artifacts that the package ships.
        """
        import warnings

        from transformers.utils import logging

        # PEFT reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        from .demo import DemoArguments, run_demo

        logging.disable_progress_bar()
        report = run_demo(
            DemoArguments(
                output_dir,
                model,
                images,
                num_registers,
                max_train_steps,
                batch_size,
                learning_rate,
                num_eval_images,
                seed,
            )
        )
        _print(report, output_dir)

    @app.command()
    def audit(
        model: str = typer.Argument(help="Model: folder, name on the Hub; planted or clean for the shipped ViT."),
        images: str = typer.Argument(help="Folder of pictures, with those below it; scenes for made ones."),
        output_dir: str = typer.Option(
            "report", "--output_dir", "--out", help="Folder for audit.json and the page index.html."
        ),
        adapter: list[str] | None = typer.Option(  # noqa: B008 - typer's way
            None, help="Folder or name of an adapter; may be given several times."
        ),
        rule: str = typer.Option("auto", help="Rule for outliers, such as auto, mixture, fixed:150, sigma:3, mad:6."),
        attentions: bool = typer.Option(True, help="Sum attention maps; without them it is faster."),
        batch_size: int = typer.Option(32, "--batch_size", min=1, help="Pictures a batch."),
        max_images: int | None = typer.Option(None, "--max_images", min=1, help="Use the first so many pictures."),
        device: str | None = typer.Option(None, help="Where to run; default a GPU if there is one."),
        strict: bool = typer.Option(False, "--strict", help="Refuse bad pictures instead of skipping them."),
    ) -> None:
        """Find out whether a model has artifacts, with and without adapters: a table, audit.json and a page.

        Try it on what the package ships: register-adapter audit planted scenes
        """
        import warnings

        from transformers.utils import logging

        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        from .audit_command import AuditArguments, print_reports, run_audit

        logging.disable_progress_bar()
        arguments = AuditArguments(
            model, images, output_dir, adapter or (), rule, attentions, batch_size, max_images, device, strict
        )
        reports, no_pictures = run_audit(arguments)
        print_reports(reports, output_dir, no_pictures)

    @app.command()
    def export(
        adapter: str = typer.Argument(help="Folder of the adapter, or its name on the Hub."),
        base: str | None = typer.Option(None, help="Base model: folder or name; default the one the adapter names."),
        out: str = typer.Option(..., "--output_dir", "--out", help="Folder for the result."),
        form: str = typer.Option("native", "--format", help="native, onnx or program (torch.export)."),
        image_size: int | None = typer.Option(
            None, "--image_size", min=1, help="Side of the pictures in pixels; default the model's own."
        ),
    ) -> None:
        """Write a model with its trained registers for people who do not have this package.

        native: a plain transformers or timm model with registers. onnx, program: a graph for one picture size.
        """
        import warnings

        from transformers.utils import logging

        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        from .export import export_saved

        logging.disable_progress_bar()
        typer.echo(export_saved(adapter, out, form, base, image_size))

    @app.command()
    def families(
        full: bool = typer.Option(False, "--full", help="One line a family, with where registers enter and leave."),
        into: str | None = typer.Option(None, "--into", help="A document to put the table into, such as README.md."),
    ) -> None:
        """Print the supported models as a Markdown table."""
        from .supported import full_table, short_table, write_table

        table = full_table() if full else short_table()
        if into is None:
            typer.echo(table)
        else:
            write_table(into, table)

    return app


def _print(report: dict[str, Any], output_dir: str) -> None:
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
        f"Written to {output_dir}: adapter/, before_after.png, demo.json"
    )


_FORMATS = {"accuracy": ".1%", "patch_drift": ".4f", "cls_drift": ".4f"}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence on what trained registers did to the outliers, measured against the untrained control."""
    before, control, after = (row["outlier_share"] for row in rows[-3:])
    if before == 0:
        return "No outlier patches were found before; there was nothing to repair."
    left = after / before
    said = f"Trained registers leave {left:.0%} of the outlier patches, random ones {control / before:.0%}."
    if left > 0.05:
        said += " Registers alone do not repair this model fully."
    return said


if __name__ == "__main__":
    main()
