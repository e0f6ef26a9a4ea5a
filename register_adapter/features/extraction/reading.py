"""Features of images from one pass of a model, all at once or batch by batch, each row with the image that it is of."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch

from ...data.batches import list_images
from ...towers.anatomy import Anatomy
from ...utils.text import path_text
from ..finite import check_finite_features, subject_in_words
from ..passes import PassOptions, open_pass
from ..positions import antialiased_positions
from ..subjects import Subject, keeping_adapters, looking_at
from .tokens import Kind, TokenReader, kinds_of

__all__ = ["FeatureBatch", "FeatureTable", "Wanted", "each_batch", "get_features", "same_size"]

Format = Literal["torch", "numpy", "datasets"]
_FORMATS: tuple[Format, ...] = ("torch", "numpy", "datasets")


@dataclass(frozen=True)
class FeatureTable:
    """Features of images, one row an image, in the order of the images; bad images have no row.

    ``table["patch"]`` is ``table.values["patch"]``, and ``len(table)`` the number n of rows.

    Attributes:
        values: By kind: ``(n, P, D)`` for ``"patch"``, ``"keys"``, ``"queries"`` and ``"values"``, ``(n, R, D)`` for
            ``"registers"``, ``(n, D)`` for ``"cls"`` and ``"mean"``; float32, tensors on the CPU or arrays.
        index: ``(n,)`` int64: place of each image among those that were given, bad ones counted.
        files: ``n`` entries: the image's file, from the folder on if a folder was given; ``None`` for images that do
            not say it.
        grid: ``(h, w)``: patches lie row by row, P = h * w; ``None`` where it is not known, or not asked for.
        skipped: A line for each image that was left out: its name and what is wrong with it.
    """

    values: Mapping[str, Any]
    index: Any
    files: tuple[str | None, ...]
    grid: tuple[int, int] | None
    skipped: tuple[str, ...] = ()

    def __getitem__(self, kind: str) -> Any:
        return self.values[kind]

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        """How many images there are, and the shape of each kind; the features are in the items."""
        kinds = ", ".join(f"{kind} {tuple(values.shape)}" for kind, values in self.values.items())
        grid = f", grid {self.grid[0]} × {self.grid[1]}" if self.grid else ""
        return f"<FeatureTable: {len(self)} images, {kinds}{grid}, {len(self.skipped)} skipped>"


class Wanted(NamedTuple):
    """What is read; see :func:`get_features`."""

    kinds: tuple[Kind, ...] = ("patch",)
    layer: int = -1
    norm: bool = True
    antialias: bool = False


@dataclass(frozen=True)
class FeatureBatch:
    """Rows of a :class:`FeatureTable` that came out of one forward pass.

    Attributes:
        values: ``(B, …)`` float32 on the CPU, by kind.
        index: Places of the images.
        files: Their files.
        grid: ``(h, w)``, or ``None``.
        skipped: A line for each image that was left out so far.
        layer: Index into ``hidden_states``, counted from the front.
        size: Of the pixel values of an image.
        total: Number of images of the whole pass, bad ones counted; ``None`` if it is not known.
    """

    values: Mapping[str, torch.Tensor]
    index: list[int]
    files: list[str | None]
    grid: tuple[int, int] | None
    skipped: Sequence[str]
    layer: int
    size: tuple[int, ...]
    total: int | None


@keeping_adapters
def get_features(
    model: Subject,
    images: Any,
    layer: int = -1,
    what: Kind | Sequence[Kind] = "patch",
    *,
    format: Format = "torch",
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
) -> Any:
    """Read features of images in one pass of a model's vision tower, which is left as it was.

    All of them are kept in memory; :func:`~register_adapter.features.write_features` writes what does not fit.

    Args:
        model: A base model, a model with head, or one with registers or other adapters, of which the active ones take
            part; or one adapter of a PEFT model: ``(model, "name")``, ``(model, None)`` for its base.
        images: As for :func:`~register_adapter.artifacts.audit`; also a list of pixel values ``(3, H, W)``.
        layer: Index into ``hidden_states``: 0 is the input of the first block, ``i + 1`` the output of block ``i``, -1
            that of the last. Keys, queries and values of layer ``i + 1`` are those that block ``i`` computes.
        what: One kind or several, which take one pass together. ``"patch"``: the patch tokens; ``"mean"``: their mean;
            ``"cls"``: the CLS token, the first if there are two; ``"registers"``: those that the model was made with,
            then those of active adapters; ``"keys"``, ``"queries"``, ``"values"``: what the block's linear layers give
            for the patches, all heads side by side, before a norm over heads or a rotation.
        format: ``"torch"`` or ``"numpy"``: a :class:`FeatureTable` of tensors or arrays. ``"datasets"``: a
            ``datasets.Dataset`` with a column of each kind, ``index`` and ``file``, in numpy format.
        norm: Tokens of the last layer are as the model returns them: behind the final LayerNorm, but for patch tokens
            and registers of models that do not norm those (CLIP). ``False``: before it, as in ``capture``.
        image_processor: Of transformers, or any function from a PIL image to ``(3, H, W)``; ``None``: the model's own,
            if the images need one.
        batch_size: Images per batch; ready batches stay as they are.
        max_images: Use at most this many images, the first ones.
        num_workers: Threads that read images.
        strict: Refuse bad images instead of skipping them with a warning.
        progress: Show a bar.
        dtype: Of floating point inputs; ``None`` takes that of the tower's weights. Features are float32 in any case.
        antialias: Interpolate position embeddings with antialiasing.
        target_modules: Name of the vision tower, where there are several.
        anatomy: Description of a model that the table does not have.

    Returns:
        A :class:`FeatureTable`, or a ``datasets.Dataset``.

    Raises:
        ValueError: No images, an unknown kind or format, no such layer, no registers there, or images at several
            resolutions, whose features are not comparable.
        UnsupportedModelError: No single vision tower, no CLS token, places of the patches are not known (MAE shuffles
            them), or a block has no layer of a known name for keys.
        ImageFileError: ``strict`` and an image is bad, or none is good.
        RegisterAdapterError: A feature is not finite (NaN or infinite).

    Example:
        >>> table = get_features(model, "photos/", what=["patch", "cls"])
        >>> table["patch"].shape, table.grid, table.files[0]
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}, expected one of {', '.join(_FORMATS)}")
    wanted = Wanted(kinds_of(what), layer, norm, antialias)
    options = PassOptions(image_processor, batch_size, max_images, num_workers, strict, progress, dtype)
    parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in wanted.kinds}
    index: list[int] = []
    files: list[str | None] = []
    grid: tuple[int, int] | None = None
    skipped: Sequence[str] = ()
    batches = each_batch(model, images, wanted, options, target_modules=target_modules, anatomy=anatomy)
    with closing(batches):
        for batch in batches:
            for kind, values in batch.values.items():
                parts[kind].append(values)
            index += batch.index
            files += batch.files
            grid, skipped = batch.grid, batch.skipped
    tensors: dict[str, torch.Tensor] = {kind: torch.cat(parts.pop(kind)) for kind in wanted.kinds}
    if format == "torch":
        return FeatureTable(tensors, torch.tensor(index), tuple(files), grid, tuple(skipped))
    arrays: dict[str, Any] = {kind: tensor.numpy() for kind, tensor in tensors.items()}
    table = FeatureTable(arrays, np.array(index, np.int64), tuple(files), grid, tuple(skipped))
    return table if format == "numpy" else _as_dataset(table)


