"""Features of a folder of images under a model, written into a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...features import FeatureFile, write_features
from ...features.extraction.files import FileSpec, check_format
from ...utils.staging import file_to_write
from .inputs import choose_device, load_base, load_images, load_processor, with_adapter

__all__ = ["FeaturesArguments", "run_features"]


@dataclass(frozen=True)
class FeaturesArguments:
    """What to read, and where to write it; see :func:`register_adapter.features.write_features` for all but these.

    Attributes:
        model: Name or folder of a model of transformers, or a word for what is packaged, such as ``"grown"``.
        images: Folder of images, or a word for those that the package draws, such as ``"mosaics"``.
        output_file: The file.
        adapter: Folder or name of an adapter that takes part.
        device: Where to run; default: a GPU if there is one.
    """

    model: str
    images: str
    output_file: str
    layer: int = -1
    what: Sequence[str] = ("patch",)
    adapter: str | None = None
    file_dtype: str = "float32"
    norm: bool = True
    antialias: bool = False
    max_images: int | None = None
    batch_size: int = 32
    device: str | None = None
    strict: bool = False
    progress: bool = True


def run_features(args: FeaturesArguments, on_start: Callable[[FileSpec], None] | None = None) -> FeatureFile:
    """Write the features.

    Raises:
        ValueError, OSError, RegisterAdapterError: As for loading, and for
            :func:`register_adapter.features.write_features`.
    """
    path = Path(args.output_file)
    check_format(path, args.file_dtype)
    file_to_write(path)
    images: Any = load_images(args.images, args.max_images)
    model = load_base(args.model)
    if args.adapter is not None:
        model = with_adapter(model, args.adapter)
    said = {"model": args.model, "images": args.images, **({"adapter": args.adapter} if args.adapter else {})}
    return write_features(
        model.to(choose_device(args.device)).eval(),
        args.images if isinstance(images, list) else images,  # names of files from the folder on
        path,
        args.layer,
        args.what,  # type: ignore[arg-type]
        file_dtype=args.file_dtype,
        metadata=said,
        on_start=on_start,
        norm=args.norm,
        image_processor=load_processor(args.model),
        batch_size=args.batch_size,
        max_images=args.max_images,
        strict=args.strict,
        progress=args.progress,
        antialias=args.antialias,
    )
