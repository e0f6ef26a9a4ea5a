"""Opening files that somebody else may have put there."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["checksum", "open_regular"]


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device could keep a reader waiting for ever.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    return Path(path).open("rb")
