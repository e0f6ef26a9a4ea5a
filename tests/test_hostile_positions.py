"""Files of moved position embeddings with something wrong in them: refused by name, and the model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, loads_heads, make_inputs
from helpers import Snapshot, assert_identical, run
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_save_load import found_by_transformers, with_tower_of
from torch import nn

from register_adapter import PositionConfig
from register_adapter.errors import AdapterFileError, BaseModelMismatchError, UnsupportedModelError
from register_adapter.tuner.positions import position_layers

OFFSETS = "base_model.model.embeddings.offset_positions.offset_positions_values.weight"
#: The tower in a classifier.
INSIDE = OFFSETS.replace("model.embeddings", "model.vit.embeddings")


def base(kind: str) -> Any:
    model: Any = build("vit")
    if kind == "head":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tf.ViTForImageClassification(model.config)
    return model.eval()


def write(kind: str, folder: Path) -> Path:
    model = get_peft_model(base(kind), PositionConfig(modules_to_save=["classifier"] if kind == "head" else None))
    with torch.no_grad():
        for layer in position_layers(model):
            layer.offset_positions_values["default"].weight.normal_()
        if kind == "head":
            model.get_base_model().classifier.modules_to_save["default"].weight.normal_()
    model.save_pretrained(str(folder))
    return folder


def _with(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {**tensors, key: value(tensors[key])}


#: What is done to the tensors, and what the refusal says.
SPOILED: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "the base's own": (
        "tower",
        lambda tensors: {**tensors, "base_model.model.layernorm.weight": torch.zeros(32)},
        "tensors that the config does not mention",
    ),
    "no offsets": ("tower", lambda tensors: {"base_model.model.other": torch.zeros(1)}, "expected one tensor"),
    "not finite": ("tower", _with(OFFSETS, lambda value: value * torch.nan), "not finite"),
    "too large": ("tower", _with(OFFSETS, lambda value: value.double() + 1e300), "not finite"),
    "whole numbers": ("tower", _with(OFFSETS, lambda value: value.to(torch.int32)), "dtype torch.int32"),
    "another grid": ("tower", _with(OFFSETS, lambda value: value[:, 1:].contiguous()), "has shape"),
    "flat": ("tower", _with(OFFSETS, lambda value: value.flatten()), "has shape"),
    "a head of another width": (
        "head",
        _with("base_model.model.classifier.weight", lambda value: value[:, 1:].contiguous()),
        "classifier.weight has shape",
    ),
    "a head of other classes": (
        "head",
        _with("base_model.model.classifier.weight", lambda value: value.repeat(2, 1)),
        "classifier",
    ),
    "no head": (
        "head",
        lambda tensors: {INSIDE: tensors[INSIDE]},
        r"no tensors of the modules_to_save \['classifier'\]",
    ),
}
WAYS: dict[str, Callable[[Any, str], Any]] = {
    "PeftModel": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "trainable": lambda model, folder: PeftModel.from_pretrained(model, folder, is_trainable=True),
    "transformers": lambda model, folder: model.load_adapter(folder),
}


def refused(
    load: Callable[[], Any], model: nn.Module, inputs: Any, message: str, folder: Path, kind: Any = AdapterFileError
) -> None:
    before = Snapshot(model, inputs)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(kind, match=message) as error:
        load()
    assert str(folder) in str(error.value)
    before.check()
    assert [type(module) for module in model.modules()] == classes
    assert not getattr(model, "peft_config", {})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_spoiled_file_changes_nothing(spoiled: str, way: str, tmp_path: Path) -> None:
    kind, change, message = SPOILED[spoiled]
    file = write(kind, tmp_path) / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    model, inputs = base(kind), make_inputs("vit")
    refused(lambda: WAYS[way](model, str(tmp_path)), model, inputs, message, tmp_path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", b"\xff" * 40, "not a whole safetensors file"),
        ("adapter_model.safetensors", None, "no weights"),
        ("adapter_config.json", {"base_tower": 5}, "base_tower must be dict"),
        ("adapter_config.json", {"target_modules": [1]}, "target_modules must hold names"),
        ("adapter_config.json", {"modules_to_save": 5}, "modules_to_save must be list or tuple"),
        ("adapter_config.json", {"modules_to_save": [["a"]]}, "modules_to_save must hold names"),
        ("adapter_config.json", {"modules_to_save": ["offset_positions"]}, "the offsets themselves"),
        ("adapter_config.json", {"inference_mode": "yes"}, "inference_mode must be bool"),
        ("adapter_config.json", {"revision": 5}, "revision must be str or None"),
        ("adapter_config.json", {"modules_to_save": "classifier"}, "modules_to_save must be list"),
        ("adapter_config.json", {"base_model_name_or_path": 5}, "base_model_name_or_path must be str"),
    ],
    ids=[
        "damaged",
        "no weights",
        "base",
        "target",
        "head",
        "head in a list",
        "own module",
        "mode",
        "revision",
        "heads",
        "name",
    ],
)
def test_so_do_damaged_files_and_configs(way: str, name: str, content: Any, message: str, tmp_path: Path) -> None:
    file = write("tower", tmp_path) / name
    if content is None:
        file.unlink()
    elif isinstance(content, dict):
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **content}), "utf-8")
    else:
        file.write_bytes(content)
    model, inputs = base("tower"), make_inputs("vit")
    refused(lambda: WAYS[way](model, str(tmp_path)), model, inputs, message, tmp_path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["tower", "head"])
def test_a_whole_file_loads_in_the_same_ways(kind: str, way: str, tmp_path: Path) -> None:
    """Also after a refusal, and over one that is there."""
    inputs = make_inputs("vit")
    trained = PeftModel.from_pretrained(base(kind), str(write(kind, tmp_path / "whole"))).eval()
    expected = run(trained, inputs)
    file = write(kind, tmp_path / "spoiled") / "adapter_model.safetensors"
    save_file({key: value * torch.nan for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model = base(kind)
    with pytest.raises(AdapterFileError):
        WAYS[way](model, str(tmp_path / "spoiled"))

    def load() -> Any:
        return WAYS[way](model, str(tmp_path / "whole"))

    loaded = loads_heads(load) if (kind, way) == ("head", "transformers") else load()
    subject = (model if way == "transformers" else loaded).eval()
    assert_identical(run(subject, inputs), expected)
    if way == "transformers":
        return
    for name in ("default", "another"):
        with pytest.raises(AdapterFileError, match="not finite"):
            subject.load_adapter(str(tmp_path / "spoiled"), name)
        assert list(subject.peft_config) == ["default"]
        assert_identical(run(subject, inputs), expected)


@pytest.mark.parametrize("way", ["PeftModel", "transformers"])
@pytest.mark.parametrize("name", ["vit", "clip-vision"])
def test_a_second_file_loads_beside_one_that_is_there(name: str, way: str, tmp_path: Path) -> None:
    inputs, expected = make_inputs(name), {}
    for adapter in ("default", "another"):
        trained = get_peft_model(build(name), PositionConfig())
        torch.nn.init.normal_(position_layers(trained)[0].offset_positions_values["default"].weight)
        trained.save_pretrained(str(tmp_path / adapter))
        expected[adapter] = run(trained.eval(), inputs)
    model: Any = build(name).eval()
    if way == "PeftModel":
        model = PeftModel.from_pretrained(model, str(tmp_path / "default"))
    else:
        model.load_adapter(str(tmp_path / "default"))
    model.load_adapter(str(tmp_path / "another"), "another")
    for adapter, values in expected.items():
        model.set_adapter(adapter)
        assert_identical(run(model.eval(), inputs), values)
    assert all(layer.before is None for layer in position_layers(model)), "nothing waits any longer"


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize(("source", "target"), [("clip-vision", "clip"), ("clip", "clip-vision")])
def test_transformers_loads_them_from_another_model_or_says_that_it_cannot(
    source: str, target: str, is_trainable: bool, tmp_path: Path
) -> None:
    trained = get_peft_model(build(source), PositionConfig())
    torch.nn.init.normal_(position_layers(trained)[0].offset_positions_values["default"].weight)
    trained.save_pretrained(str(tmp_path))
    model, inputs = with_tower_of(target, source).eval(), make_inputs(target)
    whole = with_tower_of(target, source).eval()
    whole.load_state_dict(model.state_dict())
    expected = run(PeftModel.from_pretrained(whole, str(tmp_path)).eval(), inputs)

    def load() -> None:
        model.load_adapter(str(tmp_path), is_trainable=is_trainable)
        model.train(is_trainable)

    if found_by_transformers(source, target):
        load()
        assert_identical(run(model.eval(), inputs), expected)
    else:
        before = Snapshot(model, inputs)
        with pytest.raises(AdapterFileError, match=r"(?s)no \(finite\) position values.*PeftModel\.from_pretrained"):
            load()
        before.check()
        assert not position_layers(model)
        assert not getattr(model, "peft_config", {})


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = write("tower", tmp_path) / "adapter_model.safetensors"
    save_file({key: value * 0 + 1e6 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    PeftModel.from_pretrained(base("tower"), str(tmp_path))
    model = base("tower").half()
    before = dict(model.state_dict())
    with pytest.raises(AdapterFileError, match=r"has values up to 1e.06, and the model is in torch.float16"):
        PeftModel.from_pretrained(model, str(tmp_path), ignore_base_mismatch=True)
    assert not position_layers(model)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_of_text_is_refused_on_a_model_without(task_type: str) -> None:
    model, inputs = base("tower"), make_inputs("vit")
    before = Snapshot(model, inputs)
    with pytest.raises(ValueError, match=f"task_type '{task_type}' is for models that generate text"):
        get_peft_model(model, PositionConfig(task_type=task_type))
    before.check()
    assert not position_layers(model)


def test_a_class_outside_of_the_list_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("register_adapter.tuner.positions.config.CHECKS_IMPORTS", False)  # as in PEFT 0.18
    config = write("tower", tmp_path) / "adapter_config.json"
    kept = {"parent_library": "transformers", "base_model_class": "ViTModel"}
    for named, expected in ((kept, kept), ({**kept, "parent_library": "strange_module"}, None)):
        config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "auto_mapping": named}), "utf-8")
        assert PeftConfig.from_pretrained(str(tmp_path)).auto_mapping == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("another base", BaseModelMismatchError, "was made for"), ("no tower", UnsupportedModelError, "elsewhere")],
)
def test_a_refusal_of_the_base_names_the_file(kind: str, error: Any, message: str, way: str, tmp_path: Path) -> None:
    file = write("tower", tmp_path) / "adapter_config.json"
    model, inputs = base("tower"), make_inputs("vit")
    if kind == "no tower":
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "target_modules": "elsewhere"}), "utf-8")
    else:
        with torch.no_grad():
            model.embeddings.patch_embeddings.projection.weight.mul_(-1)
    refused(lambda: WAYS[way](model, str(tmp_path)), model, inputs, message, tmp_path, error)
