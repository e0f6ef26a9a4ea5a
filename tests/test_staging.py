"""The one atomic write: whole files or those before, also where only the folder itself can be written."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from register_adapter import add_registers, export_program, save_adapters, save_native
from register_adapter.studies import study
from register_adapter.testbed import load_vit
from register_adapter.utils.staging import check_writable, staged, write_text
from register_adapter.viz import plot_attention, read_examples


def test_files_are_moved_when_all_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "kept").write_text("kept")
    with staged(tmp_path, last=("a",)) as scratch:
        (scratch / "a").write_text("new")
        (scratch / "below").mkdir()
        (scratch / "below" / "b").write_text("b")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"a", "kept", "below", "below/b"}
    assert (tmp_path / "a").read_text() == "new"


def test_what_was_there_is_untouched_after_an_exception(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"):
        _write_half(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def _write_half(folder: Path) -> None:
    with staged(folder) as scratch:
        (scratch / "a").write_text("half")
        raise OSError("the disk is full")


def test_a_file_is_not_a_folder_to_write_into(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "text\n")
    assert (tmp_path / "file").read_text() == "text\n"
    with pytest.raises(ValueError, match="is a file"):
        check_writable(tmp_path / "file")


def write_half(folder: Path, half: Any) -> None:
    with staged(folder) as scratch:
        (scratch / "half").write_text("half")
        half.set()
        time.sleep(600)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    half = multiprocessing.Event()
    killed = multiprocessing.get_context("fork").Process(target=write_half, args=(tmp_path, half))
    killed.start()
    assert half.wait(600)
    with staged(tmp_path):
        assert len(list(tmp_path.glob(".register_adapter.*"))) == 2, "a living process lost its folder"
    killed.kill()
    killed.join()
    assert len(list(tmp_path.glob(".register_adapter.*"))) == 1
    check_writable(tmp_path)
    assert not list(tmp_path.glob(".register_adapter.*"))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_what_was_left_beside_a_folder_that_was_not_made_is_removed(tmp_path: Path) -> None:
    """By a process that was killed while it tried to write into the folder that the target would be made in."""
    left = tmp_path / ".register_adapter.left"
    left.mkdir()
    os.utime(left, (0, 0))
    with staged(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_on_another_disk_is_written_through(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        (tmp_path / "out").symlink_to(elsewhere)
        with staged(tmp_path / "out") as scratch:
            (scratch / "below").mkdir()
            (scratch / "below" / "a").write_text("a")
        assert names(Path(elsewhere)) == {"below", "below/a"}
        assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == {"out"}


def test_a_link_to_another_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write_text(tmp_path / "out" / "a", "a")
    assert names(tmp_path) == {"out", "real", "real/a"}


def test_a_parent_that_cannot_be_written_is_no_matter(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "out").mkdir()
    tmp_path.chmod(0o500)
    try:
        write_text(tmp_path / "out" / "a", "a")
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == {"out", "out/a"}


def test_two_sets_of_files_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first has moved one of its two files, and waits for the other."""
    waiting: list[threading.Thread] = []
    replace = Path.replace

    def slow(self: Path, target: Any) -> Any:
        if not waiting:
            waiting.append(threading.Thread(target=write_pair, args=(tmp_path, "second")))
            waiting[0].start()
            time.sleep(0.3)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    write_pair(tmp_path, "first")
    waiting[0].join()
    assert {(tmp_path / name).read_text() for name in ("a", "b")} == {"second"}
    assert names(tmp_path) == {"a", "b"}


