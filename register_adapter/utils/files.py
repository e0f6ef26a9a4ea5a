"""Opening files that somebody else may have put there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["check_regular", "checksum", "finite", "open_regular", "parse_json", "read_text", "strict_json"]

#: Bytes of a text that is read: far beyond any config or report.
_MAX_TEXT = 2**28


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device could keep a reader waiting for ever.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    _refuse_special(path, Path(path).stat().st_mode)  # opening some devices does something by itself
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - handed on
    try:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced meanwhile
    except OSError:
        file.close()
        raise
    return file


def read_text(path: str | Path) -> str:
    """The text of a regular file in UTF-8.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
        ValueError: It is not UTF-8, or far too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_TEXT:
            raise ValueError(f"{path} has {size} bytes, and at most {_MAX_TEXT} are read")
        content = file.read(_MAX_TEXT)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; whatever is wrong with it is a ``ValueError``.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def strict_json(values: Any, indent: int) -> str:
    """JSON that every reader takes: a number that is not finite becomes ``null``, for which JSON has no other word."""
    return json.dumps(finite(values), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The same dictionaries, lists and values, with ``None`` for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_regular(folder: str | Path, deep: bool = False) -> None:
    """Look for what would keep another library waiting that reads the files of a folder; no folder is fine.

    Args:
        folder: The folder, or what may be one.
        deep: Look into the folders below too.

    Raises:
        OSError: A pipe, a socket or a device is in it, or in its place.
    """
    mode = _mode(folder)
    if mode is not None and not stat.S_ISDIR(mode):
        _refuse_special(folder, mode)
    for place, below, files in os.walk(folder):
        for path in (Path(place, name) for name in sorted(files)):
            if path.exists():
                _refuse_special(path, path.stat().st_mode)
        if not deep:
            below.clear()


def _mode(path: str | Path) -> int | None:
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):  # not there, or not to be seen, or no path at all
        return None


def _refuse_special(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, and a file is needed")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is not a regular file but a pipe, a socket or a device")


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
