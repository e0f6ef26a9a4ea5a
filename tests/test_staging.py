"""The one atomic write: whole files or those before, also where only the folder itself can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from register_adapter.utils.staging import check_writable, staged, write_text


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


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_while_staging.py")
    killed = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    with staged(tmp_path):
        assert len(list(tmp_path.glob(".register_adapter.*"))) == 2, "a living process lost its folder"
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.glob(".register_adapter.*"))) == 1
    check_writable(tmp_path)
    assert not list(tmp_path.glob(".register_adapter.*"))
