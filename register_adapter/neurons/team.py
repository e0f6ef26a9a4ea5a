"""A fit over several processes: each looks at a part of the images, and all go by what all have seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from torch import nn
from torch.utils.data import Subset

from ..artifacts.sharing import together
from ..data.batches import Batch, batch_length, is_batch, list_images, slice_batch, warn_of_skipped
from ..data.images import ImageFileError
from ..features.passes import ImagePass, PassOptions, open_pass

__all__ = ["ImageSource", "Team"]

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a fit, by default this one alone.

    Attributes:
        index: This one.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_all(cls) -> Team:
        """Those that a launcher has started."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this one prints."""
        return self.index == 0

    def run(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in every process, in their order; all of them must call this as often.

        Raises:
            Exception: What it raised in a process, in all of them.
        """
        return [work()] if self.count == 1 else together(work)

    def each(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in this process, once it has gone well in all of them; see :meth:`run`."""
        made: list[T] = []
        self.run(lambda: made.append(work()))
        return made[0]

    def own(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Of these images every ``count``-th, in batches."""
        if self.count == 1:
            yield from batches
            return
        seen = 0
        for batch in batches:
            part = slice_batch(batch, slice((self.index - seen) % self.count, None, self.count))
            seen += batch_length(batch)
            if batch_length(part):
                yield part


class ImageSource:
    """The images of a fit, read once: every process gets the first ones, which are kept, and its part of the others.

    Of a folder or a data set a process reads no more than that. What has no length, and ready batches, come to all of
    them whole.

    Args:
        model: The model.
        images: As for :func:`~register_adapter.artifacts.audit`.
        options: How they are read.
        team: The processes.
        target_modules: As there.
    """

    def __init__(
        self, model: nn.Module, images: Any, options: PassOptions, team: Team, target_modules: str | None
    ) -> None:
        self.team, self._options = team, options
        if team.count > 1:
            images = list_images(images) if isinstance(images, str | Path) else images
            self._options = replace(options, progress=options.progress and team.is_main, report=team.is_main)
        self._images = images
        self._open: Callable[[Any, PassOptions], ImagePass] = lambda images, options: open_pass(
            model, images, options, target_modules=target_modules, title="fitting registers"
        )
        self.opened = self._open(images, self._options)
        self._read = 0
        #: A line for each image that this process has left out of its part of the others.
        self.skipped: list[str] = []

    def first(self) -> Iterator[Batch]:
        """The batches from the start on, as many as are taken."""
        for batch in self.opened:
            size = self._options.batch_size
            self._read = (batch.numbers[-1] // size + 1) * size  # bad images of the batch are read, too
            yield batch.inputs
        self._read = sys.maxsize

    def others(self) -> Iterator[Batch]:
        """This process's part of what comes behind those."""
        images = self._images
        listed = hasattr(images, "__getitem__") and hasattr(images, "__len__") and not hasattr(images, "ndim")
        if self.team.count == 1 or not listed or is_batch(images[0]):
            yield from self.team.own(batch.inputs for batch in self.opened)
            return
        self.opened.close()
        limit = self._options.max_images
        places = range(self._read + self.team.index, min(len(images), limit or len(images)), self.team.count)
        if not places:
            return
        part = self._open(Subset(images, places), replace(self._options, max_images=None, report=False))
        try:
            with closing(part):
                for batch in part:
                    yield batch.inputs
        except ImageFileError:
            # A part without a good image is none without the others' being so.
            if self._options.strict:
                raise
        self.skipped = part.skipped

    def report_skipped(self) -> None:
        """In the main process, warn of what the parts of all processes have left out."""
        parts = self.team.run(lambda: self.skipped)
        if self.team.is_main:
            warn_of_skipped([line for own in parts for line in own])
