"""Items of data sets whose images cannot be read are left out before anything is trained on them."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from ..utils.text import first_few
from .images import ImageFileError, check_image, image_name

__all__ = ["item_name", "skip_bad"]

logger = logging.getLogger(__name__)


def skip_bad(
    dataset: Dataset,
    image_column: str = "image",
    decode: bool = True,
    strict: bool = False,
    num_workers: int = 4,
    progress: bool = True,
) -> tuple[Dataset, list[str]]:
    """Leave out the items whose images cannot be read, and say which; classes and their numbers stay.

    Every process checks its share of the items.

    Args:
        dataset: A ``datasets.Dataset`` with undecoded images.
        image_column: Column with the images.
        decode: Decode every image whole, or read headers only.
        strict: Refuse instead of skipping.
        num_workers: Number of threads per process.
        progress: Show a bar.

    Returns:
        The data set without bad items, and a line for each of those: its name and what is wrong.

    Raises:
        ImageFileError: ``strict`` and an image is bad, or none is good.
    """
    state = PartialState()
    share = range(state.process_index, len(dataset), state.num_processes)
    images = dataset.select_columns([image_column])

    def check(index: int) -> tuple[int, str] | None:
        source = images[index][image_column]
        fault = check_image(source, decode)
        return (index, f"{item_name(source, index)}: {fault}") if fault else None

    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        results = tqdm(
            pool.map(check, share),
            "checking images",
            len(share),
            unit="file",
            disable=not (progress and state.is_local_main_process),
        )
        mine = [result for result in results if result is not None]
    faults = dict(sorted(gather_object(mine)))
    if not faults:
        return dataset, []
    lines = list(faults.values())
    if strict:
        counted = f"{len(lines)} of {len(dataset)} files are bad"
        raise ImageFileError(f"{counted}, and none may be (strict): {first_few(lines)}")
    if len(faults) == len(dataset):
        raise ImageFileError(f"none of {len(dataset)} files is an image that can be read: {first_few(lines)}")
    if state.is_main_process:
        logger.warning("%d of %d files are bad and skipped: %s", len(lines), len(dataset), first_few(lines))
    return dataset.select([index for index in range(len(dataset)) if index not in faults]), lines


def item_name(source: Any, index: int) -> str:
    """What to call an item in a message: the path of its image, or its number where it has none."""
    name = image_name(source)
    return name if isinstance(source, dict) and source.get("path") else f"item {index} ({name})"
