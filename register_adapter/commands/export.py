"""The command ``register-adapter export``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .output import echo, print_result, silence_libraries

__all__ = ["export_command", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export_command)


def export_command(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter, or its name on the Hub.")],
    output_dir: options.OutputDir,
    base: Annotated[
        str | None, typer.Option(help="Base model: folder or name; default: the one that the adapter names.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="native, onnx or program (torch.export).", metavar="FORMAT")
    ] = "native",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels; default: the model's own.")
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model with its trained registers for people who do not have this package.

    native: a plain transformers or timm model with registers. onnx, program: a graph for one image size.
    """
    silence_libraries(quiet)
    from .. import testbed  # noqa: F401 - says how shipped models, which an adapter may name, are made
    from ..export.saved import export_saved

    written = export_saved(adapter, output_dir, form, base, image_size)
    print_result(
        {"format": form, "output_dir": output_dir, "written": written},
        lambda: echo(str(written)),
        as_json=as_json,
        quiet=quiet,
    )
