"""Patch tokens against targets of their pixels: images of one size, drawn tokens to learn from, maps to measure."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from ...data.processors import find_image_processor, source_of
from ...errors import RegisterAdapterError
from ...features.layout import tower_of
from ...features.subjects import Subject
from ...towers.tower import Tower
from ..discovery.patches import Preparation, fails_on, tower_inputs
from .dense_images import DenseImage
from .reading import Reading, iterate_features
from .samples import refuse_leaks

__all__ = ["DenseReader", "DrawnTokens", "cells_of_pixels", "enlarge", "two_dense_sets"]

_Array = npt.NDArray[Any]
#: Tokens that are learned from, at most, over all training images.
MOST_TOKENS = 100_000


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens to learn from.

    Attributes:
        features: ``(T, D)`` float32.
        targets: ``(T,)``.
        images: ``(T,)`` which image each is from.
    """

    features: _Array
    targets: _Array
    images: _Array


def two_dense_sets(
    train: Any, test: Any, from_scenes: Callable[[Any], list[DenseImage]], progress: bool
) -> tuple[Sequence[DenseImage], Sequence[DenseImage]]:
    """Both sets in one form.

    Raises:
        ValueError: A set is empty or something else, or an image is in both.
    """
    sets = []
    for name, data in (("train", train), ("test", test)):
        if isinstance(data, str | os.PathLike) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
            raise ValueError(
                f"{name} must be pairs of an image and its target, found {data!r:.100}; read_masks(folder) and "
                "read_depths(folder) of register_adapter.evaluation.downstream read folders"
            )
        items = from_scenes(data) if hasattr(data, "scene") else list(data)
        wrong = [item for item in items if not isinstance(item, DenseImage | list | tuple) or _is_no_pair(item)]
        if wrong:
            raise ValueError(f"{name} must be pairs of an image and its target, found one of {type(wrong[0]).__name__}")
        items = [
            item if isinstance(item, DenseImage) else DenseImage(item[0], item[1], f"{name} {number}")
            for number, item in enumerate(items)
        ]
        if not items:
            raise ValueError(f"{name} has no images")
        sets.append(items)
    refuse_leaks([item.image for item in sets[0]], [item.image for item in sets[1]], progress)
    return sets[0], sets[1]


def _is_no_pair(item: Any) -> bool:
    return not isinstance(item, DenseImage) and len(item) != 2


