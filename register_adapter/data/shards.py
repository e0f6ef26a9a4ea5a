"""Shards on this machine of which readers would leave something out, or take labels for others, in silence.

Python's reader of tar files takes a damaged header for the end; ``datasets`` goes by the classes of the first shard.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..utils.files import open_regular
from ..utils.text import one_line, printable

__all__ = ["SHARD", "check_shards", "check_shards_of", "damaged_shard", "names_shards"]

logger = logging.getLogger(__name__)

#: The column in which ``datasets`` says of every item of a webdataset which shard it comes from.
SHARD = "__url__"
#: Bytes behind the end mark that are looked at; it is filled up to 10,240 with zeros.
_BEHIND = 2**16
#: What every error of a reader of tar files is.
_FAULTS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
#: Ends of the names of shards.
_SHARDS = (".parquet", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def names_shards(features: Mapping[str, Any]) -> bool:
    """Whether a data set has that column: names of shards, and nothing else."""
    return getattr(features.get(SHARD), "dtype", None) == "string"


def check_shards_of(folder: str | Path) -> None:
    """Look for shards of a folder that would be left out in silence, or read by the classes of another.

    Args:
        folder: Searched with all folders in it; what is no folder has no shards.

    Raises:
        ValueError: A shard is a link to nothing, or a tar file with zeros in the place of its first image; or parquet
            shards number their classes in different ways, of which ``datasets`` takes the first's for all.
    """
    first: dict[str, tuple[Path, list[str]]] = {}
    several = Path(folder, "README.md").is_file()  # it may describe data sets that have nothing to do with one another
    for path in _shards_of(folder):
        if not path.exists():
            raise ValueError(f"the shard {path} is a link to a file that is not there")
        if path.suffix != ".parquet" and _is_blank(path):
            raise ValueError(f"the shard {path} is damaged: it begins with zeros, and nothing of it is read")
        for column, names in _classes_of(path).items() if path.suffix == ".parquet" else ():
            other, known = first.setdefault(column, (path, names))
            if names != known and (sorted(names) == sorted(known) or not several):
                raise ValueError(
                    f"the shards {other} and {path} number the classes of {column!r} in different ways "
                    f"({one_line(', '.join(known), 80)}; {one_line(', '.join(names), 80)}), and those of the first "
                    "would be taken for all. Write them with the same ClassLabel"
                )


def _classes_of(path: Path) -> dict[str, list[str]]:
    """The classes of each column that has some, as ``datasets`` notes them in a footer; a damaged one has none."""
    with suppress(*_FAULTS, pyarrow.ArrowException, ValueError, TypeError, AttributeError), open_regular(path) as file:
        noted = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface")
        features = json.loads(noted)["info"]["features"] if noted else {}
        return {column: list(kind["names"]) for column, kind in features.items() if "names" in kind}
    return {}


def damaged_shard(folder: str | Path) -> Path | None:
    """The first shard of a folder that cannot be read, if there is one: readers do not name it.

    Of parquet the footers are read, of tar files the headers.
    """
    for path in _shards_of(folder):
        try:
            with open_regular(path) as file:
                if path.suffix == ".parquet":
                    pyarrow.parquet.read_schema(file)
                    continue
                with tarfile.open(fileobj=file, mode="r:*") as tar:
                    _read_headers(tar)
        except (*_FAULTS, pyarrow.ArrowException):
            return path
    return None


def _shards_of(folder: str | Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        below.sort()
        yield from (Path(place, name) for name in sorted(files) if name.endswith(_SHARDS))


def _read_headers(tar: tarfile.TarFile) -> None:
    while tar.next() is not None:
        vars(tar)["members"] = []  # it keeps them all


def _is_blank(path: Path) -> bool:
    """Whether a tar file has no image and is more than the end mark."""
    with suppress(*_FAULTS), open_regular(path) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
        content: Any = tar.fileobj
        if vars(tar)["firstmember"] is None:  # next() looks before the beginning then, with Python 3.10
            content.seek(0)
            return len(behind := content.read(_BEHIND)) == _BEHIND or any(behind)
    return False


def check_shards(places: Iterable[str | None]) -> None:
    """Look through the headers of the tar files among some shards for what keeps a reader from their end.

    Compressed shards are decompressed for it. Those that are not on this machine are left out.

    Args:
        places: Paths or addresses of shards; a shard without an end mark is warned of.

    Raises:
        ValueError: A part of a shard is not read.
    """
    for place in places:
        if place is None or "://" in place or not (path := Path(place)).is_file():
            continue
        found = _end_of_members(path)
        if found is None:
            continue
        end, behind = found
        if not behind:
            logger.warning("the shard %s has no end mark: it may have been cut behind its last image", printable(place))
        elif behind.strip(b"\0"):
            raise ValueError(
                f"the shard {place} is damaged, or several in one: nothing behind byte {end:,} of the tar file is "
                "read. Write it anew, or take it out"
            )


def _end_of_members(path: Path) -> tuple[int, bytes] | None:
    """Where the reader stops, and what is there; ``None`` if it is no tar file, or the reader tells of a fault."""
    with open_regular(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:*") as tar:
                _read_headers(tar)
                content: Any = tar.fileobj  # without the compression
                content.seek(tar.offset)
                return tar.offset, content.read(_BEHIND)
        except _FAULTS:
            return None
