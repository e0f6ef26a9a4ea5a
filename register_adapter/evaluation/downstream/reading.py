"""Features of images from one pass of a model: CLS, the mean of the patches, the patches; in memory or in a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.images import ImageFileError
from ...features.extraction.reading import same_size
from ...features.finite import check_finite_features, subject_in_words
from ...features.grid import PatchGrid, patch_tokens, watch_patches
from ...features.layout import adapters_stay, find_layout, tower_of
from ...features.passes import Batch, PassOptions, keep_layer, open_pass
from ...features.positions import antialiased_positions
from ...features.store import FeatureStore, StoreSpec
from ...features.subjects import Subject, looking_at
from ...towers.tower import Tower
from .provenance import combined_digest, source_of_features
from .samples import digest_of

__all__ = ["ImageFeatures", "Reading", "describe", "iterate_features", "read_features"]

Tensors = dict[str, torch.Tensor]
#: Numbers of images, their tensors by name, and the size of their pixel values.
_Read = tuple[list[int], Tensors, tuple[int, ...]]


@dataclass(frozen=True)
class Reading:
    """How images are read, whatever is done with their features.

    Attributes:
        image_processor: Of transformers, or a function from a PIL image to ``(3, H, W)``; ``None`` looks up the model's
            own.
        batch_size: Images in one pass.
        num_workers: Threads that read images.
        strict: Refuse bad images instead of skipping them with a warning. With a store they always are.
        progress: Show a progress bar.
        antialias: Interpolate position embeddings with antialiasing.
        store: Folder for the features, which are read from it if they are there; ``None`` computes them.
    """

    image_processor: Any = None
    batch_size: int = 32
    num_workers: int = 2
    strict: bool = False
    progress: bool = False
    antialias: bool = False
    store: str | Path | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, float32 on the CPU, behind the final LayerNorm.

    Attributes:
        mean: ``(n, blocks, D)``, the mean of the patch tokens after each of the last blocks, the last block last.
        cls: ``(n, blocks, D)`` the CLS token there, ``None`` for a model without one.
        patches: ``(n, P, D)`` after the last block, where they were asked for.
        numbers: ``(n,)`` which of the given images they are of: bad ones are left out.
        size: ``(channels, H, W)`` of the pixel values that the model was given.
    """

    mean: torch.Tensor
    cls: torch.Tensor | None
    patches: torch.Tensor | None
    numbers: npt.NDArray[np.int64]
    size: tuple[int, ...]


def describe(subject: Subject) -> dict[str, Any]:
    """What a result says of a model: its family, width, blocks, registers and whether tokens go through a norm."""
    with looking_at(subject) as model:
        tower, registers = tower_of(model)
        blocks = len(tower.part("blocks"))
        with adapters_stay(registers):
            count = registers.count_at(blocks - 1) if registers is not None else 0
        return {
            "family": tower.anatomy.family,
            "hidden_size": tower.hidden_size,
            "blocks": blocks,
            "registers": count,
            "norm": {
                "cls": tower.part("final_norm") is not None,
                "patches": bool(tower.anatomy.norm_patches and tower.part("final_norm") is not None),
            },
        }


def read_features(
    subject: Subject,
    images: Any,
    *,
    blocks: int = 1,
    patches: bool = False,
    reading: Reading | None = None,
    title: str = "features",
) -> ImageFeatures:
    """Read CLS and the mean of the patches of images in one pass; the model is left as it was.

    Each token goes through the final LayerNorm as where the model returns it: CLIP's patches do not.

    Args:
        subject: A model, or one adapter of a PEFT model: ``(model, "name")``, ``(model, None)`` for its base.
        images: A sequence of image files, images, or pixel values; or a tensor ``(n, 3, H, W)``.
        blocks: Number of blocks, the last ones.
        patches: Read all patch tokens of the last block too, which takes P times the memory.
        reading: How images are read.
        title: What the progress bar is called.

    Raises:
        ValueError: There are no images, ``blocks`` is out of range, or images come out at several resolutions.
        ImageFileError: No image is good, or one is bad and may not be.
        UnsupportedModelError: The model has no vision tower, or places of its patches are not known.
        StoreError: The store is damaged, or the disk is too small.
        RegisterAdapterError: A feature is not finite (NaN or infinite).
    """
    parts: dict[str, list[torch.Tensor]] = {}
    numbers: list[int] = []
    size: tuple[int, ...] = ()
    read_in = iterate_features(subject, images, blocks=blocks, patches=patches, reading=reading, title=title)
    with closing(read_in):
        for some, tensors, seen in read_in:
            size = seen
            numbers += some
            for name, values in tensors.items():
                parts.setdefault(name, []).append(values)
    read = {name: torch.cat(values) for name, values in parts.items()}
    return ImageFeatures(read["mean"], read.get("cls"), read.get("patches"), np.array(numbers, np.int64), size)


def iterate_features(
    subject: Subject,
    images: Any,
    *,
    blocks: int = 1,
    patches: bool = False,
    reading: Reading | None = None,
    title: str = "features",
) -> Generator[_Read, None, None]:
    """The same batch by batch, so that nothing is kept: the images' numbers, their tensors, the size of their pixels.

    To be closed by whoever leaves it early: until then the model has hooks, and the subject's adapter is active.

    Args:
        subject: See :func:`read_features`, as for the others.
        images: Images.
        blocks: Number of blocks.
        patches: Read all patch tokens too.
        reading: How images are read.
        title: What the progress bar is called.
    """
    options = reading or Reading()
    if not len(images):
        raise ValueError("there are no images")
    with looking_at(subject) as model:
        tower = tower_of(model)[0]
        total = len(tower.part("blocks"))
        if not 1 <= blocks <= total:
            raise ValueError(f"blocks={blocks}, and {type(tower.module).__name__} has {total} blocks")

        def read(some: Any, numbers: Sequence[int], **changes: Any) -> Generator[_Read, None, None]:
            consumer = _Reader(tower, tower_of(model)[1], blocks, patches, subject_in_words(subject), title)
            yield from _passed(model, some, numbers, consumer, options, title, **changes)

        if options.store is None:
            yield from read(images, range(len(images)))
        else:
            yield from _stored(subject, images, read, options, {"blocks": blocks, "patches": patches}, title)


