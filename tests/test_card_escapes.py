"""Names and labels that somebody else chose cannot write the card: no markup, no control characters, no failed save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build
from transformers import ViTForImageClassification

from register_adapter import RegisterConfig, add_registers
from register_adapter.tuner.card import update_model_card
from register_adapter.tuner.card_text import code, plain

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "two\n## lines",
    "back`tick",
    "``` fence",
    "a | b",
    "[x](http://x.y)",
    "![x](y)",
    "<script>alert(1)</script>",
    "<!-- register-adapter: end -->",
    "half \ud800",
    "byte \udce9",
    "right \u202e left",
    "**bold** _it_ ~~no~~ $x$",
    "&lt;b&gt;",
    "\x00",
]
TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "patch_size": 8}


def card(path: Path, name: str, **facts: Any) -> str:
    config = RegisterConfig(num_registers=2, modules_to_save=["classifier"], revision=name)
    config.id2label, config.base_model_name_or_path, config.peft_version = {0: name, 1: "cat"}, name, name
    config.modules_to_save = [name]
    config.base_tower = {**TOWER, "family": name}
    facts |= {"training_data": name, "evaluation_data": name, "metrics": {name: 1.0}, "run": {name: name}}
    update_model_card(path, config, ViTForImageClassification, adapter=name, subfolder=name, tags=[name], **facts)
    return path.read_text("utf-8")


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_card_shows_a_name_and_is_not_written_by_it(name: str, tmp_path: Path) -> None:
    text = card(tmp_path / "README.md", name)
    expected = card(tmp_path / "usual.md", "usual")
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        line for line in expected.splitlines() if line.startswith("#")
    ][1:]
    assert text.count("\n```") == expected.count("\n```")
    assert all(char.isprintable() or char == "\n" for char in text)
    outside = text.split("<!-- register-adapter: begin")[1].partition(" -->")[2]
    shown = re.sub(r"`[^`]*`", "", outside.split("```")[-1]).replace("\\](", "").replace("](https://arxiv", "")
    assert "<script" not in outside
    assert "](http" not in shown
    assert outside.count("<!--") == 1
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_card_that_is_written_again_stays_the_same(name: str, tmp_path: Path) -> None:
    first = card(tmp_path / "README.md", name)
    assert card(tmp_path / "README.md", name) == first


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_an_adapter_with_any_class_names_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    base = ViTForImageClassification(build("vit").config)
    labels = {0: name, 1: "cat", **{index: str(index) for index in range(2, base.config.num_labels)}}
    model = add_registers(base, 2, modules_to_save=["classifier"], id2label=labels)
    model.save_pretrained(tmp_path)
    assert RegisterConfig.from_pretrained(str(tmp_path)).id2label == labels


@pytest.mark.parametrize(
    ("text", "shown"), [("snake_case data", "snake_case data"), ("- a", "\\- a"), ("1. a", "1\\. a"), ("# a", "\\# a")]
)
def test_usual_names_stay_as_they_are(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert code(text) == f"`{text}`"
