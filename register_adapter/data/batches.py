"""From images, wherever they are, to the batches that a vision tower takes; bad files are named and left out."""

from __future__ import annotations

import inspect
import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from PIL import Image
from torch import nn

from ..towers.calls import as_named
from ..utils.arguments import check_whole
from ..utils.text import first_few
from .images import ImageFileError, image_name, load_image, named_folder, walk_files
from .processing import Batch, Processing, check_fits
from .processors import find_image_processor
from .sources import check_ready, image_of, iterate, no_image

__all__ = [
    "Batch",
    "ImageBatches",
    "Labelled",
    "batch_length",
    "is_batch",
    "list_images",
    "refuse_bad",
    "slice_batch",
    "warn_of_skipped",
]

logger = logging.getLogger(__name__)
_LABELS = ("labels", "label")
#: Images that a processor may fail on before any is good: then it is the processor that is wrong.
_FAILURES = 8


def batch_length(batch: Batch) -> int:
    """Number of images in a batch."""
    if isinstance(batch, torch.Tensor):
        return len(batch)
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))


def slice_batch(batch: Batch, part: slice, length: int | None = None) -> Batch:
    """Some of the images of a batch, possibly none; what is not given image by image stays whole.

    Args:
        batch: The batch.
        part: Which images.
        length: Number of images in the batch, if it is known.
    """
    if isinstance(batch, torch.Tensor):
        return batch[part]
    total = batch_length(batch) if length is None else length

    def sliced(value: Any) -> Any:
        per_image = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == total
        return value[part] if per_image else value

    return {key: sliced(value) for key, value in batch.items()}


class Labelled(NamedTuple):
    """A batch and what belongs to its images.

    Attributes:
        inputs: What the tower is called with.
        numbers: Of each image, its place among all that were given, bad ones counted.
        labels: As they came with the images or the batch, one per image; ``None`` if any is missing.
    """

    inputs: Batch
    numbers: range | list[int]
    labels: Any


def list_images(folder: str | Path) -> list[Path]:
    """All files of a folder and of those below it, sorted, but for hidden ones; whether they are images is not asked.

    Raises:
        ValueError: There is no such folder, or it holds no files.
    """
    root = named_folder(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root} is neither a folder nor a file")
    paths = walk_files(root)
    if not paths:
        raise ValueError(f"{root} holds no files")
    return paths


