"""Features of images into one file, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...towers.anatomy import Anatomy
from ...tuner.hooks.call_state import outside_of_readings
from ...utils.environment import version
from ...utils.staging import file_to_write, staged
from ..passes import PassOptions
from ..store import check_space
from ..subjects import Subject, keeping_adapters
from .files import FileSpec, check_format, opened_writer
from .reading import Wanted, each_batch
from .tokens import Kind, kinds_of

__all__ = ["FeatureFile", "write_features"]


@dataclass(frozen=True)
class FeatureFile:
    """What :func:`write_features` wrote.

    Attributes:
        path: The file.
        rows: Number n of images.
        shapes: Kind to the shape of all of its rows, such as ``(n, P, D)``.
        dtype: Number format.
        grid: ``(h, w)`` of the patches; ``None`` where it is not known, or not asked for.
        nbytes: Size of the file.
        skipped: A line for each image that was left out: its name and what is wrong.
    """

    path: str
    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    grid: tuple[int, int] | None
    nbytes: int
    skipped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "path": self.path,
            "rows": self.rows,
            "columns": {kind: list(shape) for kind, shape in self.shapes.items()},
            "dtype": self.dtype,
            "grid": None if self.grid is None else list(self.grid),
            "bytes": self.nbytes,
            "skipped": list(self.skipped),
        }


@keeping_adapters
def write_features(
    model: Subject,
    images: Any,
    path: str | Path,
    layer: int = -1,
    what: Kind | Sequence[Kind] = "patch",
    *,
    file_dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    on_start: Callable[[FileSpec], None] | None = None,
    norm: bool = True,
    image_processor: Any = None,
    batch_size: int = 32,
    max_images: int | None = None,
    num_workers: int = 2,
    strict: bool = False,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    antialias: bool = False,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
) -> FeatureFile:
    """As :func:`get_features`, into a file: batch by batch, so that memory does not grow with the number of images.

    ``.safetensors``: a tensor of each kind, ``index`` ``(n,)`` int64, and ``files``, uint8: the names of the files in
    UTF-8, with a zero byte between two of them. ``.parquet``: a row an image with ``index``, ``file``, and nested lists
    of fixed length, in row groups of about 16 MiB. Both say in their metadata how features were read. The file is there
    whole or not at all; one that is there already is replaced.

    Args:
        model: See :func:`get_features`, as for what is not listed here.
        images: Images; for safetensors their number must be known before.
        path: The file, which ends with ``.safetensors`` or ``.parquet``.
        layer: Index into ``hidden_states``.
        what: One kind or several.
        file_dtype: ``"float32"``, ``"float16"``, or ``"bfloat16"`` (safetensors only).
        metadata: More to say in the file.
        on_start: Called with what the file is going to hold, after the first batch and before anything is written.
        norm: The last layer as the model returns it.
        image_processor: Image processor.
        batch_size: Images per batch.
        max_images: Use at most this many images.
        num_workers: Threads that read images.
        strict: Refuse bad images.
        progress: Show a bar.
        dtype: Of floating point inputs.
        antialias: Interpolate position embeddings with antialiasing.
        target_modules: Name of the vision tower.
        anatomy: Description of a model that the table does not have.

    Raises:
        ValueError: As for :func:`get_features`; another ending or number format, numbers that are not finite in it, or
            a number of images that is not known before.
        StoreError: The disk cannot hold the features; nothing was written.
        OSError: Nothing can be written there, which is found before an image is read if it can be.
        UnsupportedModelError: As for :func:`get_features`.
        ImageFileError: As for :func:`get_features`.

    Example:
        >>> write_features(model, "imagenet/train", "features.safetensors", what=["cls", "mean"])
    """
    check_format(Path(path), file_dtype)
    target = file_to_write(path)
    wanted = Wanted(kinds_of(what), layer, norm, antialias)
    options = PassOptions(image_processor, batch_size, max_images, num_workers, strict, progress, dtype)
    batches = each_batch(model, images, wanted, options, target_modules=target_modules, anatomy=anatomy)
    with closing(batches):
        batch = next(batches)
        spec = FileSpec({kind: tuple(v.shape[1:]) for kind, v in batch.values.items()}, file_dtype, batch.total)
        if spec.nbytes is not None:
            check_space(
                target.parent, spec.nbytes, f"the features of {spec.total} images", "another disk or fewer images"
            )
        if on_start is not None:
            with outside_of_readings():
                on_start(spec)
        rows = 0
        with staged(target.parent) as scratch, opened_writer(scratch / target.name, spec) as writer:
            while True:
                writer.add(batch.values, batch.index, batch.files)
                rows += len(batch.index)
                following = next(batches, None)
                if following is None:
                    break
                batch = following
            said = {
                "register_adapter": version(),
                "layer": str(batch.layer),
                "norm": str(norm),
                "antialias": str(antialias),
                "grid": "" if batch.grid is None else "x".join(map(str, batch.grid)),
                "pixel_values": "x".join(map(str, batch.size)),
            }
            writer.finish({**said, **(metadata or {})})
    shapes = {kind: (rows, *shape) for kind, shape in spec.shapes.items()}
    return FeatureFile(str(target), rows, shapes, file_dtype, batch.grid, target.stat().st_size, tuple(batch.skipped))
