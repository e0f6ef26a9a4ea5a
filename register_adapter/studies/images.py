"""The images of a study, in three parts: to make arms with, to choose by, and to report on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batches import list_images, refuse_bad, warn_of_skipped
from ..data.datasets import PixelBatches, ProcessedDataset
from ..data.images import check_image, image_name, load_image
from ..evaluation.downstream.provenance import combined_digest
from ..evaluation.downstream.samples import digest_of

__all__ = ["LEAST", "Images", "Part", "read_images"]

#: Fewer images than this cannot be shared out.
LEAST = 12
#: Of all images, the part that arms are made with; half of the rest is chosen by, half reported on.
_MADE_WITH = 0.5
#: Bytes of pixel values that a part keeps in memory, at most: every arm looks at them.
_HELD = 2**28


class Part:
    """Some of the study's images.

    Args:
        items: ``{"image": ...}`` each.
        numbers: Their places among all images.
        image_processor: Of the model.
    """

    def __init__(self, items: Sequence[dict[str, Any]], numbers: Sequence[int], image_processor: Any) -> None:
        self.items, self.numbers = list(items), list(numbers)
        self._processed = ProcessedDataset(self.items, image_processor)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    @cached_property
    def data(self) -> Any:
        """Items with ``pixel_values``, for a training; made once if they are not too large."""
        pixels: torch.Tensor = self._processed[0]["pixel_values"]
        small = pixels.nbytes * len(self) <= _HELD
        return [self._processed[index] for index in range(len(self))] if small else self._processed

    def batches(self, batch_size: int) -> PixelBatches:
        """Their pixel values in batches."""
        return PixelBatches(self.data, batch_size)


class Images:
    """Good images, shared out at random, always in the same way.

    Args:
        items: ``{"image": ...}`` each.
        numbers: Their places among all that were given.
        skipped: A line for each bad one.
        image_processor: Of the model.

    Attributes:
        make: Part that arms are made with.
        choose: Part that one is chosen by.
        report: Part that is reported on.
    """

    def __init__(
        self, items: Sequence[dict[str, Any]], numbers: Sequence[int], skipped: Sequence[str], image_processor: Any
    ) -> None:
        self.items, self.numbers, self.skipped = list(items), list(numbers), list(skipped)
        order = np.random.default_rng(0).permutation(len(items))
        first = round(_MADE_WITH * len(items))
        second = first + (len(items) - first) // 2

        def part(start: int, end: int) -> Part:
            chosen = sorted(order[start:end].tolist())
            return Part([self.items[place] for place in chosen], [numbers[place] for place in chosen], image_processor)

        self.make, self.choose, self.report = part(0, first), part(first, second), part(second, len(items))

    @property
    def on_disk(self) -> bool:
        """Whether every image is a file that a command could read."""
        return all(isinstance(item["image"], str | Path) for item in self.items)

    def digest(self) -> str:
        """Of which images they are: the content of files, pixels of others, in their order."""
        return combined_digest(digest_of(item["image"]) for item in self.items)[:16]

    def write(self, folder: Path) -> None:
        """Write all of the images into one folder, for a command to read: files as they are, others as PNG."""
        for number, item in zip(self.numbers, self.items, strict=True):
            source = item["image"]
            if isinstance(source, str | Path):
                shutil.copyfile(source, folder / f"{number:06d}{Path(source).suffix}")
            else:
                load_image(source).save(folder / f"{number:06d}.png")


def read_images(images: Any, image_processor: Any, max_images: int | None, strict: bool) -> Images:
    """Share out what a folder, a list or a data set has.

    Args:
        images: A folder, or a sequence of paths, PIL images, or ``{"image": ...}`` items.
        image_processor: Of the model.
        max_images: At most so many, at random.
        strict: Refuse bad images.

    Raises:
        ImageFileError: ``strict`` and an image is bad.
        ValueError: There are too few good ones.
    """
    sources = list_images(images) if isinstance(images, str | Path) else images
    count = len(sources)
    numbers = list(range(count))
    if max_images is not None and max_images < count:
        numbers = sorted(np.random.default_rng(0).permutation(count)[:max_images].tolist())
    given = (sources[number] for number in numbers)
    items = [item if isinstance(item, dict) and "image" in item else {"image": item} for item in given]
    items = [{"image": item["image"]} for item in items]
    with ThreadPoolExecutor(4) as pool:
        faults = list(pool.map(lambda item: check_image(item["image"]), items))
    skipped = [
        f"{image_name(item['image'])}: {fault}" for item, fault in zip(items, faults, strict=True) if fault is not None
    ]
    if skipped and strict:
        refuse_bad(skipped)
    warn_of_skipped(skipped)
    good = [place for place, fault in enumerate(faults) if fault is None]
    if len(good) < LEAST:
        raise ValueError(
            f"{len(good)} good images are too few for a study, which needs {LEAST}: half of them to repair the model "
            "with, the rest to choose by and to report on"
        )
    return Images([items[place] for place in good], [numbers[place] for place in good], skipped, image_processor)
