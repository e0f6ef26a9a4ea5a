"""The command ``register-adapter features``: its flags, and what it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import collect_skipped, echo, make_console, print_result, print_skipped, silence_libraries

if TYPE_CHECKING:
    from ..features import FeatureFile
    from ..features.extraction.files import FileSpec

__all__ = ["features_command", "print_file", "register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("features")(features_command)


def features_command(
    model: options.Model,
    images: options.Images,
    output_file: Annotated[
        str, typer.Option("--output-file", "--out", help="File to write, which ends with .safetensors or .parquet.")
    ],
    layer: Annotated[
        int, typer.Option(help="Index into hidden_states: 0 is the first block's input, -1 the last one's output.")
    ] = -1,
    what: Annotated[
        list[str] | None,
        typer.Option(help="patch, mean, cls, registers, keys, queries or values; repeatable. [patch]"),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder or name of an adapter that takes part.")] = None,
    file_dtype: Annotated[
        str, typer.Option("--dtype", help="float32, float16, or bfloat16 (safetensors only).")
    ] = "float32",
    norm: Annotated[
        bool, typer.Option("--norm/--no-norm", help="The last layer as the model returns it, or before the LayerNorm.")
    ] = True,
    antialias: Annotated[
        bool, typer.Option("--antialias", help="Interpolate position embeddings with antialiasing.")
    ] = False,
    max_images: options.MaxImages = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = None,
    strict: options.Strict = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write what a model makes of images into a file, for other tools: a row an image, with the name of its file.

    Try it on what the package ships: register-adapter features planted scenes --what cls --out features.parquet
    """
    silence_libraries(quiet)
    from .runs.features import FeaturesArguments, run_features

    arguments = FeaturesArguments(
        model=model,
        images=images,
        output_file=output_file,
        layer=layer,
        what=what or ("patch",),
        adapter=adapter,
        file_dtype=file_dtype,
        norm=norm,
        antialias=antialias,
        max_images=max_images,
        batch_size=batch_size,
        device=device,
        strict=strict,
        progress=not quiet,
    )
    with collect_skipped() as skipped:
        written = run_features(arguments, None if quiet else print_size)
    print_skipped(skipped, None)
    print_result(written.to_dict(), lambda: print_file(written), as_json=as_json, quiet=quiet)


def print_size(spec: FileSpec) -> None:
    """Say how large the file will be, on the standard error, which has the bar."""
    from ..utils.text import size_text

    if spec.nbytes is not None:
        echo(f"\n{spec.total} images of {size_text(spec.bytes_per_image)}: {size_text(spec.nbytes)}", err=True)


def print_file(written: FeatureFile) -> None:
    """Print what is in the file."""
    from ..utils.text import size_text

    console = make_console()
    for kind, shape in written.shapes.items():
        console.print(f"{kind}: {' × '.join(map(str, shape))} {written.dtype}")
    if written.grid is not None:
        console.print(f"Patches lie row by row in a grid of {written.grid[0]} × {written.grid[1]}.")
    console.print(f"Written to {written.path}: {written.rows} images, {size_text(written.nbytes)}")