def each_batch(
    subject: Subject,
    images: Any,
    wanted: Wanted,
    options: PassOptions,
    *,
    target_modules: str | None = None,
    anatomy: Anatomy | None = None,
    title: str = "features",
) -> Generator[FeatureBatch, None, None]:
    """The same batch by batch, so that nothing is kept.

    To be closed by whoever leaves it early: until then the model has hooks, and the subject's adapter is active.

    Args:
        subject: See :func:`get_features`, as for the others.
        images: Images.
        wanted: What is read.
        options: How images are read.
        target_modules: Name of the vision tower.
        anatomy: Description of the model.
        title: What the progress bar is called.

    Raises:
        RegisterAdapterError: A feature is not finite.
    """
    with looking_at(subject) as model, ExitStack() as stack:
        given = _Named(images)
        opened = open_pass(model, given.images, options, target_modules=target_modules, anatomy=anatomy, title=title)
        stack.enter_context(closing(opened))
        reader = TokenReader(opened.tower, opened.registers, wanted.layer, wanted.kinds, wanted.norm)
        if wanted.antialias:
            stack.enter_context(antialiased_positions(opened.tower))
        stack.enter_context(opened.attached(reader))
        size: tuple[int, ...] | None = None
        who = subject_in_words(subject)
        for batch in opened:
            size = same_size(batch.inputs, size)
            opened.feed(batch, reader)
            check_finite_features(
                {f"{kind} features": read for kind, read in reader.tensors.items()}, who, reader.layer
            )
            index = list(batch.numbers)
            yield FeatureBatch(
                dict(reader.tensors.items()),
                index,
                [given.take(place) for place in index],
                reader.grid,
                opened.skipped,
                reader.layer,
                size,
                opened.total,
            )


