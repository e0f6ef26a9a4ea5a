"""Names that no adapter can have, and bases whose weights are no numbers: one sentence, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import Snapshot
from peft import PeftModel, get_peft_model

from register_adapter import (
    RegisterConfig,
    add_registers,
    compose,
    find_tower,
    fit_test_time_registers,
    rename_adapter,
    save_adapters,
)
from register_adapter.errors import UnsupportedModelError
from register_adapter.features.subjects import looking_at


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    add_registers(build("vit"), 2).save_pretrained(folder)
    return folder


def config() -> RegisterConfig:
    return RegisterConfig(num_registers=2)


Way = Callable[[Any, Any, Path], Any]
#: Ways in on a base, and on a model with registers.
ON_A_BASE: dict[str, Way] = {
    "add_registers": lambda base, name, saved: add_registers(base, 2, adapter_name=name),
    "get_peft_model": lambda base, name, saved: get_peft_model(base, config(), adapter_name=name),
    "base.add_adapter": lambda base, name, saved: base.add_adapter(config(), name),
    "base.load_adapter": lambda base, name, saved: base.load_adapter(saved, adapter_name=name),
    "from_pretrained": lambda base, name, saved: PeftModel.from_pretrained(base, saved, adapter_name=name),
    "compose": lambda base, name, saved: compose(base, {name: config()}),
}
ON_REGISTERS: dict[str, Way] = {
    "add_adapter": lambda model, name, saved: model.add_adapter(name, config()),
    "load_adapter": lambda model, name, saved: model.load_adapter(saved, name),
    "rename": lambda model, name, saved: rename_adapter(model, "default", name),
}
NAMES = {"a.b": "'.'|letters, digits", "a/b": "'/'|letters, digits", "keys": "ModuleDict", "__base__": "stands for"}
NAMES["register_adapter_tokens"] = "own tensors"
NAMES["é" * 200] = "more than 255 bytes|letters, digits"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [*ON_A_BASE, *ON_REGISTERS])
def test_a_name_that_means_something_else(way: str, name: str, saved: Path) -> None:
    base = build("vit")
    model = base if way in ON_A_BASE else add_registers(base, 2)
    before = Snapshot(base, make_inputs("vit"))
    with pytest.raises(ValueError, match=NAMES[name]) as refused:
        (ON_A_BASE | ON_REGISTERS)[way](model, name, saved)
    assert f"{name!r:.100}" in str(refused.value)
    before.check()


@pytest.mark.parametrize("name", ["", 3, None, ["a"]], ids=repr)
def test_what_is_no_name(name: Any, saved: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="adapter_name"):
        fit_test_time_registers(build("vit"), [], adapter_name=name)
    for way in ("add_registers", "add_adapter", "load_adapter"):
        base = build("vit")
        model = base if way in ON_A_BASE else add_registers(base, 2)
        with pytest.raises((ValueError, TypeError), match="adapter_name"):
            (ON_A_BASE | ON_REGISTERS)[way](model, name, saved)


#: Calls that are given the name of an adapter, or several: with registers alone, and with several methods.
LOOKED_UP: dict[str, Callable[[Any, Any], Any]] = {
    "set_adapter": lambda model, name: model.set_adapter(name),
    "delete_adapter": lambda model, name: model.delete_adapter(name),
    "add_adapter": lambda model, name: model.add_adapter(name, config()),
    "load_adapter": lambda model, name: model.load_adapter("nowhere", name),
    "adapter_names": lambda model, name: model(**make_inputs("vit"), adapter_names=[name, name]),
    "rename": lambda model, name: rename_adapter(model, name, "new"),
    "save_adapters": lambda model, name: save_adapters(model, "nowhere", selected_adapters=[name]),
    "look at": lambda model, name: looking_at((model, name)).__enter__(),
}
ON_SEVERAL: dict[str, Callable[[Any, Any], Any]] = {
    **LOOKED_UP,
    "set_adapter": lambda model, name: model.set_adapter([name]),
    "disable_adapter": lambda model, name: model.disable_adapter([name]).__enter__(),
    "merge_adapter": lambda model, name: model.merge_adapter([name]),
    "merge_and_unload": lambda model, name: model.merge_and_unload(adapter_names=[name]),
}


@pytest.fixture(scope="module")
def looked_up() -> tuple[Any, Any]:
    return add_registers(build("vit"), 2).eval(), compose(build("vit"), {"default": config()}).eval()


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 3], ids=repr)
@pytest.mark.parametrize("call", ON_SEVERAL)
def test_what_is_looked_up_is_a_string(call: str, name: Any, looked_up: tuple[Any, Any]) -> None:
    for model, calls in zip(looked_up, (LOOKED_UP, ON_SEVERAL), strict=True):
        if call in calls:
            with pytest.raises(TypeError, match="adapter_name must be a string") as refused:
                calls[call](model, name)
            assert repr(name) in str(refused.value)
            assert list(model.peft_config) == ["default"]


def test_what_peft_allows_stays_allowed(saved: Path, tmp_path: Path) -> None:
    model = add_registers(build("vit"), 2, adapter_name="my name-1")
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build("vit"), tmp_path / "my name-1").active_adapters == ["default"]


def _broken(value: float) -> torch.nn.Module:
    base = build("vit")
    with torch.no_grad():
        for block in find_tower(base).part("blocks"):
            next(bias for name, bias in block.named_parameters() if name.endswith("bias"))[0] = value
    return base


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", ["add_registers", "from_pretrained", "compose"])
def test_a_base_that_is_not_finite(way: str, value: float, saved: Path) -> None:
    base = _broken(value)
    keys = list(base.state_dict())
    broken = next(name for name, values in base.named_parameters() if not values.isfinite().all())
    with pytest.raises(UnsupportedModelError, match=r"not finite \(NaN or infinite\)") as refused:
        ON_A_BASE[way](base, "default", saved)
    assert broken in str(refused.value)
    assert "fingerprint" not in str(refused.value)
    assert list(base.state_dict()) == keys


def test_an_adapter_is_saved_on_a_base_that_has_diverged_since(tmp_path: Path) -> None:
    model = add_registers(build("vit"), 2)
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if name.endswith("bias")).fill_(torch.nan)
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build("vit"), tmp_path).active_adapters == ["default"]
