"""Values of a file that are loaded over those of an adapter: they must have been trained for it, and for its base."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import Snapshot, assert_identical, run
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_heads_left_out import head_model
from torch import nn

from register_adapter import (
    AdapterFileError,
    BaseModelMismatchError,
    PositionConfig,
    RegisterConfig,
    add_registers,
    compose,
    load_adapters,
)
from register_adapter.utils.files import checksum

LORA = LoraConfig(target_modules=["q_proj", "query"])
#: How an adapter called "default" is put on a model.
WAYS: dict[str, Any] = {
    "add_registers": lambda base, **options: add_registers(base, 2, **options),
    "peft": lambda base, **options: get_peft_model(base, RegisterConfig(num_registers=2, **options)),
    "compose": lambda base, **options: compose(
        base, {"default": RegisterConfig(num_registers=2, **options), "lora": copy.deepcopy(LORA)}
    ),
    "positions": lambda base, **options: get_peft_model(base, PositionConfig(**options)),
}


def moved(model: Any) -> Any:
    """As if it were trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def other_base() -> Any:
    base = build("vit")
    for key, value in base.named_parameters():
        if key.endswith("bias"):
            value.data += torch.linspace(-1, 1, value.numel())
    return base


@pytest.mark.parametrize("order", [["lora", "registers"], ["registers", "lora"]], ids="-".join)
def test_biases_that_came_before_the_refusal_go_back(order: list[str], tmp_path: Path) -> None:
    configs = {"lora": LoraConfig(target_modules=["q_proj", "query"], bias="all"), "registers": RegisterConfig()}
    patches = build("vit")
    for key, value in patches.named_parameters():
        if "patch_embeddings" in key:
            value.data += torch.linspace(-1, 1, value.numel()).reshape(value.shape)
    moved(compose(patches, {name: copy.deepcopy(configs[name]) for name in order})).save_pretrained(tmp_path)
    model = moved(compose(build("vit"), {name: configs[name] for name in order}))
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        model.load_adapter(tmp_path, "lora")
    before.check()


def test_biases_that_came_with_a_new_adapter_go_back(tmp_path: Path) -> None:
    configs = {
        "lora": LoraConfig(target_modules=["q_proj", "query"], bias="all"),
        "norms": LNTuningConfig(target_modules=["layernorm_before"]),
    }
    moved(compose(build("vit"), configs)).save_pretrained(tmp_path)
    path, manifest = tmp_path / "norms" / "adapter_model.safetensors", tmp_path / "adapters.json"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    text = json.loads(manifest.read_text())
    for entry in text["adapters"]:
        entry["sha256"] = checksum(tmp_path / entry["name"] / "adapter_model.safetensors")
    manifest.write_text(json.dumps(text))
    base = build("vit")
    before = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=r"norms do not fit ViTModel"):
        load_adapters(base, tmp_path)
    before.check()


def tokens(model: Any) -> torch.Tensor:
    values = model.state_dict()
    return next(value for key, value in values.items() if key.endswith("register_adapter_tokens.default.weight"))


@pytest.mark.parametrize("fault", ["base", "block", "shape"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "positions"])
def test_a_new_adapter_that_is_only_used_is_compared_too(way: str, fault: str, tmp_path: Path) -> None:
    """It is frozen, as what a loader is about to fill is, but has its own values."""
    options = {"insert_layer": 1} if fault == "block" else {}
    base = other_base() if fault == "base" else build("vit")
    moved(add_registers(base, 3 if fault == "shape" else 2, **options)).save_pretrained(tmp_path)
    model = WAYS[way](build("vit"), inference_mode=True)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((BaseModelMismatchError, AdapterFileError)):
        model.load_adapter(tmp_path, "default")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["base", "block"])
