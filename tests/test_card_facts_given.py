"""What a caller has a card say is checked before anything is written, uploaded, or made on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi, ModelCard

from register_adapter import RegisterPeftModel, add_registers
from register_adapter.tuner.card import update_model_card


@pytest.fixture(scope="module")
def model() -> RegisterPeftModel:
    config = tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8)
    return add_registers(tf.ViTModel(config), 1)


def record(path: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    text = path.read_text("utf-8")
    start = text.index("{", text.index("register-adapter: begin"))
    return json.loads(text[start : text.index(" -->", start)], parse_constant=refuse)


NUMBERS = {
    "float32": (np.float32(0.5), 0.5, "0.5"),
    "array": (np.array([0.5]), 0.5, "0.5"),
    "tensor": (torch.tensor(0.5), 0.5, "0.5"),
    "whole": (np.int64(3), 3, "3"),
    "nan": (float("nan"), None, "not finite"),
    "infinite": (torch.tensor(torch.inf), None, "not finite"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", [str, Path])
def test_numbers_are_written_as_json_has_them(number: str, kind: Any, model: RegisterPeftModel, tmp_path: Path) -> None:
    given, written, shown = NUMBERS[number]
    path = tmp_path / "README.md"
    config = model.peft_config["default"]
    facts = {"metrics": {"accuracy": given}, "evaluation_data": "user/data", "run": {"Seed": np.int64(1)}}
    update_model_card(kind(path), config, tf.ViTModel, **facts)
    assert record(path)["metrics"] == {"accuracy": written}
    update_model_card(kind(path), config, tf.ViTModel)  # repeats what the card says
    assert f"| accuracy | {shown} |" in path.read_text("utf-8")
    results = ModelCard.load(path).data.eval_results
    assert (results[0].metric_value if results else None) == written


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a word": ({"metrics": {"accuracy": "high"}}, "metrics must be numbers by name, got 'high' of type str"),
    "several": ({"metrics": {"accuracy": np.ones(2)}}, "metrics must be numbers by name"),
    "a list": ({"metrics": [0.5]}, "metrics must be a dictionary"),
    "a line break": ({"license": "mit\nbase_model: other"}, "license must be one line"),
    "no licence": ({"license": ""}, "license must be one line"),
    "a list of licences": ({"license": ["mit"]}, "license must be a string"),
    "one tag": ({"tags": "vision"}, "tags must be a list of strings"),
    "an unknown name": ({"foo": 1}, "push_to_hub has no argument 'foo'"),
    "British": ({"licence": "mit"}, "push_to_hub has no argument 'licence'"),
    "pickles": ({"safe_serialization": False}, "saved as safetensors only"),
    "another adapter": ({"selected_adapters": ["other"]}, "other"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_before_there_is_a_repository(
    wrong: str, model: RegisterPeftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts, message = WRONG[wrong]
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("the repository was made"))
    with pytest.raises((TypeError, ValueError), match=message):
        model.push_to_hub("user/name", **facts)
    if facts.keys() <= {"metrics", "license", "tags"}:
        with pytest.raises((TypeError, ValueError), match=message):
            update_model_card(tmp_path / "README.md", model.peft_config["default"], tf.ViTModel, **facts)
        assert not list(tmp_path.iterdir())


def test_registers_that_cannot_be_loaded_make_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8)
    model = add_registers(tf.ViTModel(config), 1)
    model.base_model.model.registers.tokens("default").weight.data.fill_(torch.nan)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("the repository was made"))
    with pytest.raises(ValueError, match="adapter 'default' is not saved"):
        model.push_to_hub("user/name")
