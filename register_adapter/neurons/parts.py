"""The images of a fit in three parts, so that no unit is chosen on the images it was ranked on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..data.batches import Batch, batch_length, slice_batch
from .team import ImageSource

__all__ = ["NUM_FIRST", "NUM_HELD_OUT", "Parts"]

#: Images that say where to rank, and images that the number of neurons is chosen on, at most; units are ranked on the
#: others.
NUM_FIRST, NUM_HELD_OUT = 64, 24


class Parts:
    """Images in three parts; the first two are kept, the others streamed.

    Where there are few images, a quarter is held out, and the rest serves twice.

    Args:
        source: The images.

    Attributes:
        first: Batches of the images that say where outliers may be, this process's part of them.
        held_out: The same of those that the number of neurons is chosen on.
        num_first: Number of the former.
        num_held_out: Number of the latter.
        num_others: Number of all others that were streamed so far; of this process, until :meth:`add_up`.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.first: list[Batch] = []
        self.held_out: list[Batch] = []
        self.num_first = self.num_held_out = self.num_others = 0
        #: What is over of the batch in which the first two parts end.
        self._rest: list[Batch] = []
        for batch in source.first():
            self._take(batch)
            if self.num_held_out >= NUM_HELD_OUT:
                break
        if self.num_held_out < NUM_HELD_OUT:
            self._share()
        for name in ("first", "held_out", "_rest"):
            setattr(self, name, list(source.team.own(getattr(self, name))))

    @property
    def num_images(self) -> int:
        """Number of all images that came so far."""
        return self.num_first + self.num_held_out + self.num_others

    def _take(self, batch: Batch) -> None:
        """Fill the first part, then the second."""
        first, batch = _divided(batch, NUM_FIRST - self.num_first)
        second, batch = _divided(batch, NUM_HELD_OUT - self.num_held_out)
        self.first += [first] if batch_length(first) else []
        self.held_out += [second] if batch_length(second) else []
        self._rest += [batch] if batch_length(batch) else []
        self.num_first += batch_length(first)
        self.num_held_out += batch_length(second)

    def _share(self) -> None:
        singles = [single for batch in [*self.first, *self.held_out] for single in _one_by_one(batch)]
        if len(singles) < 3:
            raise ValueError(f"fitting needs at least three images, and {len(singles)} came")
        num_first = len(singles) - max(len(singles) // 4, 1)
        self.first, self.held_out = _joined(singles[:num_first]), _joined(singles[num_first:])
        self.num_first, self.num_held_out = num_first, len(singles) - num_first

    def others(self) -> Iterator[Batch]:
        """The batches of all other images, once."""
        for batch in self._rest:
            self.num_others += batch_length(batch)
            yield batch
        for batch in self.source.others():
            self.num_others += batch_length(batch)
            yield batch

    def add_up(self) -> None:
        """Count the others of all processes, and name what was left out."""
        self.num_others = sum(self.source.team.run(lambda: self.num_others))
        self.source.report_skipped()


def _divided(batch: Batch, number: int) -> tuple[Batch, Batch]:
    """The first ``number`` images of a batch, and the others; either may be empty."""
    return slice_batch(batch, slice(number)), slice_batch(batch, slice(number, None))


def _one_by_one(batch: Batch) -> list[Batch]:
    """A batch for each image."""
    return [slice_batch(batch, slice(index, index + 1)) for index in range(batch_length(batch))]


def _joined(singles: list[Batch]) -> list[Batch]:
    """Tensors of one shape as one batch; others stay as they are."""
    tensors = [single for single in singles if isinstance(single, torch.Tensor)]
    if len(tensors) == len(singles) and len({single.shape for single in tensors}) == 1:
        return [torch.cat(tensors)]
    return singles