def test_a_file_is_compared_where_the_caller_gives_the_config(fault: str, tmp_path: Path) -> None:
    options = {"insert_layer": 1} if fault == "block" else {}
    moved(add_registers(other_base() if fault == "base" else build("vit"), 2, **options)).save_pretrained(tmp_path)
    base = build("vit").eval()
    before = Snapshot(base, make_inputs("vit"))
    with pytest.raises((BaseModelMismatchError, AdapterFileError)):
        PeftModel.from_pretrained(base, tmp_path, config=RegisterConfig(num_registers=2))
    before.check()
    if fault == "base":
        config = RegisterConfig(num_registers=2, ignore_base_mismatch=True)
        loaded = PeftModel.from_pretrained(base, tmp_path, config=config).eval()
        other = PeftModel.from_pretrained(build("vit"), tmp_path, ignore_base_mismatch=True).eval()
        assert_identical(run(loaded, make_inputs("vit")), run(other, make_inputs("vit")))


@pytest.mark.parametrize("way", WAYS)
def test_values_for_another_base_are_refused(way: str, tmp_path: Path) -> None:
    moved(WAYS[way](other_base())).save_pretrained(tmp_path, selected_adapters=["default"])
    model = moved(WAYS[way](build("vit")))
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(BaseModelMismatchError, match="they differ in weights") as caught:
        model.load_adapter(str(tmp_path), "default")
    assert str(tmp_path) in str(caught.value)
    before.check()


@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_that_is_refused_leaves_no_attributes(way: str, tmp_path: Path) -> None:
    moved(WAYS[way](other_base())).save_pretrained(tmp_path, selected_adapters=["default"])
    model = moved(WAYS[way](build("vit")))
    before, attributes = Snapshot(model, make_inputs("vit")), {part: set(vars(part)) for part in model.modules()}
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        model.load_adapter(str(tmp_path / "default" if way == "compose" else tmp_path), "new")
    before.check()
    assert {part: set(vars(part)) for part in model.modules()} == attributes


@pytest.mark.parametrize("way", [way for way in WAYS if way != "positions"])
def test_registers_for_another_block_are_refused(way: str, tmp_path: Path) -> None:
    moved(WAYS[way](build("vit"), insert_layer=1)).save_pretrained(tmp_path, selected_adapters=["default"])
    model = moved(WAYS[way](build("vit")))
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=r"insert_layer=1, and .* 'default' in the model\s+insert_layer=0"):
        model.load_adapter(str(tmp_path), "default")
    before.check()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"register_neurons": {1: [2, 5]}}, "register_neurons={1: 2}"), ({"remove": "mean"}, "remove='mean'")],
    ids=["other blocks", "other removal"],
)
def test_register_neurons_at_work_elsewhere_are_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"register_neurons": {0: [2, 5]}}
    moved(add_registers(build("vit"), 1, **own | given)).save_pretrained(tmp_path)
    model = moved(add_registers(build("vit"), 1, **own))
    with pytest.raises(AdapterFileError, match=said):
        model.load_adapter(str(tmp_path), "default")
    again = moved(add_registers(build("vit"), 1, **own, remove="zero"))
    again.save_pretrained(tmp_path / "same")
    model.load_adapter(str(tmp_path / "same"), "default")
    assert_identical(run(model, make_inputs("vit")), run(again, make_inputs("vit")))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "positions"])
def test_a_head_that_the_model_lacks_is_left_out(way: str, tmp_path: Path) -> None:
    trained = moved(WAYS[way](head_model(), modules_to_save=["classifier"]))
    trained.save_pretrained(tmp_path, selected_adapters=["default"])
    folder = tmp_path / "default" if (tmp_path / "default").is_dir() else tmp_path
    model, plain = WAYS[way](build("vit")).eval(), WAYS[way](head_model()).eval()
    with pytest.warns(UserWarning, match="has 'classifier' trained beside its registers, and ViTModel"):
        model.load_adapter(str(folder), "default")
    assert torch.equal(tokens(model), tokens(trained))
    with pytest.raises(AdapterFileError, match=r"does not (mention|train)"):  # it would keep its own head
        plain.load_adapter(str(folder), "default")


