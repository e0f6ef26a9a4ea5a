"""The one atomic write: files are written aside and moved into place when all of them are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["check_target", "check_writable", "scratch_folder", "staged", "write_text"]

_PREFIX, _LOCK = ".register_adapter.", ".lock"
#: Held while files are moved; its name is none of a scratch folder's.
_MOVING, _PATIENCE = ".register_adapter-moving.lock", 60
#: Seconds within which a scratch folder without a lock is taken for one whose process is alive.
_NEW = 60


@contextmanager
def staged(folder: str | Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """A scratch folder whose files replace those of ``folder`` when the block ends without an exception.

    The scratch folder is inside ``folder``, so that every move is a rename on one file system, also where the folder
    is a mount point, a link, or has a parent that cannot be written. What killed processes left there is removed.

    Args:
        folder: The target; it is made if it is missing.
        last: Names of files that are moved after all others, in this order: those that say what is there.

    Yields:
        The scratch folder.

    Raises:
        OSError: Nothing can be written there, or a file could not be written; what was there before is untouched.
        ValueError: The target is a file.
    """
    target = Path(folder)
    check_target(target)
    with scratch_folder(target) as scratch:
        yield scratch
        files = [path for path in scratch.rglob("*") if path.is_file() and path != scratch / _LOCK]
        order = {name: place for place, name in enumerate(last, 1)}
        with _alone(target):
            for file in sorted(files, key=lambda path: (order.get(path.name, 0), path)):
                place = target / file.relative_to(scratch)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep others from moving their files into ``target`` meanwhile, so that no two sets are mixed.

    Raises:
        OSError: Another process moves files there, and does not come to an end.
    """
    lock = FileLock(target / _MOVING, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"another process is moving files into {target}, since more than {_PATIENCE} s") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        yield
    finally:
        if lock.is_locked:  # gone while it is held: whoever waits for it makes a new one
            with suppress(OSError):
                (target / _MOVING).unlink()
        lock.release()


@contextmanager
def scratch_folder(parent: str | Path) -> Iterator[Path]:
    """A folder in ``parent`` that is gone after the block; what killed processes left there is removed first.

    Raises:
        OSError: Nothing can be written there.
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    _sweep(Path(parent))
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    # Held as long as this process lives: what nobody holds was left by a process that was killed.
    lock = FileLock(scratch / _LOCK)
    try:
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire()
        yield scratch
    finally:
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the scratch folders in ``folder`` that belong to no living process."""
    for scratch in folder.glob(f"{_PREFIX}*"):
        with suppress(Timeout, OSError, NotImplementedError):
            if not (scratch / _LOCK).exists() and time.time() - scratch.stat().st_mtime < _NEW:
                continue  # its process is about to lock it
            with FileLock(scratch / _LOCK, timeout=0):
                shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole, or leave the one before.

    Raises:
        OSError: It cannot be written.
    """
    target = Path(path)
    with staged(target.parent) as scratch:
        (scratch / target.name).write_text(text, "utf-8")


def check_target(folder: str | Path) -> None:
    """Say what would keep a folder from being made or written into, before any work; nothing stays behind.

    Raises:
        OSError: It, or the folder that it would be made in, cannot be written into.
        ValueError: The target, or something above it, is a file; or it has no name.
    """
    if not os.fspath(folder):
        raise ValueError("the name of the folder to write into is empty; name one")
    target = Path(folder)
    for place in (target, *target.absolute().parents):
        if not os.path.lexists(place):
            continue
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; name a folder to write into")
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{place} is a link to {place.readlink()}, which is not there; name another folder")
        _try(place)
        return


def _try(folder: Path) -> None:
    """Make something in a folder, and take it away: permissions do not say it all (``/proc``, a read-only disk)."""
    try:
        trial = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
    except OSError as error:
        said = f"nothing can be written into the folder {folder} ({error.strerror}); name another one"
        raise type(error)(said) from error
    with suppress(OSError):
        Path(trial).rmdir()


def check_writable(folder: str | Path) -> None:
    """Make the folder and try to write into it, before work is done whose result would be lost.

    Raises:
        OSError: Nothing can be written there.
        ValueError: The target is a file.
    """
    with staged(folder):
        pass