class DenseReader:
    """Reads patch tokens of images that are resized to one size as a whole, so that targets lie where they do.

    Args:
        subject: A model, or one adapter of a PEFT model.
        reading: How images are read; of an image processor only its size and how it normalises is used.
        size: ``(height, width)`` or a side in pixels, made a multiple of the patch size; ``None`` takes the processor's
            or the model's.

    Attributes:
        size: ``(height, width)`` in pixels.
        grid: ``(h, w)`` patches.

    Raises:
        UnsupportedModelError: The model has no vision tower, or its patch size is not known.
        ValueError: No size is known.
    """

    def __init__(self, subject: Subject, reading: Reading, size: int | tuple[int, int] | None) -> None:
        model = subject[0] if isinstance(subject, tuple) else subject
        tower = tower_of(model)[0]
        processor = reading.image_processor
        if processor is None:
            processor = find_image_processor(source_of(model, tower))
        patch = Preparation(model, tower, processor).patch_size
        wanted = (size, size) if isinstance(size, int) else size or _native_size(processor, tower)
        if min(wanted) < patch:
            raise ValueError(f"size={wanted} is smaller than a patch of {patch} px")
        self.size = (-(-wanted[0] // patch) * patch, -(-wanted[1] // patch) * patch)
        self.grid = self.size[0] // patch, self.size[1] // patch
        prepare = Preparation(model, tower, processor, self.size)
        self._subject = subject
        whole = _Whole(prepare, processor, self.size)
        if not isinstance(tower_inputs(tower, torch.zeros(1, 3, *self.size), self.grid), torch.Tensor):
            whole = _WholeAsPatches(prepare, processor, self.size, tower, self.grid)
        self._reading, self._tower = replace(reading, image_processor=whole), tower

    def maps(self, items: Sequence[DenseImage], title: str) -> Generator[tuple[int, torch.Tensor, _Array], None, None]:
        """Of each good image its number, its patch tokens ``(P, D)`` and its target ``(H, W)``; to be closed.

        Raises:
            ValueError: The model fails on images of this size; and as for :func:`iterate_features`.
        """
        images = [item.image for item in items]
        batches = iterate_features(self._subject, images, patches=True, reading=self._reading, title=title)
        with closing(batches):
            for numbers, tensors in self._checked(batches):
                if (count := tensors["patches"].shape[1]) != self.grid[0] * self.grid[1]:
                    raise ValueError(f"images of {self.size} px have {count} patches, and {self.grid} was meant")
                for number, tokens in zip(numbers, tensors["patches"], strict=True):
                    yield number, tokens, items[number].read()

    def _checked(self, batches: Iterator[Any]) -> Iterator[tuple[Sequence[int], Mapping[str, torch.Tensor]]]:
        try:
            for numbers, tensors, _ in batches:
                yield numbers, tensors
        except (RegisterAdapterError, torch.OutOfMemoryError):
            raise
        except (AssertionError, RuntimeError, TypeError) as error:
            raise fails_on(self._tower, f"images of {self.size[0]} × {self.size[1]} px", error) from error

    def draw(
        self,
        items: Sequence[DenseImage],
        target_of_cells: Callable[[_Array, tuple[int, int]], tuple[_Array, _Array]],
        per_image: int,
        seed: int,
        title: str,
    ) -> DrawnTokens:
        """Tokens of training images, at random among those with a target.

        Args:
            items: The images.
            target_of_cells: From a target ``(H, W)`` and the grid to the patches' targets ``(P,)`` and which are valid.
            per_image: Tokens of an image at most; fewer where all images together would have more than
                :data:`MOST_TOKENS`.
            seed: Seed of the draw.
            title: What the progress bar is called.

        Raises:
            ValueError: No patch has a target.
        """
        count = max(1, min(per_image, MOST_TOKENS // len(items)))
        features, targets, images = [], [], []
        with closing(self.maps(items, title)) as maps:
            for number, tokens, target in maps:
                values, valid = target_of_cells(target, self.grid)
                places = np.flatnonzero(valid)
                if len(places) > count:
                    places = np.sort(np.random.default_rng((seed, number)).permutation(places)[:count])
                features.append(tokens.numpy()[places])
                targets.append(values[places])
                images.append(np.full(len(places), number))
        if not sum(map(len, targets)):
            raise ValueError("no patch of the training images has a target")
        return DrawnTokens(np.concatenate(features), np.concatenate(targets), np.concatenate(images))


@dataclass(frozen=True, eq=False)
class _Whole:
    """An image processor that resizes the whole image to one size."""

    prepare: Preparation
    processor: Any
    size: tuple[int, int]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.prepare(image).pixels

    def to_dict(self) -> dict[str, Any]:
        """What a store's features depend on: of a transform the normalisation, all of it that is used."""
        own = self.processor.to_dict() if hasattr(self.processor, "to_dict") else self.prepare.normalisation
        return {"size": list(self.size), "normalised as": own}


@dataclass(frozen=True, eq=False)
class _WholeAsPatches(_Whole):
    """The same for a tower that takes more than pixel values, such as SigLIP 2's rows of patches."""

    tower: Tower
    grid: tuple[int, int]

    def __call__(self, images: Image.Image, return_tensors: str = "pt") -> Any:
        return tower_inputs(self.tower, self.prepare(images).pixels[None], self.grid)


def _native_size(processor: Any, tower: Tower) -> tuple[int, int]:
    """What a processor makes, or what the model was trained on.

    Raises:
        ValueError: Neither says.
    """
    for values in (
        getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", True) else None,
        getattr(processor, "size", None),
        tower.image_size,
    ):
        if isinstance(values, int):
            return values, values
        if isinstance(values, list | tuple) and len(values) == 2:
            return int(values[0]), int(values[1])
        sides = [_side(values, name) for name in ("height", "width", "shortest_edge")]
        if sides[0] and sides[1]:
            return sides[0], sides[1]
        if sides[2]:
            return sides[2], sides[2]
    raise ValueError("neither the image processor nor the model says its image size; give size=, such as 518")


def _side(values: Any, name: str) -> int:
    """A side from a dictionary, or transformers' own object; 0 where it is not there."""
    side = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return side if isinstance(side, int) else 0


def cells_of_pixels(target: _Array, grid: tuple[int, int]) -> _Array:
    """``(H * W,)`` int64: the patch that each pixel lies in, by its centre, as the image is resized to the grid."""
    rows, columns = (
        ((np.arange(count) + 0.5) * cells / count).astype(np.int64)
        for count, cells in zip(target.shape, grid, strict=True)
    )
    cells: _Array = (rows[:, None] * grid[1] + columns[None]).reshape(-1)
    return cells


def enlarge(values: torch.Tensor, size: tuple[int, int], most: int = 2**24) -> Iterator[tuple[slice, torch.Tensor]]:
    """Bilinear interpolation of ``(C, h, w)`` to ``size``, in bands of rows, so that memory stays bounded.

    Args:
        values: Float maps.
        size: ``(H, W)``.
        most: Values of a band, at most (one row in any case).

    Yields:
        Rows, and the maps ``(C, rows, W)`` there.
    """
    down, across = (
        F.interpolate(torch.eye(cells, dtype=values.dtype)[None], size=count, mode="linear")[0].T
        for cells, count in zip(values.shape[1:], size, strict=True)
    )
    wide = values @ across.T
    rows = max(1, most // (values.shape[0] * size[1]))
    for start in range(0, size[0], rows):
        part = slice(start, min(start + rows, size[0]))
        yield part, torch.einsum("hr,crw->chw", down[part], wide)
