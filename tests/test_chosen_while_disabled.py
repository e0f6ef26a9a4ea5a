"""Adapters added, chosen or deleted inside ``disable_adapter``: the base's outputs there, the choice afterwards."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from peft import LoraConfig, get_peft_model

from register_adapter import RegisterConfig, add_registers, compose, load_adapters


def _lora() -> LoraConfig:
    return LoraConfig(target_modules=["query", "q_proj"], init_lora_weights=False)


def _registers(number: int) -> RegisterConfig:
    return RegisterConfig(num_registers=number, init_std=1.0)


def _output(model: Any) -> torch.Tensor:
    output: torch.Tensor = run(model, make_inputs("vit"))["last_hidden_state"]
    return output


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    torch.manual_seed(0)
    return _output(build("vit").eval())


def _build() -> Any:
    torch.manual_seed(0)
    return build("vit")


def test_registers(base: torch.Tensor) -> None:
    model = add_registers(_build(), 2, init_std=1.0).eval()
    with model.disable_adapter():
        model.add_adapter("later", _registers(3))
        model.set_adapter("later")
        assert torch.equal(_output(model), base)
        with model.disable_adapter():
            pass
        assert not model.has_active_enabled_adapter
        assert torch.equal(_output(model), base)
    assert model.active_adapters == ["later"]
    assert not torch.allclose(_output(model), base)


def test_several_methods(base: torch.Tensor) -> None:
    model = compose(_build(), {"registers": _registers(2), "lora": _lora()}).eval()
    with model.disable_adapter():
        model.add_adapter("later", _registers(3))
        model.add_adapter("lora2", _lora())
        assert torch.equal(_output(model), base)
        model.set_adapter(["later", "lora2"])
        assert torch.equal(_output(model), base)
    assert model.active_adapters == ["later", "lora2"]
    chosen = _output(model)
    model.set_adapter(["later", "lora2"])
    assert torch.equal(_output(model), chosen)


def test_one_of_several_methods() -> None:
    model = compose(_build(), {"registers": _registers(2), "lora": _lora()}).eval()
    model.add_adapter("lora2", _lora())
    model.set_adapter("lora2")
    expected = _output(model)
    model.set_adapter("lora")
    with model.disable_adapter("lora"):
        model.set_adapter("lora2")
        assert torch.equal(_output(model), expected)
        model.delete_adapter("lora")
    assert model.active_adapters == ["registers", "lora2"]
    assert torch.equal(_output(model), expected)


def test_the_last_adapter_was_deleted(base: torch.Tensor, tmp_path: Path) -> None:
    model = add_registers(_build(), 2).eval()
    model.delete_adapter("default")
    assert torch.equal(_output(model.get_base_model()), base)
    with pytest.raises(ValueError, match="the model has no adapters"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _beside_lora() -> Any:
    return compose(_build(), {"lora": _lora()}).eval()


def _in_their_place(model: Any) -> None:
    model.delete_adapter("registers")
    model.add_adapter("later", _registers(3))


def _loaded(model: Any, folder: Path) -> None:
    compose(_build(), {"later": _registers(3)}).save_pretrained(folder)
    load_adapters(model, folder)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", ["added", "chosen", "replaced", "loaded"])
def test_the_first_registers(way: str, times: int, base: torch.Tensor, tmp_path: Path) -> None:
    model = _beside_lora()
    if way == "replaced":
        model.add_adapter("registers", _registers(2))
    with ExitStack() as stack:
        for _ in range(times):
            inner = stack.enter_context(ExitStack())
            inner.enter_context(model.disable_adapter())
        if way == "replaced":
            _in_their_place(model)
        elif way == "loaded":
            _loaded(model, tmp_path)
        else:
            model.add_adapter("later", _registers(3))
            if way == "chosen":
                model.set_adapter("later")
        model.eval()
        assert torch.equal(_output(model), base)
        inner.close()
        assert torch.equal(_output(model), base) == (times == 2)
    assert model.active_adapters == ["lora", "later"]
    outside = _output(model)
    model.set_adapter(["lora", "later"])
    assert torch.equal(outside, _output(model))
    with model.disable_adapter("later"):
        lora_alone = _output(model)
    assert not torch.allclose(outside, lora_alone)
    assert not torch.allclose(lora_alone, base)


def test_registers_that_come_while_another_method_is_aside(base: torch.Tensor) -> None:
    model = _beside_lora()
    with model.disable_adapter("lora"):
        model.add_adapter("later", _registers(3))
        assert not torch.allclose(_output(model.eval()), base)
    assert model.active_adapters == ["lora", "later"]


MORE = {"later": _registers(3), "lora2": LoraConfig(target_modules=["query", "q_proj"], init_lora_weights=False)}
STARTS = {
    "registers": lambda: add_registers(_build(), 2, init_std=1.0),
    "composed": lambda: compose(_build(), {"default": _lora()}),
}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_composed_in_the_context(start: str, inner: bool, base: torch.Tensor) -> None:
    """Another method comes to a model of one, or of several, by its wrapper or by the base inside."""

    def composed(model: Any) -> Any:
        torch.manual_seed(1)
        return compose(model.get_base_model() if inner else model, MORE).eval()

    outside = composed(STARTS[start]())
    model = STARTS[start]()
    with model.disable_adapter():
        later = composed(model)
        assert torch.equal(_output(later), base)
        with model.disable_adapter():
            pass
        assert torch.equal(_output(later), base)
    assert later.active_adapters == outside.active_adapters
    torch.testing.assert_close(_output(later), _output(outside))
    flags = [[value.requires_grad for value in each.parameters()] for each in (later, outside)]
    assert flags[0] == flags[1]
    with later.disable_adapter():
        assert torch.equal(_output(later), base)


@pytest.mark.parametrize("kind", ["registers", "lora"])
def test_behind_the_switch_of_transformers(kind: str) -> None:
    make = _lora if kind == "lora" else lambda: _registers(2)
    base = _build()
    plain = _output(base)
    base.add_adapter(make(), "old")
    base.disable_adapters()
    with pytest.raises(ValueError, match="adapters of ViTModel are switched off"):
        compose(base, {"later": _registers(3)})
    assert list(base.peft_config) == ["old"]
    base.delete_adapter("old")  # nothing is switched off any more
    assert not torch.allclose(_output(compose(base, {"later": make()}).eval()), plain)


def test_in_the_context_of_peft_itself(tmp_path: Path) -> None:
    model = get_peft_model(_build(), _lora()).eval()
    compose(_build(), {"saved": _registers(2)}).save_pretrained(tmp_path)
    before = _output(model)
    modules = [name for name, _ in model.named_modules()]
    with model.disable_adapter():
        for add in (lambda: compose(model, {"later": _registers(3)}), lambda: load_adapters(model, tmp_path)):
            with pytest.raises(ValueError, match="adapters of ViTModel are switched off"):
                add()
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(_output(model), before)
    assert not torch.allclose(_output(compose(model, {"later": _registers(3)}).eval()), before)
