"""One training run in a folder at a time: a lock of the operating system's, which ends with its process."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from ..errors import RegisterAdapterError
from ..utils.files import read_text

__all__ = ["FolderInUseError", "folder_lock", "folder_lock_of_run"]

#: The lock, and who holds it: a file of its own, because some versions of filelock empty the lock's.
_LOCK, _HOLDER = ".register_adapter-training.lock", ".register_adapter-training.txt"
#: Seconds within which the children of a killed run notice that it is gone, and let go of what they inherited.
_PATIENCE = 15
#: Folder to the thread of this process that holds it.
_held: dict[Path, int] = {}


class FolderInUseError(RegisterAdapterError, ValueError):
    """Another training run writes into the folder."""


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Keep other training runs out of a folder for the length of the context; it is made if it is missing.

    Folders that it made go again if they are empty at the end, as after a run that was refused. The same thread may
    enter it again. Where the file system has no locks, nothing is locked.

    Raises:
        FolderInUseError: Another run is in it; the message names its process.
        OSError: The folder cannot be made.
        ValueError: It is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"output_dir {target} is a file; name a folder")
    missing = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    place = target.resolve()
    if _held.get(place) == threading.get_ident():
        yield
        return
    lock = FileLock(place / _LOCK)
    with suppress(OSError, NotImplementedError):  # a file system without locks
        _acquire(lock, place, target)
    _held[place] = threading.get_ident()
    with suppress(OSError):
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        (place / _HOLDER).unlink(missing_ok=True)  # a pipe would be waited for, and a link's target written over
        with (place / _HOLDER).open("x", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {platform.node()} {started}\n")
    try:
        yield
    finally:
        del _held[place]
        for name in (_HOLDER, _LOCK) if lock.is_locked else ():
            with suppress(OSError):
                (place / name).unlink()
        lock.release()
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def folder_lock_of_run(folder: str | Path, state: PartialState | Accelerator) -> Iterator[None]:
    """The lock of a run on several processes: the main one holds it, and all are refused together.

    Every process enters it; the others would wait for one that has ended.

    Raises:
        FolderInUseError: Another run is in it.
        OSError: The folder cannot be made.
        ValueError: It is a file.
    """
    with ExitStack() as held:
        fault: Exception | None = None
        if state.is_main_process:
            try:
                held.enter_context(folder_lock(folder))
            except (OSError, ValueError) as error:
                fault = error
        if (met := gather_object([fault])[0]) is not None:
            raise met
        yield


def _acquire(lock: FileLock, place: Path, shown: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process, host, started = _holder(place)
        if host == platform.node() and not _lives(process):
            with suppress(Timeout):
                lock.acquire(timeout=_PATIENCE)
                return
        who = f"process {process} on {host}, since {started}" if process else "another process"
        raise FolderInUseError(
            f"{shown} is in use by another run ({who}); wait for its end, stop it, or choose another --output-dir"
        ) from None


def _holder(place: Path) -> tuple[int, str, str]:
    """Process, host and start of the run that holds the lock; zeros and nothing if it does not say."""
    try:
        process, host, started = read_text(place / _HOLDER).strip().split(" ", 2)
        return int(process), host, started
    except (OSError, ValueError):
        return 0, "", ""


def _lives(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
