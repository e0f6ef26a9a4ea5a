"""Several register adapters on one model: together, in turn, renamed, deleted, saved and loaded one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs, perturb
from helpers import Snapshot, assert_identical, differs, run
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

from register_adapter import (
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    compose,
    find_register_layer,
    load_adapters,
    rename_adapter,
    save_adapters,
)

COUNTS = {"one": 1, "four": 4, "eight": 8}
MODELS = ("vit", "clip-vision", "dinov2", "siglip-vision")
SETS = (("one",), ("eight",), ("one", "four"), ("four", "one"), ("eight", "one", "four"))


def several(name: str = "vit") -> Any:
    model = add_registers(build(name), COUNTS["one"], "one", init_std=1.0)
    for adapter in ("four", "eight"):
        model.add_adapter(adapter, RegisterConfig(num_registers=COUNTS[adapter], init_std=1.0))
    return model.eval()


def tokens(model: nn.Module, adapter: str) -> torch.Tensor:
    layer = find_register_layer(model)
    assert layer is not None
    return layer.tokens(adapter).weight


def activate(model: Any, names: Any) -> None:
    model.base_model.set_adapter(list(names))


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_together_are_one_with_all_their_registers(name: str, names: tuple[str, ...]) -> None:
    model, inputs = several(name), make_inputs(name)
    activate(model, names)
    joined = add_registers(build(name), sum(COUNTS[adapter] for adapter in names)).eval()
    with torch.no_grad():
        tokens(joined, "default").copy_(torch.cat([tokens(model, adapter) for adapter in names]))
    assert_identical(run(model, inputs), run(joined, inputs))
    assert differs(run(model, inputs), run(build(name), inputs))


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_the_active_adapters_train_and_the_others_rest(names: tuple[str, ...]) -> None:
    model = several().train()
    activate(model, names)
    model(**make_inputs("vit")).last_hidden_state.square().sum().backward()
    for adapter in COUNTS:
        gradient = tokens(model, adapter).grad
        assert (gradient is not None and bool(gradient.abs().sum(1).gt(0).all())) == (adapter in names)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_switched_and_deleted(name: str) -> None:
    base, inputs = build(name), make_inputs(name)
    snapshot = Snapshot(base, inputs)
    model, alone = several(name), {}
    for adapter in COUNTS:
        model.set_adapter(adapter)
        alone[adapter] = run(model, inputs)
    assert all(
        differs(alone[left], alone[right]) for left, right in (("one", "four"), ("four", "eight"), ("eight", "one"))
    )
    model.delete_adapter("four")
    assert_identical(run(model, inputs), alone["eight"])
    model.delete_adapter("eight")
    assert_identical(run(model, inputs), alone["one"])
    assert list(model.peft_config) == ["one"]
    assert_identical(run(model.unload(), inputs), snapshot.outputs)


@pytest.mark.parametrize("selected", [["one"], ["eight", "four"], ["one", "four", "eight"]], ids="+".join)
def test_some_are_saved_and_loaded(selected: list[str], tmp_path: Path) -> None:
    model, inputs = several(), make_inputs("vit")
    model.save_pretrained(tmp_path, selected_adapters=selected)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(selected)
    first, *rest = selected
    again = PeftModel.from_pretrained(build("vit"), str(tmp_path / first), first)
    for adapter in rest:
        again.load_adapter(str(tmp_path / adapter), adapter)
    for names in ([first], selected):
        activate(again, names)
        activate(model, names)
        assert_identical(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_a_folder_of_all_brings_back_which_were_active(names: tuple[str, ...], tmp_path: Path) -> None:
    model, inputs = several(), make_inputs("vit")
    activate(model, names)
    save_adapters(model, tmp_path)
    loaded = load_adapters(build("vit"), tmp_path)
    assert loaded.active_adapters == list(names)
    assert set(loaded.peft_config) == set(COUNTS)
    assert_identical(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("names", [("registers", "more"), ("layers", "embeddings"), ("weight", "q_proj")], ids="+".join)
def test_an_adapter_may_be_called_like_a_module(names: tuple[str, ...], tmp_path: Path) -> None:
    first, second = names
    lora = LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    model = compose(build("vit"), {name: RegisterConfig(num_registers=2, init_std=1.0) for name in names})
    model.add_adapter("lora", lora)
    save_adapters(model.eval(), tmp_path)
    loaded, inputs = load_adapters(build("vit"), tmp_path), make_inputs("vit")
    assert set(loaded.active_adapters) == {first, second, "lora"}
    assert_identical(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["weight", "gate", "limits", "classifier"])
@pytest.mark.parametrize("way", ["peft", "compose"])
def test_an_adapter_may_be_called_like_a_tensor_of_another(way: str, name: str, tmp_path: Path) -> None:
    base, inputs = build("vit-classifier"), make_inputs("vit-classifier")
    first = RegisterConfig(num_registers=2, gate=0.5, register_neurons={1: [3, 4]}, modules_to_save=["classifier"])
    model = compose(base, {"a": first}) if way == "compose" else get_peft_model(base, first, "a")
    model.add_adapter(name, RegisterConfig(num_registers=2, init_std=1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path)
    base = build("vit-classifier")
    if way == "compose":
        loaded = load_adapters(base, tmp_path)
    else:
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "a"), "a")
        loaded.load_adapter(str(tmp_path / name), name)
    for chosen in ("a", name):
        model.set_adapter(chosen)
        loaded.set_adapter(chosen)
        assert_identical(run(loaded, inputs), run(model, inputs))


def test_a_composed_model_switches_several_registers_beside_lora() -> None:
    inputs = make_inputs("vit")
    model = compose(several(), {"lora": LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)}).eval()
    assert model.active_adapters == ["one", "lora"]
    model.set_adapter(["eight", "one"])
    assert model.active_adapters == ["eight", "one", "lora"]
    with model.disable_adapter("one"):
        without = run(model, inputs)
    model.set_adapter("eight")
    assert_identical(run(model, inputs), without)
    model.delete_adapter("eight")
    assert "lora" in model.active_adapters
    assert list(model.peft_config) == ["one", "four", "lora"]


# Renaming


def _as_peft_model() -> Any:
    return several()


def _in_transformers() -> Any:
    model = build("vit")
    for adapter, count in COUNTS.items():
        model.add_adapter(RegisterConfig(num_registers=count, init_std=1.0), adapter)
    model.set_adapter("one")
    return model.eval()


def _composed() -> Any:
    return compose(several(), {"vera": VeraConfig(target_modules=["v_proj", "value"], r=4, init_weights=False)}).eval()


@pytest.mark.parametrize("make", [_as_peft_model, _in_transformers, _composed])
def test_a_renamed_adapter_is_the_same_under_its_new_name(make: Any, tmp_path: Path) -> None:
    model, inputs = make(), make_inputs("vit")
    expected, values = run(model, inputs), tokens(model, "one")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    rename_adapter(model, "one", "new")
    assert list(model.peft_config)[:3] == ["new", "four", "eight"]
    assert tokens(model, "new") is values
    assert not [key for key in model.state_dict() if ".one." in key]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert_identical(run(model, inputs), expected)
    save_adapters(model, tmp_path)
    assert_identical(run(load_adapters(build("vit"), tmp_path), inputs), expected)
    model.set_adapter("four")
    assert differs(run(model, inputs), expected)
    model.set_adapter("new")
    assert_identical(run(model, inputs), expected)
    model.delete_adapter("new")
    assert "new" not in model.peft_config


@pytest.mark.parametrize("method", [LoraConfig, VeraConfig])
def test_an_adapter_of_another_method_is_renamed(method: Any, tmp_path: Path) -> None:
    model, inputs = (
        compose(several(), {"old": method(r=4, target_modules=["v_proj", "value"])}).eval(),
        make_inputs("vit"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += ("old" in name) * torch.randn_like(parameter)
    expected = run(model, inputs)
    rename_adapter(model, "old", "new")
    assert model.active_adapters == ["one", "new"]
    assert_identical(run(model, inputs), expected)
    save_adapters(model, tmp_path)
    loaded = load_adapters(build("vit"), tmp_path)
    assert_identical(run(loaded, inputs), expected)
    model.add_adapter("old", method(r=4, target_modules=["v_proj", "value"]))
    assert_identical(run(model, inputs), expected)


def _of(method: str, targets: tuple[str, ...] = ("q_proj", "query")) -> Any:
    if method == "lora":
        return LoraConfig(target_modules=list(targets), init_lora_weights=False)
    return RegisterConfig(num_registers=2, init_std=1.0)


@pytest.mark.parametrize("change", ["delete", "rename"])
@pytest.mark.parametrize("method", ["registers", "lora"])
def test_one_is_added_after_the_first_of_its_method_went_or_was_renamed(method: str, change: str) -> None:
    model, inputs = compose(build("vit"), {"first": _of(method), "second": _of(method)}).eval(), make_inputs("vit")
    if change == "delete":
        model.delete_adapter("first")
    else:
        rename_adapter(model, "first", "new")
    expected, active = run(model, inputs), model.active_adapters
    model.add_adapter("third", _of(method))
    assert_identical(run(model.eval(), inputs), expected)
    assert model.active_adapters == active
    model.set_adapter("third")
    assert differs(run(model, inputs), expected)


def test_a_head_is_renamed_with_its_adapter() -> None:
    model = add_registers(build("vit-classifier"), 4, "old", modules_to_save=["classifier"], init_std=1.0).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["old"].weight += 1
    inputs = make_inputs("vit-classifier")
    expected = run(model, inputs)
    rename_adapter(model, "old", "new")
    assert_identical(run(model, inputs), expected)
    assert any("modules_to_save.new.weight" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nobody", "new", r"no adapter 'nobody'; the model has \['one', 'four', 'eight'\]"),
        ("one", "four", "the name 'four' is in use"),
        ("one", "a.b", "letters, digits"),
    ],
)
def test_a_bad_rename_changes_nothing(old: str, new: str, message: str) -> None:
    model = several()
    snapshot = Snapshot(model, make_inputs("vit"))
    with pytest.raises(ValueError, match=message):
        rename_adapter(model, old, new)
    snapshot.check()
    assert list(model.peft_config) == ["one", "four", "eight"]


@pytest.mark.parametrize("stock", [False, True])
def test_a_head_follows_when_the_adapter_before_it_is_deleted(stock: bool) -> None:
    """PEFT left the base's in its place, in silence, where the deleted adapter had none."""
    with_head, without = RegisterConfig(num_registers=2, modules_to_save=["pooler"]), RegisterConfig(num_registers=2)
    model: Any = (PeftModel if stock else RegisterPeftModel)(build("vit"), with_head, "first").eval()
    model.add_adapter("second", without)
    model.add_adapter("third", RegisterConfig(num_registers=2, modules_to_save=["pooler"]))
    perturb(model)
    inputs = make_inputs("vit")
    model.set_adapter("third")
    expected = run(model.eval(), inputs)
    model.set_adapter("first")
    assert differs(run(model, inputs), expected)
    for name in ("first", "second"):
        with pytest.warns(UserWarning, match="was active which is now deleted"):
            model.delete_adapter(name)
    assert model.active_adapters == ["third"]
    assert_identical(run(model, inputs), expected)
    assert all(head.requires_grad for name, head in model.named_parameters() if "modules_to_save.third" in name)


def test_the_first_adapter_may_be_deleted_while_others_are_active() -> None:
    """``has_active_enabled_adapter``, ``adapter_names=`` and saving raised ``KeyError``: the model still named it."""
    model = add_registers(build("vit"), 2, "first").eval()
    for name in ("second", "third"):
        model.add_adapter(name, RegisterConfig(num_registers=1))
    model.base_model.set_adapter(["second", "third"])
    model.delete_adapter("first")
    assert model.active_adapters == ["second", "third"]
    assert model.has_active_enabled_adapter
    assert model.active_adapter == "second"
    model(**make_inputs("vit"), adapter_names=["second", "__base__"])
