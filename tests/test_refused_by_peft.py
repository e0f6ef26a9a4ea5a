"""Modules saved beside the registers, by PEFT's own ways in: they agree, and a refusal leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import loads_heads
from helpers import assert_identical
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_refusals import (
    CLASSES,
    HEAD,
    PIXELS,
    PREFIX,
    WAYS,
    WEIGHTS,
    WIDTH,
    Spoil,
    adapter,
    base,
    build,
    change,
    good,
    loaded,
    untouched,
)

from register_adapter import AdapterFileError, RegisterConfig, RegisterPeftModel, add_registers, find_register_layer

__all__ = ["adapter", "base", "good", "loaded", "untouched"]  # fixtures

NORM = "layernorm_after"
NEW_NAMES = any("vit.layers.0." in name for name, _ in build().named_modules())  # transformers 5
FIRST = f"{PREFIX}vit.{'layers' if NEW_NAMES else 'encoder.layer'}.0."


def rows(number: int, **config: Any) -> Spoil:
    return change({f"{HEAD}weight": torch.ones(number, WIDTH), f"{HEAD}bias": torch.ones(number)}, **config)


def names(number: int) -> dict[str, str]:
    return {str(index): f"class {index}" for index in range(number)}


def copies(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The trained copies of the modules of that name, by their places in the tower."""
    tensors = {key: value for key, value in model.state_dict().items() if f"{name}.modules_to_save." in key}
    return {key.removeprefix(PREFIX).removeprefix("vit."): value for key, value in tensors.items()}


# --- what is legitimate gets in, by every way alike -------------------------------------------------------------------

FILLED_BY_TRANSFORMERS = ("transformers", "second adapter, transformers", "AutoModel")
ONTO_A_TOWER: dict[str, Callable[[Any, str], Any]] = {
    "PeftModel": PeftModel.from_pretrained,
    "RegisterPeftModel": RegisterPeftModel.from_pretrained,
    "transformers": lambda tower, name: (tower.load_adapter(name), tower)[1],
}


def onto(way: str, tower: Any, folder: Path) -> Any:
    def load() -> Any:
        return ONTO_A_TOWER[way](tower, str(folder))

    return loads_heads(load) if way == "transformers" else load()


