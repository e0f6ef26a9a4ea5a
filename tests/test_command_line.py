"""The command line as a whole: help without model libraries, one spelling of flags, JSON, quiet, errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import COMMAND, ENVIRONMENT, call
from families import build
from processes import run_module
from transformers import Dinov2Model

from register_adapter import add_registers
from register_adapter.commands.cli import COMMANDS
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit

HEAVY = {"torch", "peft", "transformers", "accelerate", "datasets", "numpy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted ViT on disk, and images of every class."""
    folder = tmp_path_factory.mktemp("command_line")
    model = load_planted_vit().model
    model.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    SceneDataset(40, seed=4, split=None).write(folder / "images")
    return folder


# What is imported


@pytest.mark.parametrize("command", [[COMMAND], ["-m", "register_adapter"]], ids=["script", "module"])
@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"]], ids=" ".join)
def test_help_and_version_import_no_model_library(command: list[str], arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = set(re.findall(r"(?m)^import time:.*\| +(\w+)$", done.stderr))
    assert "typer" in imported
    assert not imported & HEAVY
    assert ("Usage" in done.stdout) if "--help" in arguments else done.stdout == f"{version('register-adapter')}\n"


def test_completion_imports_no_model_library() -> None:
    words = {"_REGISTER_ADAPTER_COMPLETE": "complete_bash", "COMP_WORDS": "register-adapter ex", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | words,
        timeout=300,
    )
    assert done.stdout.split() == ["export"]
    assert not set(re.findall(r"(?m)^import time:.*\| +(\w+)$", done.stderr)) & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["register-adapter", "register-adapter.py"])
def test_public_names_come_on_first_access_in_the_command_and_at_once_elsewhere(name: str, tmp_path: Path) -> None:
    done = run_module(shutil.copy(Path(__file__).with_name("public_names.py"), tmp_path / name), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lazy = name == "register-adapter"
    assert json.loads(done.stdout) == {
        "at once": not lazy,
        "unknown name": False,
        "before names": not lazy,
        "missing": [],
        "registered": True,
        "same": True,
    }


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_flags_with_hyphens_only(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    text = capfd.readouterr().out
    assert "--" in text
    assert not re.findall(r"--\w*_\w*", text)
    if command == "train":
        assert "usage: register-adapter train" in text
        assert {"--model-name-or-path", "--freeze-head", "--json", "--quiet"} <= set(re.findall(r"--[\w-]+", text))
        assert "`--objective NAME --help`" in " ".join(text.split())  # where the other flags are
    takes_more = command in {"audit", "eval", "features", "fit", "probe"}
    if takes_more and "a name on the Hub" not in " ".join(text.split()):
        pytest.skip("this version of typer shows no help for arguments")
    assert ("OpenCLIP" in text) == takes_more  # docs/commands.md


def test_without_a_command_there_is_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch)
    printed = capfd.readouterr()
    assert all(command in printed.out + printed.err for command in COMMANDS)


# JSON and quiet


@pytest.mark.parametrize("spelling", ["--batch-size", "--batch_size"])
def test_audit(
    spelling: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("audit", "planted", str(folder / "images"), "--out", str(tmp_path), spelling, "7")
    assert call(monkeypatch, *given, "--json", "--no-attentions") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((tmp_path / "audit.json").read_text())
    assert printed["reports"][0]["verdict"] == "present"


@pytest.mark.slow
def test_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fitted"
    assert call(monkeypatch, "fit", "planted", str(folder / "images"), "--out", str(out), "--json", "--quiet") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["test_time_fit"]["share_after"] == 0
    assert "%|" not in printed.err, "no bar"
    assert (out / "adapter_config.json").is_file()
    nothing = tmp_path / "nothing"
    assert call(monkeypatch, "fit", "clean", str(folder / "images"), "--out", str(nothing), "--json") == 0
    printed_json = json.loads(capfd.readouterr().out)
    assert printed_json["register_neurons"] == {}
    assert "needs no registers" in printed_json["reason"]
    assert not nothing.exists()


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    build("dinov2").save_pretrained(tmp_path / "base")
    base = Dinov2Model.from_pretrained(tmp_path / "base")
    add_registers(base, 2).save_pretrained(tmp_path / "adapter")
    given = ("export", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "plain"))
    assert call(monkeypatch, *given, "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert (printed["format"], printed["output_dir"]) == ("native", str(tmp_path / "plain"))
    assert call(monkeypatch, *given, "--quiet") == 0
    assert capfd.readouterr().out == ""


def test_train_is_training_with_every_flag(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("--model_name_or_path", str(folder / "model"), "--train-dir", str(folder / "images"), "--use-cpu")
    given += ("--output-dir", str(tmp_path / "registers"), "--max_train_steps", "1", "--num_registers", "2")
    assert call(monkeypatch, "train", *given, "--json", "--quiet") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "registers" / "results.json").read_text())
    assert "%|" not in printed.err, "no bar"
    assert call(monkeypatch, "train", *given, "--no-such-flag", "value") == 2
    assert "unrecognised arguments: --no-such-flag" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit", "planted", "nowhere"), "neither a folder"),
        (("fit", "planted", "scenes", "--out", "x", "--rule", "none"), "unknown rule"),
        (("export", "nowhere", "--out", "x"), "nowhere"),
    ],
)
def test_an_error_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = str(call(monkeypatch, *arguments))
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
