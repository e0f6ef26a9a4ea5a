"""``merge_adapter`` and ``unmerge_adapter`` beside registers: all of what can be merged, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, compose


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(target_modules=["query", "q_proj", "value", "v_proj"], init_lora_weights=False, **options)


def _registers() -> RegisterConfig:
    return RegisterConfig(num_registers=2, init_std=1.0)


def _composed() -> Any:
    ia3 = IA3Config(target_modules=["key", "k_proj"], feedforward_modules=[])
    return compose(build("vit"), {"registers": _registers(), "lora": _lora(), "ia3": ia3}).eval()


def _peft_on_registers() -> Any:
    return get_peft_model(add_registers(build("vit"), 2, "registers", init_std=1.0), _lora(), "lora").eval()


def _registers_beneath() -> Any:
    base = build("vit")
    base.add_adapter(_registers(), "registers")
    return get_peft_model(base, _lora(), "lora").eval()


def _output(model: Any) -> torch.Tensor:
    output: torch.Tensor = run(model, make_inputs("vit"))["last_hidden_state"]
    return output


def _merged(model: Any) -> list[list[str]]:
    return [layer.merged_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


@pytest.mark.parametrize("names", [None, ["lora"]], ids=["all", "lora"])
@pytest.mark.parametrize("make", [_composed, _peft_on_registers, _registers_beneath])
def test_there_and_back(make: Callable[[], Any], names: list[str] | None) -> None:
    model = make()
    expected = _output(model)
    model.merge_adapter(names)
    assert ["lora"] in _merged(model)
    assert_close(_output(model), expected, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert not any(_merged(model))
    assert_close(_output(model), expected, atol=1e-5, rtol=0)


def test_a_merge_that_is_refused_changes_nothing() -> None:
    model = _composed()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    with pytest.raises(NotImplementedError, match="not weight deltas"):
        model.merge_adapter(["lora", "registers"])
    with pytest.raises(ValueError, match="no adapter 'lorra'"):
        model.merge_adapter(["lorra"])
    with pytest.raises(NotImplementedError, match="not weight deltas"):
        add_registers(build("vit"), 2).merge_adapter()
    assert not any(_merged(model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        layers[-1].lora_A["lora"].weight.fill_(torch.nan)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    order = list(model.peft_config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert not any(_merged(model))
        assert list(model.peft_config) == order
        assert model.state_dict().keys() == weights.keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(7.0), weights[name].nan_to_num(7.0))
    with torch.no_grad():
        layers[-1].lora_A["lora"].weight.zero_()
    expected = _output(model)
    assert_close(_output(model.merge_and_unload(safe_merge=True)), expected, atol=1e-5, rtol=0)


def test_a_merge_whose_second_adapter_is_broken_changes_nothing() -> None:
    model = _composed()
    model.add_adapter("broken", _lora())
    model.set_adapter(["lora", "broken"])
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    with torch.no_grad():
        layers[-1].lora_A["broken"].weight.fill_(torch.nan)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert not any(_merged(model))
        assert all(torch.equal(value, weights[name]) or "broken" in name for name, value in model.state_dict().items())
