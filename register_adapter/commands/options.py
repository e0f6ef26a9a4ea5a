"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "BatchSize",
    "Device",
    "Images",
    "LabelledImages",
    "MaxImages",
    "Model",
    "NumRegisters",
    "OutputDir",
    "Quiet",
    "Rule",
    "Seed",
    "Strict",
]

Model = Annotated[
    str,
    typer.Argument(
        help="Model: a folder or a name on the Hub; hf-hub:NAME or local-dir:FOLDER for OpenCLIP; grown, grown-tiles, "
        "planted or clean for what is packaged."
    ),
]
Images = Annotated[
    str, typer.Argument(help="Folder of images, with its sub-folders; scenes, mosaics or tiles for drawn ones.")
]
LabelledImages = Annotated[
    str,
    typer.Argument(help="Folder of images, one sub-folder per class; scenes for images that the package draws."),
]
OutputDir = Annotated[str, typer.Option("--output-dir", "--out", help="Folder to write into.")]
Rule = Annotated[
    str, typer.Option(help="Which patch tokens are outliers: auto, mixture, fixed:150, sigma:3, mad:6, and others.")
]
NumRegisters = Annotated[int, typer.Option(min=1, help="Number of registers.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
MaxImages = Annotated[int | None, typer.Option(min=1, help="Use at most this many images.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="Where to run; default: a GPU if there is one.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse bad images instead of skipping them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print neither progress nor tables.")]
