"""Shipped models in the process of the command line, where nothing is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_module

from register_adapter import add_registers
from register_adapter.commands.runs.probe import ProbeArguments, _draw
from register_adapter.testbed import load_planted_vit


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """The installed script's name, by which the package knows its own process."""
    script = tmp_path / "register-adapter"
    script.write_text("from register_adapter.commands import main\nmain()\n")
    return script


def test_an_adapter_of_one_is_read_for_an_export(command: Path, tmp_path: Path) -> None:
    add_registers(load_planted_vit().model, 2).save_pretrained(tmp_path / "adapter")
    done = run_module(command, "export", str(tmp_path / "adapter"), "--out", str(tmp_path / "native"))
    assert "ViTModel has no class with native registers" in done.stderr  # it was made


def test_one_is_trained(command: Path, tmp_path: Path) -> None:
    # What comes after the model: it was made.
    words = ["--model-name-or-path", "planted", "--train-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    done = run_module(command, "train", *words, "--objective", "distillation", "--use-cpu", "--quiet")
    assert "is not shipped" not in done.stderr
    assert "image" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("word", ["mosaics", "tiles"])
def test_drawn_images_without_classes_are_probed_without_labels(word: str, tmp_path: Path) -> None:
    data = _draw(ProbeArguments("grown", word, str(tmp_path), max_images=10))
    assert not data.classes
    assert "label" not in data.source[0]
