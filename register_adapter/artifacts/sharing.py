"""Work over several processes: each sums over its share of the images, and all end with the same sums."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Subset

from ..data.batches import is_batch, list_images
from ..data.images import ImageFileError
from .statistics import Statistics

__all__ = ["run_shared", "share_of", "together"]

T = TypeVar("T")


def share_of(images: Any, max_images: int | None, index: int, count: int) -> Any:
    """The images of one of ``count`` processes, every ``count``-th; ``None`` if there are none for it.

    Args:
        images: As for :func:`audit`; of ready batches every ``count``-th batch.
        max_images: Use at most the first so many.
        index: The process.
        count: How many there are.

    Raises:
        ValueError: ``max_images`` with ready batches, whose images are not counted before.
    """
    if isinstance(images, str | Path):
        images = list_images(images)
    if isinstance(images, torch.Tensor):
        share = images[:max_images][index::count]
        return share if len(share) else None
    sized = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    first = (images[0] if len(images) else None) if sized else None
    if not sized:
        items = iter(images)
        first = next(items, None)
        images = chain([] if first is None else [first], items)
    if max_images is not None and first is not None and is_batch(first):
        raise ValueError(
            "several processes share ready batches one by one; leave out max_images, or give fewer batches"
        )
    if sized:
        places = range(index, len(images) if max_images is None else min(len(images), max_images), count)
        return Subset(images, places) if places else None
    share_left = islice(images, index, max_images and min(max_images, sys.maxsize), count)
    own = next(share_left, None)
    return None if own is None else chain([own], share_left)


def together(work: Callable[[], T]) -> list[T]:
    """Run one process's part of a work that all of them do, and give all of them the results.

    Args:
        work: Gives what can be pickled, tensors on the CPU.

    Returns:
        The results of all processes, in their order.

    Raises:
        Exception: What a process raised, in all of them: the others would wait for it.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = _portable(error)
    outcomes: list[tuple[Exception | None, Any]] = gather_object([(failure, result)])
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [given for _, given in outcomes]


def _portable(error: Exception) -> Exception:
    """The error, or what it says, if it cannot go to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def run_shared(
    statistics: Statistics, run: Callable[[], None], skipped: Callable[[], list[str]], strict: bool
) -> list[str]:
    """Run one process's pass, then give all processes the sums of all of them.

    Args:
        statistics: What the pass adds to.
        run: Makes the pass over this process's share.
        skipped: Says which images were left out, a line each.
        strict: Whether bad images end the audit.

    Returns:
        The lines of all processes.

    Raises:
        ImageFileError, RegisterAdapterError, ValueError: What a process raised, in all of them.
    """

    def work() -> tuple[Any, list[str]]:
        try:
            run()
        except ImageFileError:
            # A share without a good image is none without the others' being so.
            if strict:
                raise
        return statistics.sums(torch.device("cpu")), skipped()

    outcomes = together(work)
    lines = [line for _, own in outcomes for line in own]
    own = PartialState().process_index
    for place, (sums, _) in enumerate(outcomes):
        if place != own:
            statistics.add_sums(sums)
    if not statistics.num_images and lines:
        raise ImageFileError(f"none of {len(lines)} files is an image that can be read: {lines[0]}")
    return lines
