"""The one atomic write: files are written aside and moved into place when all of them are whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

__all__ = [
    "check_apart",
    "check_target",
    "check_writable",
    "file_to_write",
    "naming_files",
    "real_path",
    "scratch_folder",
    "staged",
    "sweep",
    "write_text",
]

#: What the system says of a full disk, a limit on files or on what a user may have, and a broken disk.
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota
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
    Ctrl-C and SIGTERM wait while files are moved.

    Args:
        folder: The target; it is made if it is missing.
        last: Names of files that are moved after all others, in this order: those that say what is there.

    Yields:
        The scratch folder.

    Raises:
        OSError: Nothing can be written there, a file could not be written, or a folder is in its place; what was there
            before is untouched.
        ValueError: The target is a file, or it has no name.
    """
    check_target(folder)
    target = Path(folder)
    with scratch_folder(target) as scratch:
        with naming_files(scratch, target):
            yield scratch
        files = [path for path in scratch.rglob("*") if path.is_file() and path != scratch / _LOCK]
        order = {name: place for place, name in enumerate(last, 1)}
        with _alone(target), _to_the_end():
            _check_free(target, [file.relative_to(scratch) for file in files])
            for file in sorted(files, key=lambda path: (order.get(path.name, 0), path)):
                place = target / file.relative_to(scratch)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)


class _NotWrittenError(OSError):
    """A write failed; ``place`` is what was to be written, as long as it lies in a scratch folder."""

    def __init__(self, place: Path, why: str) -> None:
        super().__init__(f"{place} cannot be written: {why}")
        self.place, self.why = place, why


@contextmanager
def naming_files(scratch: Path, target: Path) -> Iterator[None]:
    """Have a write that fails name its file; a full disk, or a limit, is told by the system without a name.

    Args:
        scratch: Where files are written.
        target: Where they are to be.

    Raises:
        OSError: In the place of one without a name, or with that of a scratch folder, or of safetensors' own.
    """
    try:
        yield
    except _NotWrittenError as error:  # of a scratch folder in this one
        raise _NotWrittenError(_moved(error.place, scratch, target), error.why) from error
    except OSError as error:
        if error.errno is None and str(scratch) in str(error):  # of a save into it, in that one's words
            raise OSError(str(error).replace(str(scratch), str(target))) from error
        if error.errno not in _FULL:
            raise
        place = _newest(scratch) if error.filename is None else Path(os.fsdecode(error.filename))
        raise _NotWrittenError(_moved(place, scratch, target), error.strerror or str(error)) from error
    except SafetensorError as error:
        if not any(os.strerror(number) in str(error) for number in _FULL):
            raise
        # It leaves nothing of its file.
        raise _NotWrittenError(target, str(error)) from error


def _newest(scratch: Path) -> Path:
    """The file that was written last."""
    files = [path for path in scratch.rglob("*") if path.is_file() and path.name != _LOCK]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=scratch)


def _moved(place: Path, scratch: Path, target: Path) -> Path:
    return target / place.relative_to(scratch) if place.is_relative_to(scratch) else place


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
def _to_the_end() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait: files of which half are moved are neither the old ones nor the new ones."""
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals come to no other
        listens = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in listens.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        with ExitStack() as last:  # the others too where a handler raises; from the last one to the first
            for number in reversed(came):
                last.callback(signal.raise_signal, number)
            for number, handler in before.items():
                last.callback(signal.signal, number, handler)


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


def sweep(folder: Path) -> None:
    """Remove what processes left that were killed behind their last write into a folder, which has all it will have."""
    _sweep(folder)
    if (folder / _MOVING).exists():
        with suppress(OSError), _alone(folder):
            pass


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
        ValueError: It is a folder, or has no name.
    """
    target = file_to_write(path)
    with staged(target.parent) as scratch:
        (scratch / target.name).write_text(text, "utf-8")


def file_to_write(path: str | Path) -> Path:
    """The path of a file that can be written, before any work.

    Raises:
        OSError: Its folder cannot be written into.
        ValueError: It is a folder, it has no name, or something above it is a file.
    """
    if not os.fspath(path):
        raise ValueError("the name of the file to write is empty; name one")
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name a file in it")
    check_target(target.parent)
    return target


def check_target(folder: str | Path, *class_folders: str | Path | None, files: Sequence[str | Path] = ()) -> None:
    """Say what would keep a folder from being made or written into, before any work; nothing stays behind.

    Args:
        folder: The target.
        class_folders: Folders of images with a sub-folder per class, in which the target would be a class.
        files: Names of what is to be written there.

    Raises:
        OSError: It, or the folder that it would be made in, cannot be written into; or a folder is in a file's place.
        ValueError: The target, or something above it, is a file; it has no name; or it lies among classes.
    """
    if not os.fspath(folder):
        raise ValueError("the name of the folder to write into is empty; name one")
    for images in class_folders:
        # What is no folder may be a word for images that the package makes.
        if images is not None and Path(images).is_dir() and _among_classes(folder, images):
            raise ValueError(
                f"{folder} is in the folder of images {images}, where it would be taken for a class; name a folder "
                "elsewhere to write into"
            )
    target = Path(folder)
    for place in (target, *target.absolute().parents):
        if not os.path.lexists(place):
            continue
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; name a folder to write into")
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{place} is a link to {place.readlink()}, which is not there; name another folder")
        _try(place)
        break
    _check_free(target, files)


def _check_free(target: Path, files: Sequence[str | Path]) -> None:
    """See that files can take their places: none is a folder, and what is above them is none but folders.

    Raises:
        OSError: One cannot.
    """
    for file in files:
        place = target / file
        if place.is_dir() and not place.is_symlink():  # a rename replaces links
            raise IsADirectoryError(
                f"{place} is a folder, where a file is to be written; move it away, or write elsewhere"
            )
        for above in place.parents[: len(Path(file).parts) - 1]:
            if above.exists() and not above.is_dir():
                raise NotADirectoryError(
                    f"{above} is a file, where a folder is to be made; move it away, or write elsewhere"
                )


def check_apart(folder: str | Path, *read: str | Path | None) -> None:
    """Refuse a folder for an adapter in which a model is: who loads the model from there would be given the adapter.

    Args:
        folder: The target.
        read: Folders that are read to make the adapter, or names, under whatever spelling.

    Raises:
        ValueError: It is one of those, or has a model's ``config.json``.
    """
    for place in read:
        if place is not None and Path(place).is_dir() and real_path(place) == real_path(folder):
            raise ValueError(f"{folder} is what the run reads; name another folder to write into")
    if Path(folder, "config.json").exists():
        raise ValueError(
            f"{folder} holds a model (config.json), and an adapter beside it would be loaded in its place; name "
            "another folder to write into"
        )


def real_path(path: str | Path) -> Path:
    """Where a name leads, to compare places; unlike ``Path.resolve`` before Python 3.13, also of a link to itself."""
    return Path(os.path.realpath(path))


def _among_classes(folder: str | Path, images: str | Path) -> bool:
    """Whether a target lies among folders of classes, or in one that a link among them leads to."""
    target, root = real_path(folder), real_path(images)
    if root in target.parents:
        return True
    with suppress(OSError), os.scandir(root) as entries:  # what cannot be listed is told by those who read it
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_symlink() and entry.is_dir():
                place = real_path(entry.path)
                if place not in (root, *root.parents) and place in (target, *target.parents):
                    return True
    return False


def _try(folder: Path) -> None:
    """Make something in a folder, and take it away: permissions do not say it all (``/proc``, a read-only disk)."""
    with suppress(OSError):
        _sweep(folder)  # what a process left that was killed in between
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