def write_pair(folder: Path, text: str) -> None:
    with staged(folder) as scratch:
        for name in ("a", "b"):
            (scratch / name).write_text(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_wait_while_files_are_moved(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them would be neither the old adapters nor the new ones, and no load would take them."""
    move = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        moved = move(path, target)
        signal.raise_signal(number)
        return moved

    def leave(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    def write() -> None:
        with staged(tmp_path, last=("b",)) as scratch:
            for name in ("a", "b"):
                (scratch / name).write_text("new")

    before = signal.signal(number, leave)
    try:
        for name in ("a", "b"):
            (tmp_path / name).write_text("old")
        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write()
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)


def test_signals_that_waited_all_come_where_a_handler_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and then SIGTERM: whoever goes on after the first is still told of the second."""
    move, numbers, came = Path.replace, [signal.SIGINT, signal.SIGTERM], list[int]()

    def interrupted(path: Path, target: Path) -> Path:
        for number in numbers:
            signal.raise_signal(number)
        return move(path, target)

    def leave(number: int, _: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt(number)

    def write() -> None:
        with staged(tmp_path) as scratch:
            (scratch / "a").write_text("new")

    before = [signal.signal(number, leave) for number in numbers]
    try:
        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write()
        assert came == numbers
        assert [signal.getsignal(number) for number in numbers] == [leave, leave]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_move_that_does_not_come_to_an_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("register_adapter.utils.staging._PATIENCE", 0.1)
    with FileLock(tmp_path / ".register_adapter-moving.lock"), pytest.raises(OSError, match="another process"):
        write_text(tmp_path / "a", "a")
    write_text(tmp_path / "a", "a")
    assert names(tmp_path) == {"a"}


LIMITED = pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on files")
WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda folder: (folder / "big").write_text("x" * 10_000),
    "tensors": lambda folder: save_file({"x": torch.zeros(10_000)}, folder / "big"),
    "in a folder": lambda folder: ((folder / "below").mkdir(), (folder / "below" / "big").write_text("x" * 10_000)),
    "in a scratch folder": lambda folder: write_text(folder / "big", "x" * 10_000),
    "after another": lambda folder: ((folder / "a").write_text("a"), (folder / "big").write_text("x" * 10_000)),
}


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files, which the system does not enforce by a signal meanwhile."""
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@LIMITED
@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_whole_is_named(writer: str, tmp_path: Path) -> None:
    # safetensors leaves nothing of a file, and nothing to tell its name by.
    place = tmp_path / "out" / {"in a folder": "below/big", "tensors": ""}.get(writer, "big")
    said = f"^{re.escape(str(place))} cannot be written: .*File too large"
    with pytest.raises(OSError, match=said), staged(tmp_path / "out") as scratch:
        WRITERS[writer](scratch)
    assert not list((tmp_path / "out").iterdir())


def test_other_faults_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), staged(tmp_path):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(ConnectionError, match=r"^no network$"), staged(tmp_path):
        raise ConnectionError("no network")


def test_words_about_a_scratch_folder_are_about_the_folder(tmp_path: Path) -> None:
    said = rf"^could not be saved to {re.escape(str(tmp_path))}/new: full$"
    with pytest.raises(OSError, match=said), staged(tmp_path) as scratch:
        raise OSError(f"could not be saved to {scratch}/new: full")


@pytest.mark.parametrize(
    "call", ["save_pretrained", "save_adapters", "save_native", "export_program", "save", "plot", "study"]
)
def test_an_empty_name_is_not_the_folder_where_the_process_runs(call: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    model = add_registers(load_vit(), 1)
    calls: dict[str, Any] = {
        "save_pretrained": lambda: model.save_pretrained(""),
        "save_adapters": lambda: save_adapters(model, ""),
        "save_native": lambda: save_native(load_vit(), ""),
        "export_program": lambda: export_program(model, ""),
        "study": lambda: study(load_vit(), "photos", ""),
        "save": lambda: write_text("", "text"),
        "plot": lambda: plot_attention(read_examples({"base": (model, None)}, [torch.zeros(3, 80, 80)])[0], path=""),
    }
    with pytest.raises(ValueError, match="is empty; name one"):
        calls[call]()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_is_not_a_file_to_write(tmp_path: Path) -> None:
    for call in (lambda: write_text(tmp_path, ""), lambda: export_program(add_registers(load_vit(), 1), tmp_path)):
        with pytest.raises(ValueError, match=r"is a folder; name a file in it"):
            call()


@pytest.mark.parametrize(("place", "words"), [("b", "b is a folder"), ("c/d", "d is a folder"), ("e", "e is a file")])
def test_nothing_is_moved_if_one_file_cannot_take_its_place(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    if words.endswith("file"):
        (tmp_path / place).write_text("mine")
    else:
        (tmp_path / place).mkdir(parents=True)

    def write() -> None:
        with staged(tmp_path) as scratch:
            for folder in ("c", "e"):
                (scratch / folder).mkdir()
            for name in ("a", "b", "c/d", "e/f"):
                (scratch / name).write_text("new")

    with pytest.raises(OSError, match=words):
        write()
    assert (tmp_path / "a").read_text() == "mine"
    assert {path.name for path in tmp_path.rglob("*")} <= {"a", *Path(place).parts}
