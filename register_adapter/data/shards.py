"""Tar shards whose end is not where their reader stops: Python's takes a damaged header for the end, in silence."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..utils.files import open_regular
from ..utils.text import printable

__all__ = ["SHARD", "check_shards", "names_shards"]

logger = logging.getLogger(__name__)

#: The column in which ``datasets`` says of every item of a webdataset which shard it comes from.
SHARD = "__url__"
#: Bytes behind the end mark that are looked at; it is filled up to 10,240 with zeros.
_BEHIND = 2**16


def names_shards(features: Mapping[str, Any]) -> bool:
    """Whether a data set has that column: names of shards, and nothing else."""
    return getattr(features.get(SHARD), "dtype", None) == "string"


def check_shards(places: Iterable[str | None]) -> None:
    """Look through the headers of the tar files among some shards for what keeps a reader from their end.

    Compressed shards are left out, which have their own checksums, and those that are not on this machine.

    Args:
        places: Paths or addresses of shards; a shard without an end mark is warned of.

    Raises:
        ValueError: A part of a shard is not read.
    """
    for place in places:
        if place is None or "://" in place or not (path := Path(place)).is_file():
            continue
        size = path.stat().st_size
        end = _end_of_members(path)
        if end is None:
            continue
        if end == size:
            logger.warning("the shard %s has no end mark: it may have been cut behind its last image", printable(place))
        elif _has_more(path, end):
            raise ValueError(
                f"the shard {place} is damaged, or several in one: nothing behind byte {end:,} of {size:,} is read. "
                "Write it anew, or take it out"
            )


def _end_of_members(path: Path) -> int | None:
    """Where the reader stops; ``None`` if it is no plain tar file, or if the reader itself tells what is wrong."""
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while tar.next() is not None:
                vars(tar)["members"] = []  # it keeps them all
            return tar.offset
    except tarfile.TarError:
        return None


def _has_more(path: Path, end: int) -> bool:
    """Whether there is anything but zeros soon behind a place."""
    with open_regular(path) as file:
        file.seek(end)
        return bool(file.read(_BEHIND).strip(b"\0"))