def _passed(
    model: nn.Module,
    images: Any,
    numbers: Sequence[int],
    consumer: _Reader,
    options: Reading,
    title: str,
    strict: bool = False,
    progress: bool = True,
) -> Generator[_Read, None, None]:
    """One pass over images, with the numbers of those that are good."""
    if not isinstance(images, torch.Tensor) and isinstance(images[0], torch.Tensor):
        images = torch.stack(list(images))  # a list of tensors would be taken for batches
    opened = open_pass(
        model,
        images,
        PassOptions(
            options.image_processor,
            options.batch_size,
            num_workers=options.num_workers,
            strict=options.strict or strict,
            progress=options.progress and progress,
        ),
        title=title,
    )
    size: tuple[int, ...] | None = None
    with ExitStack() as stack:
        stack.enter_context(closing(opened))
        if options.antialias:
            stack.enter_context(antialiased_positions(consumer.tower))
        stack.enter_context(opened.attached(consumer))
        for batch in opened:
            size = same_size(batch.inputs, size)
            opened.feed(batch, consumer)
            yield [numbers[place] for place in batch.numbers], consumer.tensors, size


class _Reader:
    """Reads the features of a batch; see :class:`~register_adapter.features.passes.Consumer`."""

    def __init__(self, tower: Tower, registers: Any, blocks: int, patches: bool, who: str, title: str) -> None:
        self._who, self._title = who, title
        self.tower, self._registers, self._patches = tower, registers, patches
        last = len(tower.part("blocks"))
        self._layers = range(last - blocks + 1, last + 1)
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._grid: PatchGrid | None = None
        self.tensors: Tensors = {}

    @contextmanager
    def attach(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._kept = {layer: stack.enter_context(keep_layer(self.tower, layer)) for layer in self._layers}
            self._grid = stack.enter_context(watch_patches(self.tower))
            yield

    def take(self, batch: Batch) -> None:
        cls, mean = [], []
        norm = self.tower.part("final_norm")
        for layer in self._layers:
            hidden = self._kept[layer][0]
            layout = find_layout(self.tower, self._registers, layer)
            assert self._grid is not None
            patches = patch_tokens(self.tower, hidden, layout, self._grid, batch.inputs)[0]
            patches = self.tower.normed(patches).float()
            mean.append(patches.mean(1))
            if layout.num_cls:
                token = hidden[:, :1]
                cls.append((token if norm is None else norm.forward(token))[:, 0].float())
            # The mean has whatever is wrong with a patch.
            tokens = {"patch tokens": mean[-1], "CLS tokens": cls[-1]} if cls else {"patch tokens": mean[-1]}
            check_finite_features(tokens, self._who, layer, title=self._title)
        self.tensors = {"mean": torch.stack(mean, 1).cpu()}
        if cls:
            self.tensors["cls"] = torch.stack(cls, 1).cpu()
        if self._patches:
            self.tensors["patches"] = patches.cpu()


@contextmanager
def _every_image() -> Iterator[None]:
    """Say that it is because of the store that no image may be bad."""
    try:
        yield
    except ImageFileError as error:
        raise ImageFileError(
            f"{error}. A store holds the features of every image: take those out that are bad, or leave out store="
        ) from error


def _stored(
    subject: Subject,
    images: Sequence[Any],
    read: Callable[..., Generator[_Read, None, None]],
    options: Reading,
    recipe: Mapping[str, Any],
    title: str,
) -> Iterator[_Read]:
    """Features from a store, which is filled first with what it lacks."""
    assert options.store is not None
    with _every_image(), closing(read([images[0]], [0], strict=True, progress=False)) as first:
        _, example, size = next(first)
    shapes = {name: tuple(values.shape[1:]) for name, values in example.items()}
    source = {
        **source_of_features(subject, options.image_processor, options.antialias),
        **recipe,
        "size": list(size),
        "images": combined_digest(map(digest_of, images)),
    }
    # One folder each, so that models, splits and settings stand beside one another.
    folder = Path(options.store) / combined_digest([json.dumps(source, sort_keys=True, default=str)])[:16]
    store = FeatureStore(folder, StoreSpec(len(images), shapes, source, "float32"), "another folder or fewer images")
    total = sum(len(store.images_of(shard)) for shard in store.missing)
    with tqdm(total=total, desc=title, unit="image", disable=not options.progress or not total) as bar:

        def compute(numbers: Sequence[int]) -> Tensors:
            some = [images[number] for number in numbers]
            batches = []
            with closing(read(some, range(len(some)), strict=True, progress=False)) as passed:
                for places, tensors, seen in passed:
                    if seen != size:
                        same_size(torch.empty(1, *seen), size)
                    batches.append(tensors)
                    bar.update(len(places))
            return {name: torch.cat([tensors[name] for tensors in batches]) for name in shapes}

        with _every_image():
            store.fill(compute)
    for start in range(0, len(images), options.batch_size):
        numbers = list(range(start, min(start + options.batch_size, len(images))))
        rows = [store[number] for number in numbers]
        yield numbers, {name: torch.stack([row[name] for row in rows]) for name in shapes}, size
