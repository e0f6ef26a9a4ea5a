"""Items of data sets whose images cannot be read are left out before anything is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset, Value
from tqdm.auto import tqdm

from ..utils.hub import access_error
from ..utils.text import first_few, printable
from .images import ImageFileError, check_image, image_name
from .shards import damaged_shard

__all__ = ["check_image_column", "check_labels", "item_name", "named_errors", "skip_bad"]

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
        raise ImageFileError(f"{counted}, and none may be: {first_few(lines)}")
    if len(faults) == len(dataset):
        raise ImageFileError(f"none of {len(dataset)} files is an image that can be read: {first_few(lines)}")
    if state.is_main_process:
        logger.warning("%d of %d files are bad and skipped: %s", len(lines), len(dataset), first_few(lines))
    return dataset.select([index for index in range(len(dataset)) if index not in faults]), lines


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Give whatever the library ``datasets`` raises within the name of the data set, and of a local shard.

    Raises:
        HubAccessError: The Hub could not be reached, or refused; the message does not show the token.
        ValueError: Something was raised; an ``OSError`` or ``ValueError`` with the name in it passes as it is.
    """
    try:
        yield
    except Exception as error:
        if (refused := access_error(name, error)) is not None:
            raise refused from refused.__cause__
        if isinstance(error, OSError | ValueError) and name in str(error):
            raise
        cause = error.__cause__ or error  # generating a data set ends with an error that says no more than that
        said = printable(" ".join(str(cause).split()) or "no message")
        where = f"; the shard {shard} is damaged" if (shard := damaged_shard(name)) is not None else ""
        raise ValueError(f"the data set {name} cannot be read ({type(cause).__name__}: {said:.300}){where}") from error


def check_image_column(feature: Any, column: str, name: str) -> None:
    """Refuse a column that no image can stand in, before anything is read.

    Raises:
        ValueError: It has numbers, or something else that is no image, no path and no file's content.
    """
    kind = getattr(feature, "dtype", "")
    is_value = isinstance(feature, Value) and kind not in ("string", "large_string", "binary", "large_binary")
    if is_value or isinstance(feature, ClassLabel):
        raise ValueError(
            f"column {column!r} of {name} holds {kind}, and no images, paths or bytes of images; name the column with "
            "--image-column-name"
        )


def check_labels(data: Dataset, name: str, num_classes: int) -> None:
    """Refuse items without a label now, and not when a run comes to them.

    Raises:
        ValueError: A label is ``None`` or negative, as in sets for a competition, or beyond the classes.
    """
    labels = data.unique("label")
    if beyond := sorted(label for label in labels if label is not None and label >= num_classes):
        place = list(data["label"]).index(beyond[0])
        raise ValueError(f"item {place} of {name} has the label {beyond[0]}, and there are {num_classes} classes")
    if all(label is not None and label >= 0 for label in labels):
        return
    missing = [index for index, label in enumerate(data["label"]) if label is None or label < 0]
    if missing:
        first = ", ".join(map(str, missing[:5])) + (" …" if missing[5:] else "")
        raise ValueError(
            f"{len(missing)} of {len(data)} items of {name} have no label (items {first}); "
            "take them out, name another column with --label-column-name, or train without labels (--objective)"
        )


def item_name(source: Any, index: int) -> str:
    """What to call an item in a message: the path of its image, or its number where it has none."""
    name = image_name(source)
    return name if isinstance(source, dict) and source.get("path") else f"item {index} ({name})"