@pytest.mark.parametrize("way", ["add_registers", "peft"])
def test_weights_without_a_config_replace_nothing_of_the_base(way: str, tmp_path: Path) -> None:
    moved(WAYS[way](head_model(), modules_to_save=["classifier"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    model = WAYS[way](head_model()).eval()
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match="does not mention"):
        model.load_adapter(str(tmp_path), "default")
    before.check()


def test_a_head_of_which_the_model_has_the_name_alone_is_left_out(tmp_path: Path) -> None:
    trained = moved(add_registers(head_model(), 2, modules_to_save=["classifier"]))
    trained.save_pretrained(tmp_path)
    base = head_model()
    base.classifier = nn.Identity()  # as timm's num_classes=0
    model = add_registers(base, 2)
    with pytest.warns(UserWarning, match="has 'classifier' trained beside its registers"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(tokens(model), tokens(trained))


def test_a_base_that_is_trained_along_is_no_other_one(tmp_path: Path) -> None:
    model = add_registers(build("vit"), 2)
    model.get_base_model().requires_grad_(True)
    moved(model).save_pretrained(tmp_path)
    expected = tokens(model).clone()
    moved(model)
    with pytest.warns(UserWarning, match="the base is trained along"):
        model.load_adapter(str(tmp_path), "default")
    assert torch.equal(tokens(model), expected)


@pytest.mark.parametrize("way", ["compose", "positions"])
def test_biases_that_are_trained_do_not_make_every_base_the_same(way: str, tmp_path: Path) -> None:
    """LoRA's ``bias="all"`` trains the base's own biases; its patch embedding stays as it is, and tells."""

    def model(base: Any) -> Any:
        first = PositionConfig() if way == "positions" else RegisterConfig(num_registers=2)
        return moved(
            compose(base, {"default": first, "lora": LoraConfig(target_modules=["q_proj", "query"], bias="all")})
        )

    other, own = build("vit"), build("vit")
    patches = next(value for key, value in other.named_parameters() if "patch_embeddings" in key)
    patches.data = patches.data.flip(0)
    model(other).save_pretrained(tmp_path / "other")
    model(own).save_pretrained(tmp_path / "own")
    target = model(build("vit"))
    before = Snapshot(target, make_inputs("vit"))
    with pytest.raises(BaseModelMismatchError, match="they differ in weights"):
        target.load_adapter(tmp_path / "other", "default")
    before.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_adapter(tmp_path / "own", "default")


@pytest.mark.parametrize("way", WAYS)
def test_values_for_a_base_that_the_caller_has_excused_are_loaded_over(way: str, tmp_path: Path) -> None:
    """Those of the file that it was loaded from, and of what was saved since, which is for the same base as before."""
    moved(WAYS[way](build("vit"))).save_pretrained(tmp_path / "first")
    load: Any = load_adapters if way == "compose" else PeftModel.from_pretrained
    model = load(other_base(), tmp_path / "first", ignore_base_mismatch=True)
    model.save_pretrained(tmp_path / "again")
    expected, own = run(model, make_inputs("vit")), [v for k, v in model.named_parameters() if ".default." in k]
    for folder in ("again", "first"):
        with torch.no_grad():
            assert own
            for value in own:
                value += 1
        model.load_adapter(tmp_path / folder, "default")
        assert_identical(run(model, make_inputs("vit")), expected)
    with pytest.raises(BaseModelMismatchError):
        load(other_base(), tmp_path / "again")


@pytest.mark.parametrize("config", [True, False], ids=["config", "weights alone"])
@pytest.mark.parametrize("way", ["add_registers", "peft", "positions"])
def test_a_pipe_is_not_waited_for(way: str, config: bool, tmp_path: Path) -> None:
    model = moved(WAYS[way](build("vit")))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    if not config:
        (tmp_path / "adapter_config.json").unlink()
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises((AdapterFileError, OSError), match=r"adapter_model\.safetensors"):
        model.load_adapter(str(tmp_path), "default")
    before.check()


@pytest.mark.parametrize("way", WAYS)
def test_half_a_file_is_named(way: str, tmp_path: Path) -> None:
    model = moved(WAYS[way](build("vit")))
    model.save_pretrained(tmp_path)
    folder = tmp_path / "default" if (tmp_path / "default").is_dir() else tmp_path
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors"):
        model.load_adapter(str(folder), "default")
    before.check()


@pytest.mark.parametrize("way", ["peft", "positions"])
def test_a_pickle_is_not_opened(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(WAYS[way](build("vit")))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    monkeypatch.setattr("peft.utils.save_and_load.torch_load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(AdapterFileError, match="pickled weights"):
        model.load_adapter(str(tmp_path), "default")
