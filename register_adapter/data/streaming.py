"""Streamed data sets: images read from shards as they come, in an order that seed and epoch say, from any place on."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from .augmentation import Augmentation
from .checking import item_name, named_errors
from .datasets import ProcessedDataset
from .images import ImageFileError
from .processors import check_processor
from .shards import SHARD, check_shards

__all__ = ["StreamedBatches", "StreamedDataset"]

logger = logging.getLogger(__name__)

#: Images of the stream that a run looks at before it begins.
_HEAD = 256
#: Batches that are made ahead of the one in use.
_AHEAD = 2
#: Items whose names are remembered, for messages.
_REMEMBERED = 8192


class StreamedDataset:
    """Images that are read one after the other, such as parquet or webdataset shards; nothing knows their number.

    Args:
        stream: A ``datasets.IterableDataset`` with the columns ``image`` (not decoded), and ``label`` or ``text``.
        image_processor: A transformers image processor.
        augmentation: As for :class:`ProcessedDataset`.
        seed: Of the order; every epoch has another one.
        shuffle_buffer: The next image is drawn from so many that wait in memory; 1 keeps the stream's own order.
        strict: Refuse bad images instead of skipping them with a warning.
        name: What errors call it.

    Raises:
        ValueError: ``shuffle_buffer`` is below 1.
    """

    def __init__(
        self,
        stream: Any,
        image_processor: Callable[..., Any],
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        strict: bool = False,
        name: str = "that is streamed",
    ) -> None:
        check_processor(image_processor)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
        self.stream, self.seed, self.shuffle_buffer, self.strict = stream, seed, shuffle_buffer, strict
        self.image_processor, self.augmentation, self.name = image_processor, augmentation, name
        self.epoch, self._known = 0, set[str]()

    @cached_property
    def head(self) -> ProcessedDataset:
        """The first images of the stream, held in memory: what a run looks at before it begins.

        Raises:
            ValueError: The stream is empty, or a shard is damaged.
        """
        with named_errors(self.name):
            items = list(self.stream.take(_HEAD))
        if not items:
            raise ValueError("the stream of training images is empty")
        return ProcessedDataset(items, self.image_processor)

    def order(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """The items of an epoch from the place ``start`` on, not processed; those before it are not decoded.

        Raises:
            ValueError: A shard is damaged, or an item has a label that is of no class.
        """
        stream = self.stream
        if self.shuffle_buffer > 1:
            stream = stream.shuffle(seed=self.seed + epoch, buffer_size=self.shuffle_buffer)
        num_classes = getattr((stream.features or {}).get("label"), "num_classes", None)
        items = iter(stream.skip(start) if start else stream)
        while True:
            with named_errors(self.name):
                item = next(items, None)
            if item is None:
                return
            if (shard := item.pop(SHARD, None)) is not None and shard not in self._known:
                self._known.add(shard)
                check_shards([shard])
            label = item.get("label")
            if num_classes is not None and label is not None and label >= num_classes:
                raise ValueError(
                    f"{item_name(item['image'], start)} of {self.name} has the label {label}, and there are "
                    f"{num_classes} classes"
                )
            yield item
            start += 1


class StreamedBatches(torch.utils.data.IterableDataset[list[dict[str, Any]]]):
    """The batches of one process, as lists of items ``{"pixel_values": (3, H, W), "index": int, "epoch": int, ...}``.

    Batch k of the stream goes to process k modulo their number, so that any number of processes sees the same
    batches; every process reads all of the stream, and decodes its own part. ``index`` is the place in the epoch. What
    is left at the end of an epoch, fewer than a batch for each process, is left out.

    Args:
        dataset: The stream.
        batch_size: Images per process.
        process_index: This process.
        num_processes: How many there are.
        num_threads: Threads that decode images.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_threads: int = 1,
    ) -> None:
        super().__init__()
        self.source, self.batch_size = dataset, batch_size
        self.process_index, self.num_processes, self.num_threads = process_index, num_processes, max(1, num_threads)
        self.epoch, self.start = 0, 0
        self._items = ProcessedDataset((), dataset.image_processor, dataset.augmentation)
        self._names: OrderedDict[int, str] = OrderedDict()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = self._items.epoch = epoch

    def name_of(self, index: int) -> str:
        """What to call an item in a message: the path of its image, if it has one and was seen lately."""
        return self._names.get(index, f"item {index}")

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of an epoch, from batch ``start`` of every process on."""
        share = self.batch_size * self.num_processes
        first = self.start * share
        items = enumerate(self.source.order(self.epoch, first), first)
        waiting: deque[list[Future[dict[str, Any] | None]]] = deque()
        with ThreadPoolExecutor(self.num_threads) as pool:
            while True:
                while len(waiting) < _AHEAD and len(part := list(islice(items, share))) == share:
                    own = part[self.process_index * self.batch_size :][: self.batch_size]
                    self._remember(own)
                    waiting.append([pool.submit(self._make, index, item) for index, item in own])
                if not waiting:
                    break
                batch = [item for made in waiting.popleft() if (item := made.result()) is not None]
                if not batch:
                    raise ImageFileError(f"none of the {self.batch_size} images of a batch can be read; see above")
                first = -1
                yield batch
        if first == 0:
            raise ValueError(f"the stream has fewer than {share} images, a batch for each process")

    def _remember(self, items: list[tuple[int, dict[str, Any]]]) -> None:
        self._names |= {index: item_name(item["image"], index) for index, item in items}
        while len(self._names) > _REMEMBERED:
            self._names.popitem(last=False)

    def _make(self, index: int, item: dict[str, Any]) -> dict[str, Any] | None:
        """One item, in a thread; ``None`` if its image is bad."""
        try:
            return self._items.processed(item, index)
        except ImageFileError as error:
            if self.source.strict:
                raise
            logger.warning("skipped: %s", error, extra={"of_one_process": True})
            return None