@pytest.fixture
def with_norms(loaded: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A classifier whose head and inner layer norms were trained, and where it is saved."""
    model = add_registers(copy.deepcopy(loaded), 2, modules_to_save=["classifier", NORM])
    with torch.no_grad():
        for value in copies(model, NORM).values():
            value += torch.randn(value.shape)
    model.save_pretrained(tmp_path / "norms")
    return model, tmp_path / "norms"


@pytest.mark.parametrize("way", ONTO_A_TOWER)
def test_inner_modules_are_loaded_onto_a_bare_tower(way: str, with_norms: tuple[Any, Path], loaded: Any) -> None:
    if way == "transformers" and not NEW_NAMES:
        pytest.skip("transformers 4 does not look below base_model_prefix")
    model, folder = with_norms
    tower = tf.ViTModel.from_pretrained(loaded.name_or_path, add_pooling_layer=False)
    with pytest.warns(UserWarning, match="it is left out"):
        again = onto(way, tower, folder)
    assert_identical(copies(again, NORM), copies(model, NORM))


def test_inner_modules_go_from_a_bare_tower_onto_a_classifier(loaded: Any, base: Any, tmp_path: Path) -> None:
    tower = tf.ViTModel.from_pretrained(loaded.name_or_path, add_pooling_layer=False)
    model = add_registers(tower, 2, modules_to_save=[NORM])
    with torch.no_grad():
        for value in copies(model, NORM).values():
            value += 1
    model.save_pretrained(tmp_path)
    assert_identical(copies(PeftModel.from_pretrained(base, str(tmp_path)), NORM), copies(model, NORM))


@pytest.mark.skipif(not NEW_NAMES, reason="transformers 4 has the old names")
@pytest.mark.parametrize("way", ONTO_A_TOWER)
def test_names_of_older_releases_are_known(way: str, with_norms: tuple[Any, Path], base: Any) -> None:
    model, folder = with_norms
    old = {key.replace("vit.layers.", "vit.encoder.layer."): v for key, v in load_file(folder / WEIGHTS).items()}
    assert any(".encoder.layer." in key for key in old)
    save_file(old, folder / WEIGHTS)
    change()(folder)
    assert_identical(copies(onto(way, base, folder), NORM), copies(model, NORM))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "load_adapters"])
@pytest.mark.parametrize("labels", [None, names(CLASSES), names(1), names(7)], ids=["none", "base's", "one", "own"])
@pytest.mark.parametrize("number", [CLASSES, 7])
def test_a_head_has_as_many_classes_as_its_file(
    number: int, labels: dict[str, str] | None, way: str, base: Any, adapter: Path
) -> None:
    rows(number, id2label=labels)(adapter)
    model, load = WAYS[way](base, adapter)
    result = loads_heads(load) if way in FILLED_BY_TRANSFORMERS else load()
    model = result if isinstance(result, torch.nn.Module) else model
    heads = [value for key, value in model.state_dict().items() if key.endswith(".weight") and "classifier.mod" in key]
    assert [value.shape[0] for value in heads] == [number]
    (shown,) = find_register_layer(model).labels.values() or [names(CLASSES)]
    assert len(shown) == number
    if labels and len(labels) == number:
        assert list(shown.values()) == list(labels.values())


# --- what is not is refused before a change ---------------------------------------------------------------------------

NORMS = {"modules_to_save": ["classifier", NORM]}
FAULTS: dict[str, Spoil] = {
    "an inner module without a bias": change(
        {f"{PREFIX}vit.embeddings.patch_embeddings.projection.weight": torch.zeros(WIDTH, 3, 8, 8)},
        modules_to_save=["classifier", "projection"],
    ),
    "an inner module of one block only": change(
        {f"{FIRST}{NORM}.weight": torch.ones(WIDTH), f"{FIRST}{NORM}.bias": torch.ones(WIDTH)}, **NORMS
    ),
    "an inner module of another width": change(
        {
            f"{FIRST.replace('.0.', f'.{block}.')}{NORM}.{end}": torch.ones(7)
            for block in (0, 1)
            for end in ("weight", "bias")
        },
        **NORMS,
    ),
    "a task's head without a bias": change({f"{HEAD}bias": None}, task_type="SEQ_CLS"),
    "a task's head without tensors": change({f"{HEAD}bias": None, f"{HEAD}weight": None}, task_type="SEQ_CLS"),
    "a task of text": change(task_type="CAUSAL_LM"),
    "a task from text to text": change(task_type="SEQ_2_SEQ_LM"),
    "the registers for a module": change(modules_to_save=["classifier", "registers"]),
    "the tokens for a module": change(modules_to_save=["classifier", "register_adapter_tokens"]),
    "the tower's registers for a module": change(modules_to_save=["classifier", "vit.registers"]),
    "a head without a bias and with more classes": change({f"{HEAD}bias": None, f"{HEAD}weight": torch.ones(7, WIDTH)}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_module_leaves_the_model_as_it_was(
    fault: str, way: str, base: Any, adapter: Path, untouched: Any
) -> None:
    if way == "AutoPeftModel" and "task" in fault:
        pytest.skip("PEFT's AutoPeftModel takes no file with a task")
    FAULTS[fault](adapter)
    model, load = WAYS[way](base, adapter)
    check = untouched(model)
    with pytest.raises(AdapterFileError) as caught:
        load()
    assert str(adapter.parent) in str(caught.value), "the file is not named"
    check()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_cannot_do_is_refused(task: str, base: Any, untouched: Any) -> None:
    check = untouched(base)
    with pytest.raises(ValueError, match=task):
        get_peft_model(base, RegisterConfig(task_type=task))
    check()


@pytest.mark.parametrize("way", ["PeftModel", "second adapter of a PeftModel", "second adapter"])
def test_whatever_fails_while_the_values_go_in_is_undone(
    way: str, base: Any, adapter: Path, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load = WAYS[way](base, adapter)
    check, load_state_dict = untouched(model), torch.nn.Module.load_state_dict

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        load_state_dict(self, *args, **kwargs)
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", fail)
        with pytest.raises(MemoryError):
            load()
    check()


@pytest.mark.skipif(not NEW_NAMES, reason="transformers 4 puts adapters in by another function")
def test_an_adapter_that_transformers_cannot_put_in_leaves_no_name(
    base: Any, adapter: Path, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load = WAYS["second adapter, transformers"](base, adapter)
    check = untouched(model)
    # Nothing comes in: the registers have no values when the loader is done.
    monkeypatch.setattr(type(model), "_load_pretrained_model", lambda *args, **kwargs: (None, None), raising=False)
    with pytest.raises(AdapterFileError):
        load()
    assert list(model.peft_config) == ["first"]
    check()


def test_other_values_can_be_put_in_later(base: Any, adapter: Path) -> None:
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    state = {key: value + 1 for key, value in load_file(adapter / WEIGHTS).items()}
    set_peft_model_state_dict(model, state)
    expected = state[f"{HEAD}bias"]
    assert torch.equal(model.get_base_model().classifier.modules_to_save["default"].bias, expected)
    assert model(**PIXELS).logits.isfinite().all()
