"""The pictures of a fit in three parts, so that nothing is chosen on what it was found on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..data.batches import Batch
from .views import number_of

__all__ = ["NUM_DETECT", "NUM_HELD_OUT", "Parts"]

#: Pictures that outliers are found on, and that the number of neurons is chosen on, at most; the others rank units.
NUM_DETECT, NUM_HELD_OUT = 64, 24


class Parts:
    """Pictures in three parts; those that rank units are streamed, the others kept.

    Where there are few pictures, a quarter is held out, and the rest serves twice.

    Args:
        batches: Batches on the model's device.
        bar: Moved on with every picture.
    """

    def __init__(self, batches: Any, bar: Any) -> None:
        self.detect: list[Batch] = []
        self.held_out: list[Batch] = []
        self.num_detect = self.num_held_out = self.num_ranked = 0
        self._batches, self._bar = batches, bar
        #: What is over of the batch in which the first two parts end.
        self._rest: list[Batch] = []
        for batch in batches:
            bar.update(number_of(batch))
            self._take(batch)
            if self.num_held_out >= NUM_HELD_OUT:
                break
        if self.num_held_out < NUM_HELD_OUT:
            self._share()

    def _take(self, batch: Batch) -> None:
        """Fill the first part, then the second."""
        first, batch = _cut(batch, NUM_DETECT - self.num_detect)
        second, batch = _cut(batch, NUM_HELD_OUT - self.num_held_out)
        self.detect += [first] if number_of(first) else []
        self.held_out += [second] if number_of(second) else []
        self._rest += [batch] if number_of(batch) else []
        self.num_detect += number_of(first)
        self.num_held_out += number_of(second)

    def _share(self) -> None:
        singles = [one for batch in [*self.detect, *self.held_out] for one in _split(batch)]
        if len(singles) < 3:
            raise ValueError(f"fitting needs at least three pictures, and {len(singles)} came")
        cut = len(singles) - max(len(singles) // 4, 1)
        self.detect, self.held_out = _joined(singles[:cut]), _joined(singles[cut:])
        self.num_detect, self.num_held_out = cut, len(singles) - cut

    def ranking(self) -> Iterator[Batch]:
        """The batches that rank units: the rest, or those of the first part if nothing is left."""
        for batch in self._rest:
            self.num_ranked += number_of(batch)
            yield batch
        for batch in self._batches:
            self._bar.update(number_of(batch))
            self.num_ranked += number_of(batch)
            yield batch
        if not self.num_ranked:
            self.num_ranked = self.num_detect
            yield from self.detect


def _cut(batch: Batch, number: int) -> tuple[Batch, Batch]:
    """The first ``number`` pictures of a batch, and the others; either may be empty."""
    total = number_of(batch)
    if isinstance(batch, torch.Tensor):
        return batch[:number], batch[number:]

    def part(chosen: slice) -> Batch:
        return {k: v[chosen] if isinstance(v, torch.Tensor) and len(v) == total else v for k, v in batch.items()}

    return part(slice(number)), part(slice(number, None))


def _split(batch: Batch) -> list[Batch]:
    """One batch a picture."""
    return [_cut(_cut(batch, index + 1)[0], index)[1] for index in range(number_of(batch))]


def _joined(singles: list[Batch]) -> list[Batch]:
    """Tensors of one shape as one batch; others stay as they are."""
    tensors = [one for one in singles if isinstance(one, torch.Tensor)]
    if len(tensors) == len(singles) and len({one.shape for one in tensors}) == 1:
        return [torch.cat(tensors)]
    return singles
