"""What a save writes is what the model is at that moment, and what a loader takes; all else is refused before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from register_adapter import RegisterConfig, add_registers, compose, save_adapters

SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
FIRST = {0: "a", 1: "b", 2: "c"}


def base(**changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.ViTConfig(**SIZE, num_hidden_layers=1, num_attention_heads=1, **{"id2label": FIRST, **changes})
    return tf.ViTForImageClassification(config)


def config() -> RegisterConfig:
    return RegisterConfig(num_registers=1, modules_to_save=["classifier"])


def composed() -> nn.Module:
    lora = LoraConfig(r=1, target_modules=["q_proj"])
    return compose(base(), {"default": config(), "lora": lora})


MADE: dict[str, Callable[[], Any]] = {
    "add_registers": lambda: add_registers(base(), 1, modules_to_save=["classifier"]),
    "PeftModel": lambda: PeftModel(base(), config()),
    "get_peft_model": lambda: get_peft_model(base(), config()),
    "compose": composed,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("part", ["register_adapter_tokens.default", "modules_to_save.default"])
@pytest.mark.parametrize("made", MADE)
def test_values_that_cannot_be_loaded_are_not_saved(made: str, part: str, value: float, tmp_path: Path) -> None:
    model = MADE[made]()
    model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    with torch.no_grad():
        next(tensor for name, tensor in model.named_parameters() if part in name).view(-1)[0] = value
    for save in (model.save_pretrained, lambda folder: save_adapters(model, folder)):
        with pytest.raises(
            ValueError, match=r"adapter 'default' is not saved.*(not finite|squares are infinite)"
        ) as said:
            save(tmp_path / "out")
        assert part.partition(".")[0].replace("modules_to_save", "classifier") in str(said.value)
        assert contents(tmp_path / "out") == before


def test_of_several_adapters_only_the_selected_are_looked_at(tmp_path: Path) -> None:
    model = MADE["add_registers"]()
    model.add_adapter("broken", RegisterConfig(num_registers=1))
    with torch.no_grad():
        next(tensor for name, tensor in model.named_parameters() if "tokens.broken" in name).fill_(torch.nan)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ValueError, match="adapter 'broken' is not saved"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