class ImageBatches:
    """Images in batches; see :func:`register_adapter.artifacts.audit` for what ``images`` can be.

    Args:
        images: Images or ready batches.
        image_processor: Of transformers, or a function from a PIL image to ``(3, H, W)``; ``None``: looked up by
            ``model_name``, if images need one.
        model_name: Name or folder of the model.
        batch_size: Images per batch; ready batches stay as they are.
        max_images: Use at most this many images, the first ones.
        strict: Refuse bad images.
        num_workers: Threads that read and process images.

    Attributes:
        total: Number of images, bad ones included; ``None`` where it is not known before.
        skipped: A line for each image that was left out so far: its name and what is wrong.

    Raises:
        ValueError: No images, no image processor, or a value out of range.
        TypeError: A number is none.
    """

    def __init__(
        self,
        images: Any,
        image_processor: Any = None,
        *,
        model_name: str | None = None,
        batch_size: int = 32,
        max_images: int | None = None,
        strict: bool = False,
        num_workers: int = 2,
    ) -> None:
        for key, value in (("batch_size", batch_size), ("max_images", max_images), ("num_workers", num_workers)):
            if value is not None or key != "max_images":
                check_whole(key, value, least=1)
        batch_size, max_images = int(batch_size), max_images and int(max_images)  # numpy's are no numbers to torch
        if isinstance(images, str | Path):
            images = list_images(images)
        elif isinstance(images, torch.Tensor):
            if images.ndim != 4:
                raise ValueError(f"a tensor of images must be (M, 3, H, W), got {tuple(images.shape)}")
            images = torch.split(images[:max_images], batch_size)
        elif isinstance(images, Image.Image):
            images = [images]
        items = iterate(images)
        first = next(items, None)
        if first is None:
            raise ValueError("there are no images")
        self.batch_size, self.max_images = min(batch_size, sys.maxsize), max_images and min(max_images, sys.maxsize)
        self.strict, self.num_workers = strict, num_workers
        self.ready = is_batch(first)
        self.total = self._count(images)
        self.skipped: list[str] = []
        self._named = 0  # of the skipped ones, how many the user has been told of
        self._items = chain([first], items)
        self._processing: Processing | None = None
        if not self.ready:
            if (fault := no_image(image_of(first))) is not None:
                raise ValueError(f"item 0 of the images is {fault}")
            self._processing = Processing(image_processor or find_image_processor(model_name))

    def _count(self, images: Any) -> int | None:
        if self.ready and not isinstance(images, tuple):
            return self.max_images
        try:
            number = sum(len(batch) for batch in images) if self.ready else len(images)
        except TypeError:
            return self.max_images
        return number if self.max_images is None else min(number, self.max_images)

    def on(self, device: torch.device, dtype: torch.dtype, module: nn.Module) -> Iterator[Batch]:
        """The batches on a device, floating point values in ``dtype``, with the keywords that ``module`` takes.

        Raises:
            ImageFileError: ``strict`` and an image is bad, or none is good.
            ValueError: The images of a batch come out of the processor with different sizes.
        """
        return (labelled.inputs for labelled in self.labelled(device, dtype, module))

    def labelled(
        self, device: torch.device, dtype: torch.dtype, module: nn.Module, *, report: bool = True
    ) -> Iterator[Labelled]:
        """As :meth:`on`, with the labels that images or batches came with (an entry ``"label"`` or ``"labels"``).

        Args:
            device: Where the batches are placed.
            dtype: Their floating point dtype.
            module: Whose keywords are kept.
            report: Call :meth:`report_skipped` at the end; ``False`` leaves that to the caller.
        """
        names = list(inspect.signature(module.forward).parameters)

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

        def place(batch: Batch) -> Batch:
            if isinstance(batch, torch.Tensor):
                moved: Batch = move(batch)
                return moved
            kept = {key: move(value) for key, value in as_named(batch, names).items() if key in names}
            if kept:
                return kept
            if isinstance(batch.get("pixel_values"), torch.Tensor):
                return place(batch["pixel_values"])  # towers outside transformers take it by position
            raise ValueError(f"a batch has the keys {list(batch)}; {type(module).__name__} takes {names}")

        try:
            for batch in self._whole_batches() if self.ready else self._read(module):
                yield batch._replace(inputs=place(batch.inputs))
        finally:
            if report:
                self.report_skipped()

    def _whole_batches(self) -> Iterator[Labelled]:
        start = 0
        for item in self._items:
            batch, labels = item, None
            if isinstance(item, list | tuple):
                batch, labels = item[0], item[1] if len(item) == 2 else None
            if not isinstance(batch, torch.Tensor | Mapping):
                raise ValueError(f"a batch must be a tensor or a dictionary of tensors, found {type(batch).__name__}")
            batch = batch if isinstance(batch, torch.Tensor) else dict(batch)
            labels = _label_of(batch) if labels is None else labels
            check_ready(batch, labels)
            number = batch_length(batch)
            if self.max_images is not None and start + number > self.max_images:
                left = self.max_images - start
                batch, number = slice_batch(batch, slice(left), number), left
                labels = None if labels is None else labels[:left]
            yield Labelled(batch, range(start, start + number), labels)
            start += number
            if start == self.max_images:  # the next one is for whoever goes on with the iterator
                return

    def _read(self, module: nn.Module) -> Iterator[Labelled]:
        numbered = enumerate(islice(self._items, self.max_images))
        waiting: deque[Future[_Made]] = deque()
        good = failures = 0
        with ThreadPoolExecutor(max_workers=self.num_workers) as pool:
            while True:
                while len(waiting) <= self.num_workers and (part := list(islice(numbered, self.batch_size))):
                    waiting.append(pool.submit(self._make, part))
                if not waiting:
                    break
                made = waiting.popleft().result()
                self.skipped += made.faults
                if made.faults and self.strict:
                    self._named = len(self.skipped)
                    refuse_bad(made.faults)
                failures += made.failures
                if made.batch is not None:
                    if not good and self._processing is not None:
                        check_fits(made.batch.inputs, module, self._processing.processor)
                    good += len(made.batch.numbers)
                    yield made.batch
                elif not good and failures >= _FAILURES:
                    raise ValueError(f"the image processor fails on the first images: {first_few(made.faults)}")
        if not good:
            self._named = len(self.skipped)
            raise ImageFileError(
                f"none of {len(self.skipped)} files is an image that can be read: {first_few(self.skipped)}"
            )

    def report_skipped(self) -> None:
        """Warn of the images that were left out since the last call; the log record has all of them as ``skipped``."""
        lines, self._named = self.skipped[self._named :], len(self.skipped)
        warn_of_skipped(lines)

    def _make(self, items: list[tuple[int, Any]]) -> _Made:
        """One batch, in a thread: the processed images, and what is wrong with the others."""
        assert self._processing is not None
        singles: list[Batch] = []
        sources, numbers, labels, faults = [], [], [], []
        failures = 0
        for index, item in items:
            source = image_of(item)
            name = image_name(source)
            known = isinstance(source, str | Path) or (isinstance(source, dict) and source.get("path"))
            name = name if known else f"item {index} ({name})"
            try:
                image = load_image(source, name)
            except ImageFileError as error:
                faults.append(str(error))
                continue
            try:
                singles.append(self._processing.single(image, name))
            except ImageFileError as error:
                faults.append(str(error))
                failures += 1
                continue
            finally:
                del image  # before the next one is decoded
            sources.append(source)
            numbers.append(index)
            labels.append(_label_of(item))
        if not singles:
            return _Made(None, faults, failures)
        batch = self._processing.joined(singles, lambda: map(load_image, sources))
        given = None if any(label is None for label in labels) else labels
        return _Made(Labelled(batch, numbers, given), faults, failures)


