"""Somebody replaces the module that owns the position embeddings: trained offsets follow, or it is refused by name."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import hooks, run
from peft import LoraConfig, PeftModel, get_peft_model
from test_moved_positions import FAMILIES, fresh, move, moved, outputs
from test_wrapped_blocks import Around
from torch import nn

from register_adapter import PositionConfig, RegisterConfig, UnsupportedModelError, compose, load_adapters
from register_adapter.tuner.positions import PositionModel, position_layers

NAMES = [*FAMILIES, "torchvision"]


def owner_of(model: nn.Module) -> tuple[str, str]:
    """Path and name of the position embeddings, below the base."""
    place, name = position_layers(model)[0].place
    return next(path for path, module in model.named_modules() if module is place), name


def other(name: str) -> tuple[Any, str, str]:
    """A base with other position embeddings, and where they are."""
    base, (path, parameter) = fresh(name), owner_of(get_peft_model(fresh(name), PositionConfig()).get_base_model())
    with torch.no_grad():
        base.get_submodule(path)._parameters[parameter].add_(0.5)  # type: ignore[union-attr]
    return base, path, parameter


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def run_into(got: list[torch.Tensor], model: Any, inputs: Any) -> None:
    got.append(run(model, inputs)["last_hidden_state"])


@pytest.mark.parametrize("then", ["pass", "save", "copy", "twice", "unload", "delete"])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_follow(name: str, then: str, tmp_path: Path) -> None:
    base, path, _ = other(name)
    plain, expected = outputs(name, base), get_peft_model(base, PositionConfig())
    move(expected)
    wanted = outputs(name, expected)
    model, before = moved(name), hooks(fresh(name))
    if then == "twice":
        replace(model.get_base_model(), path, copy.deepcopy(model.get_base_model().get_submodule(path)))
        outputs(name, model)
        for value in model.get_base_model().get_submodule(path).parameters():
            value.data.add_(1 if value.requires_grad else 0)  # trained on, in the copy
        for layer in position_layers(expected):
            layer.offset_positions_values["default"].weight.data.add_(1)
        wanted = outputs(name, expected)
    replace(model.get_base_model(), path, other(name)[0].get_submodule(path))
    if then == "save":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(other(name)[0], tmp_path)
    if then == "copy":
        model = copy.deepcopy(model)
    if then in ("unload", "delete"):
        if then == "delete":
            model.delete_adapter("default")
        after = model.unload() if then == "unload" else model.base_model.model
        assert torch.equal(outputs(name, after), plain)
        if then == "unload":
            assert hooks(after) == before
    else:
        assert torch.equal(outputs(name, model), wanted)
        assert len(position_layers(model)) == 1
    assert not torch.equal(wanted, plain)


def test_a_tower_that_is_replaced_has_them_too() -> None:
    model = get_peft_model(build("vit-classifier"), PositionConfig())
    move(model)
    inputs = make_inputs("vit-classifier")
    before = run(model, inputs)["logits"]
    model.get_base_model().vit = build("vit-classifier").vit  # type: ignore[union-attr, assignment]
    assert torch.equal(run(model, inputs)["logits"], before)


def test_composed_models_and_threads(tmp_path: Path) -> None:
    model = compose(build("vit"), {"positions": PositionConfig(), "registers": RegisterConfig(init_std=1.0)})
    move(model)
    inputs = make_inputs("vit")
    before = run(model, inputs)["last_hidden_state"]
    for round_ in range(10):
        replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
        got: list[torch.Tensor] = []
        threads = [threading.Thread(target=run_into, args=(got, model, inputs)) for _ in "12"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [torch.equal(value, before) for value in got] == [True] * 2, round_
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    assert torch.equal(run(load_adapters(build("vit"), tmp_path), inputs)["last_hidden_state"], before)
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    base = model.unload()
    assert torch.equal(run(base, inputs)["last_hidden_state"], run(build("vit"), inputs)["last_hidden_state"])
    assert hooks(base) == hooks(build("vit"))


@pytest.mark.parametrize("kind", ["another grid", "merged"])
def test_where_they_cannot_follow_it_is_said_and_they_come_off(kind: str, tmp_path: Path) -> None:
    model, inputs = moved("vit"), make_inputs("vit")
    if kind == "merged":
        model.merge_adapter()
    new: Any = build("vit").embeddings
    if kind == "another grid":
        new.position_embeddings = nn.Parameter(torch.zeros(1, 5, 32))
    replace(model.get_base_model(), "embeddings", new)
    for call in (lambda: run(model, inputs), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(UnsupportedModelError, match="position embeddings"):
            call()
    assert not list(tmp_path.glob("*.safetensors"))
    assert hooks(model.unload()) == hooks(build("vit"))


@pytest.mark.parametrize("when", ["before", "within", "within, and no pass"])
@pytest.mark.parametrize("kind", ["alone", "registers", "lora"])
def test_they_are_off_where_adapters_are_disabled(kind: str, when: str) -> None:
    configs: dict[str, Any] = {
        "registers": RegisterConfig(init_std=1.0),
        "lora": LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False),
    }
    model: Any = moved("vit")
    if kind != "alone":
        model = compose(build("vit"), {"positions": PositionConfig(), "other": configs[kind]})
        move(model)
    inputs = make_inputs("vit")
    plain, before = (run(each, inputs)["last_hidden_state"] for each in (build("vit"), model))
    if when == "before":
        replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    with model.disable_adapter():
        if when != "before":
            replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
        if when != "within, and no pass":
            assert torch.equal(run(model, inputs)["last_hidden_state"], plain)
    assert torch.equal(run(model, inputs)["last_hidden_state"], before)
    assert not torch.equal(before, plain)


def test_an_optimiser_meets_them_before_the_first_pass() -> None:
    model = moved("vit")
    offsets = position_layers(model)[0].offset_positions_values["default"].weight
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    assert [value is offsets for value in model.parameters() if value.requires_grad] == [True]


@pytest.mark.parametrize("kind", ["alone", "composed"])
def test_they_are_in_the_state_before_the_first_pass(kind: str) -> None:
    model: Any = moved("vit") if kind == "alone" else compose(build("vit"), {"default": PositionConfig()})
    move(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)
    offsets = position_layers(model)[0].offset_positions_values["default"].weight
    offsets.data.zero_()
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    model.load_state_dict(before)
    assert offsets.any()


def test_a_module_that_hides_its_parts_is_refused_or_has_them() -> None:
    inputs, model = make_inputs("clip-vision"), moved("clip-vision")
    before, base = run(model, inputs)["last_hidden_state"], model.get_base_model()
    path = owner_of(base)[0].rpartition(".")[0]
    old = base.get_submodule(path)
    replace(base, path, Around(old))
    assert torch.equal(run(model, inputs)["last_hidden_state"], before)
    replace(base, path, Around(build("clip-vision").get_submodule(path)))
    with pytest.raises(UnsupportedModelError, match="was replaced"):
        run(model, inputs)
    replace(base, path, old)
    assert torch.equal(run(model, inputs)["last_hidden_state"], before)


def test_another_grid_in_the_same_module_is_refused() -> None:
    model: Any = moved("vit")
    model.get_base_model().embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1, 32))
    with pytest.raises(UnsupportedModelError, match="grid"):
        run(model, make_inputs("vit"))


def test_an_interrupted_adapter_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        put_on(self, *args, **kwargs)
        raise KeyboardInterrupt

    put_on, model = PositionModel._create_and_replace, moved("vit")
    replace(model.get_base_model(), "embeddings", build("vit").embeddings)  # type: ignore[arg-type]
    monkeypatch.setattr(PositionModel, "_create_and_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("other", PositionConfig())
    assert [layer.adapters for layer in position_layers(model)] == [["default"]]
