"""What a save writes is what the model is at that moment, and what a loader takes; all else is refused before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from register_adapter import AdapterFileError, RegisterConfig, RegisterPeftModel, add_registers, compose, save_adapters

SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
FIRST, SECOND = ({0: "a", 1: "b", 2: "c"}, {0: "x", 1: "y", 2: "z"})


def base(**changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.ViTConfig(**SIZE, num_hidden_layers=1, num_attention_heads=1, **{"id2label": FIRST, **changes})
    return tf.ViTForImageClassification(config)


def config() -> RegisterConfig:
    return RegisterConfig(num_registers=1, modules_to_save=["classifier"])


def composed() -> nn.Module:
    lora = LoraConfig(r=1, target_modules=["q_proj", "query"])
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


def rename(model: Any) -> None:
    model.get_base_model().config.id2label = dict(SECOND)
    model.get_base_model().config.label2id = {name: number for number, name in SECOND.items()}


def then_switch(model: Any) -> None:
    rename(model)
    model.add_adapter("other", RegisterConfig(num_registers=1, modules_to_save=["classifier"], id2label=FIRST))
    model.set_adapter("other")


def then_disable(model: Any) -> None:
    rename(model)
    with model.disable_adapter():
        pass
    model.set_adapter("default")


def then_back(model: Any) -> None:
    rename(model)
    model.base_model.model.vit.registers.renew_bases()  # as a save does
    model.get_base_model().config.id2label = dict(FIRST)


def of_another_number(model: Any) -> None:
    model.get_base_model().config.id2label = {0: "cat", 1: "dog"}


CHANGES = {rename: SECOND, then_switch: SECOND, then_disable: SECOND, then_back: FIRST, of_another_number: FIRST}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("made", ["add_registers", "get_peft_model"])
def test_classes_are_saved_as_the_model_names_them(
    made: str, loaded: bool, change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = MADE[made]()
    model.save_pretrained(tmp_path)
    if loaded:
        model = type(model).from_pretrained(base(id2label={0: "no", 1: "names", 2: "here"}), tmp_path)
    change(model)
    model.save_pretrained(tmp_path)
    assert RegisterConfig.from_pretrained(str(tmp_path)).id2label == CHANGES[change]


def test_names_that_are_given_win_over_the_bases(tmp_path: Path) -> None:
    model = add_registers(base(), 1, modules_to_save=["classifier"], id2label=SECOND)
    model.save_pretrained(tmp_path)
    assert RegisterConfig.from_pretrained(str(tmp_path)).id2label == SECOND


def test_several_methods_are_saved_with_the_names_of_now(tmp_path: Path) -> None:
    model = composed()
    rename(model)
    model.save_pretrained(tmp_path)
    assert RegisterConfig.from_pretrained(str(tmp_path / "default")).id2label == SECOND


@pytest.mark.parametrize("method", ["register_adapter", "3", 3, None, ["REGISTER_ADAPTER"], {}])
@pytest.mark.parametrize("made", ["add_registers", "compose"])
def test_a_method_that_peft_does_not_have_is_refused_with_the_file(made: str, method: Any, tmp_path: Path) -> None:
    add_registers(base(), 1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": method}))
    model = MADE[made]()
    before = set(model.peft_config)
    with pytest.raises(AdapterFileError, match=re.escape(str(path))):
        model.load_adapter(tmp_path, "more")
    assert set(model.peft_config) == before
    with pytest.raises(AdapterFileError, match=re.escape(str(path))):
        RegisterPeftModel.from_pretrained(base(), tmp_path)
