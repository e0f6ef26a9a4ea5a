"""One training run in a folder at a time, and nothing of an earlier one is lost unasked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import run_two_processes
from training_cases import flags, start, stopped, write_case

from register_adapter.training import checkpoints
from register_adapter.training.run_lock import FolderInUseError, folder_lock

pytestmark = pytest.mark.slow

SHORT = ("--max-train-steps", "1")
#: Locks a folder as a run does, in far less time.
HOLDER = """
import os, platform, sys, time
from filelock import FileLock
lock = FileLock(os.path.join(sys.argv[1], ".register_adapter-training.lock"))
lock.acquire()
with open(os.path.join(sys.argv[1], ".register_adapter-training.txt"), "w") as file:
    file.write(f"{os.getpid()} {platform.node()} 2026-01-01 00:00:00")
print("held", flush=True)
child = os.fork() if len(sys.argv) > 2 else 1  # as a loader's worker, which keeps what it inherits
time.sleep(600 if child else 2)
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


@contextmanager
def held(folder: Path, *more: str) -> Iterator[int]:
    """Another process holds the folder; its number."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("more", [(), ("--overwrite-output-dir",), ("--resume-from-checkpoint", "latest")])
def test_a_second_run_is_refused_with_the_name_of_the_first(
    more: tuple[str, ...], case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "train_state.json").write_text("{}")
    before = sorted(path.name for path in tmp_path.iterdir())
    with held(tmp_path) as process:
        assert stopped(flags(case, tmp_path, *SHORT, *more)) == 2
        assert not set(before) - {path.name for path in tmp_path.iterdir()}
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path} is in use by another run (process {process} on " in said


def test_every_process_of_a_second_run_is_refused_and_one_says_so(case: Path, tmp_path: Path) -> None:
    with held(tmp_path):
        main_one, other = run_two_processes("register_adapter.train", *flags(case, tmp_path, *SHORT))
    assert (main_one.returncode, other.returncode) == (2, 2)
    assert f"{tmp_path} is in use by another run" in main_one.stderr.splitlines()[-1]
    for done in (main_one, other):
        assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_run_held_is_free(case: Path, tmp_path: Path) -> None:
    with held(tmp_path, "with a child"):
        pass  # the child outlives it a little
    start(flags(case, tmp_path, *SHORT))
    assert not list(tmp_path.glob(".register_adapter*"))


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_stands_where_the_holder_is_named_is_neither_waited_for_nor_written_through(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("somebody's")
    place = tmp_path / "out" / ".register_adapter-training.txt"
    place.parent.mkdir()
    if kind == "link":
        place.symlink_to(tmp_path / "other")
    else:
        os.mkfifo(place)
    opened = os.open(place, os.O_RDWR | os.O_NONBLOCK)  # so that a writer would not wait for ever
    try:
        with folder_lock(place.parent):
            assert place.is_file()
            assert not place.is_symlink()
            assert place.read_text("utf-8").startswith(f"{os.getpid()} ")
    finally:
        os.close(opened)
    assert (tmp_path / "other").read_text() == "somebody's"
    assert not [*place.parent.iterdir()]


def test_one_thread_may_hold_it_twice_and_two_may_not(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def second() -> None:
        try:
            with folder_lock(tmp_path / "out"):
                pass
        except FolderInUseError as error:
            errors.append(error)

    with folder_lock(tmp_path / "out"), folder_lock(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in str(errors[0])
    second()
    assert len(errors) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_refused_run_leaves_no_folder_of_its_own(there: bool, case: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    assert stopped(flags(case, out, *SHORT, "--model-name-or-path", str(tmp_path / "no model"))) == 1
    assert out.exists() == there
    assert (tmp_path / "new").exists() == there


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with folder_lock(tmp_path):
        pass


# What is there already


@pytest.fixture
def finished(case: Path, tmp_path: Path) -> Path:
    """The folder of a finished run without checkpoints."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "results.json"):
        (out / name).write_text("precious")
    return out


@pytest.mark.parametrize("more", [(), ("--resume-from-checkpoint", "latest")])
def test_a_finished_run_is_not_overwritten_unasked(
    more: tuple[str, ...],
    case: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("register_adapter.training.launch._train", lambda *_: pytest.fail("began to load"))
    assert stopped(flags(case, finished, *SHORT, *more)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds the result of an earlier run (adapter_model.safetensors, adapter_config.json, results.json)" in said
    assert "--overwrite-output-dir" in said
    assert {path.read_text() for path in finished.iterdir()} == {"precious"}


def test_a_run_of_another_folder_is_not_continued_over_it(
    case: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(flags(case, tmp_path / "other", *SHORT, "--checkpointing-steps", "1"))
    checkpoint = str(tmp_path / "other" / "checkpoint-1")
    assert stopped(flags(case, finished, *SHORT, "--resume-from-checkpoint", checkpoint)) == 2
    assert "holds the result of an earlier run" in capsys.readouterr().err
    # In its own folder it is, with the adapter there.
    start(flags(case, tmp_path / "other", *SHORT, "--resume-from-checkpoint", checkpoint))


def test_overwriting_is_possible(case: Path, finished: Path) -> None:
    start(flags(case, finished, *SHORT, "--overwrite-output-dir", "--checkpointing-steps", "1"))
    assert (finished / "results.json").read_text() != "precious"
    assert checkpoints.find_all(finished)


def test_a_run_does_not_write_into_what_it_reads(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((case / "vit").iterdir())
    monkeypatch.chdir(case)
    (tmp_path / "link").symlink_to(case / "vit")
    for name in (case / "vit", "vit/", "./vit", tmp_path / "link"):
        assert stopped(flags(case, name, *SHORT)) == 2
        assert "is what the run reads" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert stopped(flags(case, tmp_path / "other", *SHORT)) == 2
    assert "holds a model (config.json)" in capsys.readouterr().err
    assert sorted((case / "vit").iterdir()) == before
