"""A README that somebody else wrote, in a folder that an adapter is saved into."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from peft import LoraConfig, PeftModel

from register_adapter import RegisterConfig, add_registers, compose
from register_adapter.tuner.card import update_model_card

BEGIN, END = "<!-- register-adapter: begin (note)", "<!-- register-adapter: end -->"
KINDS: dict[str, Callable[[torch.nn.Module], PeftModel]] = {
    "registers": lambda base: add_registers(base, 1),
    "several": lambda base: compose(base, {"r": RegisterConfig(), "l": LoraConfig(target_modules=["query", "q_proj"])}),
}


@pytest.fixture(params=[*KINDS, "the card alone"])
def save(request: Any) -> Callable[[Path], None]:
    """What writes a README.md into a folder."""
    model = KINDS.get(request.param, KINDS["registers"])(build("vit"))
    if request.param in KINDS:
        return model.save_pretrained
    base = type(model.get_base_model())
    return lambda folder: update_model_card(folder / "README.md", model.peft_config["default"], base)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_left_as_it_is(kind: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.mkdir() if kind == "folder" else os.mkfifo(readme)
    before = readme.stat()
    save(tmp_path)
    assert readme.stat().st_ino == before.st_ino


def test_what_a_link_leads_to_is_not_written(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("Mine.")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "mine")
    save(tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "Mine."
    assert "Mine." in (tmp_path / "out" / "README.md").read_text()


def test_a_disk_that_is_full_leaves_the_text(save: Callable[[Path], None], tmp_path: Path) -> None:
    text = "Mine.\n" * 10_000
    (tmp_path / "README.md").write_text(text)
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (59_000, hard))  # a write fails in the middle
    try:
        with pytest.raises(OSError, match=r"README.md"):
            save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("many", [f"{BEGIN} ", f"{BEGIN} x --> ", "<!-- register-adapter: adapters x -->"])
def test_many_beginnings_without_an_end_take_no_time(many: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(many * 30_000)
    save(tmp_path)  # it took many minutes
    assert many * 30_000 in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "record",
    ["{", "[]", '{"metrics": [1]}', '{"metadata": 5}', '{"metadata": {"tags": 5}}', '{"license": {}, "run": 1}'],
)
def test_a_record_that_was_edited_is_none(record: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"Mine.\n{BEGIN} {record} -->\ntext\n{END}\n")
    save(tmp_path)
    assert "Mine." in (tmp_path / "README.md").read_text()
