"""The config: its defaults and JSON form, and a model described by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import TOWERS, WIDTH, build, make_inputs
from helpers import Snapshot, assert_identical, differs, run
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from register_adapter import (
    FAMILIES,
    AdapterFileError,
    Anatomy,
    RegisterConfig,
    RegisterModel,
    add_registers,
    capture,
    find_register_layer,
    find_tower,
)
from register_adapter.towers.anatomy import resolve
from register_adapter.tuner._peft_compat import register


def test_defaults_are_the_papers_four_registers() -> None:
    config = RegisterConfig()
    assert (config.num_registers, config.init, config.init_std, config.attentions) == (4, "normal", 0.02, "slice")
    assert config.task_type is None
    assert config.base_tower is None


def test_the_method_is_registered_with_peft() -> None:
    kind = RegisterConfig().peft_type
    assert kind is PeftType("REGISTER_ADAPTER")
    assert kind.value == "REGISTER_ADAPTER"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is RegisterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is RegisterModel
    register(RegisterConfig, RegisterModel)  # a second time does nothing


def test_the_dictionary_is_json_and_makes_the_same_config() -> None:
    config = RegisterConfig(num_registers=2, init="cls", modules_to_save=["classifier"], anatomy=Anatomy("mine"))
    values = json.loads(json.dumps(config.to_dict()))
    assert "ignore_base_mismatch" not in values
    assert RegisterConfig(**values) == config


@pytest.mark.parametrize("names", [["head", "tail"], ("head", "tail"), {"head", "tail"}])
def test_modules_to_save_is_any_collection(names: Any) -> None:
    assert sorted(RegisterConfig(modules_to_save=names).modules_to_save) == ["head", "tail"]


def test_peft_reads_the_saved_config(tmp_path: Path) -> None:
    RegisterConfig(num_registers=3, target_modules={"tower"}).save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, RegisterConfig)
    assert config.num_registers == 3
    assert config.tower_name == "tower"


def test_get_peft_model_and_add_registers_are_the_same() -> None:
    inputs, outputs = make_inputs("vit"), []
    for attach in (lambda base: get_peft_model(base, RegisterConfig(num_registers=2)), lambda b: add_registers(b, 2)):
        torch.manual_seed(0)
        outputs.append(run(attach(build("vit")).eval(), inputs))
    assert_identical(*outputs)


def test_the_base_is_named_in_the_config(tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path)
    base = tf.ViTModel.from_pretrained(tmp_path)
    assert add_registers(base, 4).peft_config["default"].base_model_name_or_path == str(tmp_path)


def test_the_rows_of_the_table_are_json_and_come_back() -> None:
    rows = {name: json.loads(json.dumps(row.to_dict())) for name, row in FAMILIES.items()}
    assert {name: Anatomy.from_dict(row) for name, row in rows.items()} == FAMILIES


@pytest.mark.parametrize("name", TOWERS)
def test_every_path_of_a_row_leads_somewhere(name: str) -> None:
    tower = find_tower(build(name))
    for field in ("embeddings", "remove", "blocks"):
        assert tower.part(field) is not None, field
    for field in ("patch_embedding", "position_embedding", "cls_token", "final_norm"):
        assert (tower.part(field) is not None) == (getattr(tower.anatomy, field) is not None), field
    assert tower.hidden_size == WIDTH
    for index in range(len(tower.part("blocks"))):
        assert tower.block_part(index, "attention") is not None
        inside, up, out = (tower.block_part(index, field) for field in ("mlp_in", "mlp_up", "mlp_out"))
        if name == "dinov2-swiglu" and inside.out_features == 2 * out.in_features:
            assert up is None  # both halves are one layer in transformers 4
            continue
        assert inside.out_features == out.in_features
        assert (up not in (None, inside)) == (name.endswith("swiglu") or name == "sapiens2")
    assert resolve(tower.module, "no.such.place") is None


class PlainViT(nn.Module):
    """A vision transformer in plain PyTorch, without a config or a CLS token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.stem = nn.Sequential(nn.Flatten(2), _Swap())
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.stem(self.patches(pixel_values))
        for layer in self.layers:
            hidden = layer(hidden)
        normed: torch.Tensor = self.norm(hidden)
        return normed


class _Swap(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.transpose(1, 2)


MINE = Anatomy(
    "mine",
    embeddings="stem",
    remove="norm",
    blocks="layers",
    prefix=0,
    hidden_size=16,
    attention="self_attn",
    patch_embedding="patches",
    position_embedding=None,
    cls_token=None,
    final_norm="norm",
)


def test_a_plain_model_described_by_hand_gets_registers(tmp_path: Path) -> None:
    base, inputs = PlainViT().eval(), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4, anatomy=MINE, init_std=1.0).eval()
    outputs = run(model, inputs)
    assert outputs[""].shape == snapshot.outputs[""].shape
    assert differs(outputs, snapshot.outputs)
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(**inputs)
    assert trace.registers.shape == (2, 4, 16)
    model(**inputs).square().sum().backward()
    assert find_register_layer(model).tokens("default").weight.grad.abs().sum() > 0
    model.save_pretrained(str(tmp_path))
    again = PlainViT()
    again.load_state_dict(base.state_dict(), strict=False)
    assert_identical(run(PeftModel.from_pretrained(again, str(tmp_path)), inputs), outputs)
    model.unload()
    snapshot.check_values()


@pytest.mark.parametrize("loaded", [False, True])
def test_an_anatomy_made_in_code_is_trusted_where_values_are_loaded_over(loaded: bool, tmp_path: Path) -> None:
    """As Trainer loads its best checkpoint; a file may not name what begins with an underscore."""

    def base() -> Any:
        torch.manual_seed(0)
        model = PlainViT().eval()
        model._layers = model.layers
        return model

    anatomy, inputs = replace(MINE, blocks="_layers"), make_inputs("vit")
    first = add_registers(base(), 2, anatomy=anatomy, init_std=1.0).eval()
    first.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="_layers"):
        PeftModel.from_pretrained(base(), str(tmp_path))
    if loaded:
        model: Any = PeftModel.from_pretrained(base(), str(tmp_path), anatomy=anatomy, is_trainable=True).eval()
    else:
        model = add_registers(base(), 2, anatomy=anatomy).eval()
    nn.init.uniform_(next(value for value in model.parameters() if value.requires_grad))
    assert differs(run(model, inputs), run(first, inputs))
    model.load_adapter(str(tmp_path), "default")
    assert_identical(run(model, inputs), run(first, inputs))


def test_an_anatomy_without_a_width_says_where_to_give_it() -> None:
    values = {**MINE.to_dict(), "hidden_size": None}
    with pytest.raises(ValueError, match=r"hidden size of PlainViT.*hidden_size=\.\.\."):
        add_registers(PlainViT(), 4, anatomy=Anatomy.from_dict(values))