def refuse_bad(lines: Sequence[str]) -> NoReturn:
    """Refuse images because of some, a line for each, that are bad.

    Raises:
        ImageFileError: Always.
    """
    raise ImageFileError(f"{_counted(lines)}, and none may be: {first_few(lines)}")


def warn_of_skipped(lines: Sequence[str]) -> None:
    """Warn of images that were left out, a line for each, if there are any; the record has all as ``skipped``."""
    if lines:
        logger.warning("%s and skipped: %s", _counted(lines), first_few(lines), extra={"skipped": list(lines)})


class _Made(NamedTuple):
    """A batch, ``None`` if no image of it is good, a line for each bad one, and on how many the processor failed."""

    batch: Labelled | None
    faults: list[str]
    failures: int


def is_batch(item: Any) -> bool:
    """Whether an item is a ready batch: a tensor, tensors by name, or such a one with its labels."""
    first = item[0] if isinstance(item, list | tuple) and item else item
    return isinstance(first, torch.Tensor) or (isinstance(first, Mapping) and "image" not in first and _tensors(first))


def _tensors(batch: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in batch.values())


def _label_of(item: Any) -> Any:
    """The label of an image, the labels of a batch, or ``None``."""
    if not isinstance(item, Mapping):
        return None
    return next((item[name] for name in _LABELS if item.get(name) is not None), None)


def _counted(lines: Sequence[str]) -> str:
    return "1 image is bad" if len(lines) == 1 else f"{len(lines)} images are bad"
