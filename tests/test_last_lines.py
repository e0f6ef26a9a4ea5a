"""What a command says last: where its output went, who takes a flag, that it was stopped, and no password."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import call

from register_adapter import _is_command_line, fit_test_time_registers
from register_adapter.commands import cli
from register_adapter.errors import Farewell
from register_adapter.testbed import SceneDataset, load_shipped
from register_adapter.training.launch import main as train_main
from register_adapter.training.objectives.flags import takers_of
from register_adapter.utils.staging import staged
from register_adapter.utils.text import without_password


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["write", "flush"], ids=["unbuffered", "buffered"])
def test_a_full_disk_behind_the_output_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", type("FullDisk", (io.StringIO,), {method: fail})())
    assert (
        call(monkeypatch, "families") == "error: what is printed cannot be written ([Errno 28] No space left on device)"
    )


@pytest.mark.parametrize(
    ("flag", "takers"),
    [("--teacher", ["distillation"]), ("--preserve_prompts", ["preserve"]), ("--freeze-head", ["classification"])],
)
def test_a_flag_of_another_objective_says_whose_it_is(
    flag: str, takers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert takers_of(flag) == takers
    objective = "norm" if flag == "--freeze-head" else "classification"
    with pytest.raises(SystemExit):
        train_main(
            ["--model-name-or-path", "m", "--train-dir", "d", "--output-dir", "o", "--objective", objective, flag]
        )
    assert f"unrecognised arguments: {flag} (a flag of --objective {takers[0]})" in capsys.readouterr().err


def test_a_flag_of_no_objective_has_no_takers() -> None:
    assert takers_of("--no-such-flag") == []


def test_more_neurons_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_neurons=99999, and up to block . there are .* neurons to choose from"):
        fit_test_time_registers(load_shipped("register-adapter://planted"), SceneDataset(8, seed=3), num_neurons=99_999)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no https://user:secret@host/a?x=1 here", "no https://host/a?x=1 here"),
        ("no file /home/me/https:/user:secret@host/x", "no file /home/me/https:/host/x"),
        ("https://host:80/a@b and me@host", "https://host:80/a@b and me@host"),
    ],
)
def test_a_password_in_an_address_is_not_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize(("stop", "said"), [(SystemExit(130), "error: interrupted"), (Farewell(130), "")])
@pytest.mark.parametrize("start", ["main", "train_main"])
def test_every_interrupted_command_says_so_once(
    start: str, stop: SystemExit, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise stop

    monkeypatch.setattr(sys, "argv", ["register-adapter", "train"])
    for name in ("_run", "_run_training"):
        monkeypatch.setattr(cli, name, run)
    with pytest.raises(SystemExit) as ended:
        getattr(cli, start)()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize("start", ["main", "train_main"])
def test_sigterm_leaves_nothing_half_done(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with staged(tmp_path) as scratch:
            (scratch / "half").write_text("a part")
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for name in ("_run", "_run_training"):
            monkeypatch.setattr(cli, name, run)
        with pytest.raises(SystemExit) as ended:
            getattr(cli, start)()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert capsys.readouterr().err.strip() == "error: interrupted by SIGTERM"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["python", "-m", "register_adapter.train", "--x"], True),
        (["python", "-mregister_adapter.train", "--x"], True),
        (["python", "-m", "register_adapter.training", "--x"], False),
        (["python", "-m", "mine", "--x"], False),
    ],
)
def test_libraries_are_imported_where_ctrl_c_ends_in_a_line(
    words: list[str], is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["-m", "--x"])
    assert _is_command_line() is is_one