def same_size(inputs: Any, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of an image's pixel values in a batch.

    Args:
        inputs: What goes into the tower.
        before: That of earlier batches.

    Raises:
        ValueError: It is another one than before, or images of several sizes are padded to one.
    """
    pixels = inputs if isinstance(inputs, torch.Tensor) else inputs.get("pixel_values")
    masks = [] if isinstance(inputs, torch.Tensor) else [v for k, v in inputs.items() if k.endswith("_mask")]
    size = tuple(pixels.shape[1:]) if isinstance(pixels, torch.Tensor) else ()
    if (before is not None and size != before) or any(not bool(mask.bool().all()) for mask in masks):
        seen = f"{before} and {size}" if before not in (None, size) else "padded to one size"
        raise ValueError(
            f"images come out of the image processor at several resolutions ({seen}), and features of several are not "
            "comparable; give an image processor that makes one size"
        )
    return size


class _Named:
    """Images that pass by, and the files that they are from."""

    def __init__(self, images: Any) -> None:
        self._files: dict[int, str | None] = {}
        self._root: Path | None = None
        if isinstance(images, str | Path):
            self._root = Path(images) if Path(images).is_dir() else None
            images = list_images(images)
        if isinstance(images, list | tuple) and images and all(_is_pixels(image) for image in images):
            images = _stacked(images)  # a list of tensors would be taken for batches
        if isinstance(images, torch.Tensor) and images.ndim == 4 and not len(images):
            raise ValueError("there are no images")
        listed = hasattr(images, "__iter__") or (hasattr(images, "__getitem__") and hasattr(images, "__len__"))
        self.images = self if listed and not isinstance(images, torch.Tensor | Mapping) else images
        self._given = images

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(_each(self._given)):
            if (file := self._file(item)) is not None:
                self._files[number] = file
            yield item

    def __len__(self) -> int:
        return len(self._given)

    def take(self, number: int) -> str | None:
        """The file of an image, which is then forgotten."""
        return self._files.pop(number, None)

    def _file(self, item: Any) -> str | None:
        source = item.get("image", item) if isinstance(item, Mapping) else item
        path = source.get("path") if isinstance(source, Mapping) else getattr(source, "filename", source)
        if not isinstance(path, str | PathLike) or not str(path):
            return None
        text = path_text(path)
        below = self._root is not None and not text.startswith("file://")
        return Path(text).relative_to(self._root).as_posix() if below and self._root is not None else text


def _each(images: Any) -> Iterator[Any]:
    if hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Mapping):
        return (images[index] for index in range(len(images)))  # a map-style data set need not end by itself
    return iter(images)


def _is_pixels(image: Any) -> bool:
    return isinstance(image, torch.Tensor) and image.ndim == 3


def _stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"images are pixel values of several sizes, {sorted(sizes)[:3]}; give those of one size")
    return torch.stack(list(images))


def _as_dataset(table: FeatureTable) -> datasets.Dataset:
    """The columns ``index``, ``file`` and those of the kinds, typed, so that shapes are kept on disk."""
    kinds: dict[str, Any] = {
        kind: datasets.Array2D(array.shape[1:], "float32")
        if array.ndim == 3
        else datasets.List(datasets.Value("float32"), length=array.shape[1])
        for kind, array in table.values.items()
    }
    features = datasets.Features({"index": datasets.Value("int64"), "file": datasets.Value("string"), **kinds})
    columns = {"index": table.index, "file": list(table.files), **table.values}
    return datasets.Dataset.from_dict(columns, features=features).with_format("numpy")
