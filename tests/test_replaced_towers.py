"""A tower that somebody replaces after registers were added: every way of calling the model says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import build, make_inputs
from helpers import assert_identical, flatten, run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Dinov2ForImageClassification

from register_adapter import (
    AdapterFileError,
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    compose,
    find_tower,
)
from register_adapter.tuner.layer import attached_layers

GONE = r"Dinov2Model at 'dinov2'.* is no longer in Dinov2For"


def classifier() -> Any:
    return Dinov2ForImageClassification(build("dinov2").config).eval()


def composed(base: nn.Module) -> Any:
    return compose(base, {"default": RegisterConfig(num_registers=3), "lora": LoraConfig(target_modules=["fc1"])})


def by_transformers(base: Any) -> Any:
    base.add_adapter(RegisterConfig(num_registers=3))
    return base


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "add_registers": lambda base: add_registers(base, 3),
    "get_peft_model": lambda base: get_peft_model(base, RegisterConfig(num_registers=3)),
    "compose": composed,
    "transformers": by_transformers,
    "base": lambda base: add_registers(base, 3).get_base_model(),
    "tuner": lambda base: add_registers(base, 3).base_model,
}


def replaced(way: str) -> tuple[Any, Any, Any]:
    base = classifier()
    model, tower = WAYS[way](base).eval(), base.dinov2
    base.dinov2 = classifier().dinov2
    return model, base, tower


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_tower_is_refused(way: str) -> None:
    model, base, tower = replaced(way)
    inputs = make_inputs("dinov2")
    for candidate in (model, copy.deepcopy(model), base):
        with pytest.raises(UnsupportedModelError, match=GONE):
            candidate(**inputs)
    replacement, base.dinov2 = base.dinov2, tower
    expected = run(WAYS[way](classifier()).eval(), inputs)
    assert run(model, inputs)["logits"].shape == expected["logits"].shape
    base.dinov2 = replacement
    with pytest.raises(UnsupportedModelError, match=GONE):
        model(**inputs)


@pytest.mark.parametrize("way", ["add_registers", "compose"])
def test_without_adapters_the_replacement_runs(way: str) -> None:
    model, _, _ = replaced(way)
    with model.disable_adapter():
        run(model, make_inputs("dinov2"))
    with pytest.raises(UnsupportedModelError, match=GONE):
        model(**make_inputs("dinov2"))


@pytest.mark.parametrize("way", ["add_registers", "compose", "transformers"])
def test_registers_are_added_to_the_replacement_as_the_error_says(way: str) -> None:
    model, base, _ = replaced(way)
    inputs = make_inputs("dinov2")
    model.delete_adapter("default")
    run(model, inputs)
    config = RegisterConfig(num_registers=3)
    model.add_adapter(config, "default") if way == "transformers" else model.add_adapter("default", config)
    run(model, inputs)
    assert [layer.tower.module for layer in attached_layers(base)] == [base.dinov2]


@pytest.mark.parametrize("way", ["add_registers", "get_peft_model", "compose"])
def test_the_base_comes_back_without_hooks(way: str) -> None:
    model, base, tower = replaced(way)
    plain = model.unload()
    assert plain is base
    assert not attached_layers(base)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in [*base.modules(), *tower.modules()])
    assert_identical(run(base, make_inputs("dinov2")), run(copy.deepcopy(base), make_inputs("dinov2")))


@pytest.mark.parametrize("way", ["add_registers", "get_peft_model", "compose"])
def test_registers_that_are_gone_are_not_saved(way: str, tmp_path: Path) -> None:
    model, _, _ = replaced(way)
    with pytest.raises(UnsupportedModelError, match=GONE):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_module_between_the_model_and_its_tower_may_be_called() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    base = Outer().eval()
    model = add_registers(base, 3).eval()
    base.inner.dinov2 = classifier().dinov2
    for part in (model, base, base.inner):
        with pytest.raises(UnsupportedModelError, match=r"at 'inner\.dinov2'"):
            part(**make_inputs("dinov2"))
    base.inner = classifier()
    with pytest.raises(UnsupportedModelError, match=r"at 'inner\.dinov2'"):
        base(**make_inputs("dinov2"))


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_tower_is_still_there(way: str) -> None:
    base = classifier()
    model = WAYS[way](base).eval()
    before = run(model, make_inputs("dinov2"))
    base.dinov2 = nn.DataParallel(base.dinov2)
    assert_identical(run(model, make_inputs("dinov2")), before)


@pytest.mark.parametrize("copied", [False, True])
def test_a_method_that_uses_the_tower_refuses_another_one(copied: bool) -> None:
    model, pixels = add_registers(build("metaclip2"), 3, init_std=1.0).eval(), make_inputs("metaclip2")["pixel_values"]
    before = flatten(model.get_image_features(pixels))
    model = copy.deepcopy(model) if copied else pickle.loads(pickle.dumps(model))
    assert_identical(flatten(model.get_image_features(pixels)), before)
    base = model.get_base_model()
    tower, base.vision_model = base.vision_model, copy.deepcopy(build("metaclip2").vision_model)
    for candidate in (model, base):
        with pytest.raises(UnsupportedModelError, match="is no longer in MetaClip2Model"):
            candidate.get_image_features(pixels)
    base.vision_model = tower
    assert_identical(flatten(base.get_image_features(pixels)), before)
    assert "get_image_features" not in vars(model.unload())


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the loader of transformers 4 finds this tower")
def test_the_loader_of_transformers_says_where_it_looks_for_a_tower(tmp_path: Path) -> None:
    base, dual = build("metaclip2-vision"), build("metaclip2")
    find_tower(base).module.load_state_dict(find_tower(dual).module.state_dict())
    add_registers(base, 2).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"that the adapter was trained on.*PeftModel\.from_pretrain"):
        dual.load_adapter(str(tmp_path))
    PeftModel.from_pretrained(dual, tmp_path)
