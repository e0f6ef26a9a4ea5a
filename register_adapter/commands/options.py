"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

__all__ = [
    "AsJson",
    "BatchSize",
    "Device",
    "ImageSize",
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
    "TransformersModel",
]


def _image_size(given: str) -> int | tuple[int, int]:
    """``"224"`` or ``"224x336"``, height before width."""
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", given) is None:
        raise typer.BadParameter(f"{given!r} is no size; give a side, such as 224, or a height and a width, 224x336")
    sides = tuple(map(int, given.split("x")))
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


Model = Annotated[
    str,
    typer.Argument(
        help="Model: a folder or a name on the Hub; hf-hub:NAME or local-dir:FOLDER for OpenCLIP; grown, grown-tiles, "
        "planted or clean for what is packaged."
    ),
]
TransformersModel = Annotated[
    str,
    typer.Argument(
        help="Model of transformers: a folder or a name on the Hub; grown, grown-tiles, planted or clean for what is "
        "packaged."
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
ImageSize = Annotated[
    Any,
    typer.Option(
        parser=_image_size,
        metavar="<int or HxW>",
        help="segmentation, depth, discovery: side that images are resized to (discovery: the shorter one), or height "
        "and width, such as 224x224.",
    ),
]
Rule = Annotated[
    str, typer.Option(help="Which patch tokens are outliers: auto, mixture, fixed:150, sigma:3, mad:6, and others.")
]
NumRegisters = Annotated[int, typer.Option(min=1, help="Number of registers.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
MaxImages = Annotated[int | None, typer.Option(min=1, help="Use at most this many images.")]
# Libraries differ in the largest seed they take; runs with several add to it.
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="Where to run; default: a GPU if there is one.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse bad images instead of skipping them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print neither progress nor tables.")]
