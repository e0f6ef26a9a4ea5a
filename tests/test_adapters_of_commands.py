"""An adapter that a command is given, altered: refused in one line that names it, and nothing is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from register_adapter import AdapterFileError, add_registers, compose, save_adapters
from register_adapter.tuner.composed import load_onto

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    add_registers(vit(), num_registers=2).save_pretrained(folder / "registers")
    lora: Any = get_peft_model(vit(), LoraConfig(target_modules=["query", "q_proj"], r=2))
    lora.save_pretrained(folder / "lora")
    return {name: folder / name for name in ("registers", "lora")}


def config_of(text: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / CONFIG).write_bytes(text)


def setting(**changed: Any) -> Callable[[Path], Any]:
    def alter(place: Path) -> None:
        path = place / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changed}), "utf-8")

    return alter


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def alter(place: Path) -> None:
        values = load_file(place / WEIGHTS)
        change(values)
        save_file(values, place / WEIGHTS, metadata={"format": "pt"})

    return alter


CONFIGS = {
    "empty": config_of(b""),
    "cut": config_of(b'{"peft_type": "REG'),
    "deep": config_of(b"[" * 100_000),
    "no UTF-8": config_of(b"\xff\xfe{}"),
    "null": config_of(b"null"),
    "number": config_of(b"1e999"),
    "many digits": config_of(b'{"num_registers": 1' + b"0" * 5000 + b"}"),
    "unknown method": setting(peft_type="NOPE"),
    "method is a number": setting(peft_type=3),
    "no method": setting(peft_type=None),
}
OTHERS = {
    "pickled": lambda place: (place / WEIGHTS).rename(place / "adapter_model.bin"),
    "no weights": lambda place: (place / WEIGHTS).unlink(),
    "not finite": tensors(lambda values: next(iter(values.values())).fill_(float("nan"))),
    "the base's own": tensors(lambda values: values.update({"base_model.model.layernorm.weight": torch.ones(16)})),
    "an import": setting(megatron_core="os"),
    "no such module": setting(target_modules=["nowhere"]),
    "an infinite scale": setting(lora_alpha=float("inf")),
    "an infinite scale of one layer": setting(alpha_pattern={"q_proj": float("nan")}),
}
CASES = [(kind, alter) for kind in ("registers", "lora") for alter in CONFIGS] + [("lora", alter) for alter in OTHERS]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_an_altered_adapter_is_refused_by_its_name(kind: str, how: str, saved: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(saved[kind], tmp_path / "altered"))
    (CONFIGS | OTHERS)[how](place)
    model = vit()
    names, values = set(model.state_dict()), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError) as caught:
        load_onto(model, place)
    assert str(place) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert set(model.state_dict()) == names
    assert not getattr(model, "peft_config", None)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["registers", "lora"])
def test_an_adapter_of_one_method_is_loaded(kind: str, saved: dict[str, Path]) -> None:
    assert load_onto(vit(), saved[kind]).peft_config["default"]  # type: ignore[index, union-attr, unused-ignore]


def test_a_set_of_names_is_saved_in_one_order(tmp_path: Path) -> None:
    names = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "fc1", "fc2"}
    save_adapters(compose(vit(), {"lora": LoraConfig(target_modules=names, r=1)}), tmp_path)
    saved = json.loads((tmp_path / "lora" / CONFIG).read_text("utf-8"))
    assert saved["target_modules"] == sorted(names)
