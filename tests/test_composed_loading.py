"""Adapters loaded into a composed model: all of a folder, of one save, or none, and then the folder is named."""

from __future__ import annotations

import copy
import json
import traceback
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from families import build, make_inputs
from helpers import Snapshot, assert_identical, run
from huggingface_hub.errors import HfHubHTTPError
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from register_adapter import (
    AdapterFileError,
    ComposedPeftModel,
    HubAccessError,
    RegisterConfig,
    compose,
    load_adapters,
    save_adapters,
)
from register_adapter.tuner.composed import saving
from register_adapter.tuner.composed.one_adapter import SavedAdapter
from register_adapter.utils.files import checksum


def composed(seed: int, rank: int = 2, registers: int = 2) -> ComposedPeftModel:
    base = build("vit")
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, target_modules=["q_proj", "query"], init_lora_weights=False)
    return compose(base, {"registers": RegisterConfig(num_registers=registers, init_std=1.0), "lora": lora})


@pytest.mark.parametrize("first", ["registers", "lora"])
@pytest.mark.parametrize("other", [{"rank": 3}, {"registers": 3}], ids=["lora", "registers"])
def test_where_one_does_not_fit_no_values_are_taken(tmp_path: Path, first: str, other: dict[str, int]) -> None:
    save_adapters(composed(1, **other), tmp_path)
    manifest = json.loads((tmp_path / "adapters.json").read_text())
    manifest["adapters"].sort(key=lambda entry: entry["name"] != first)
    (tmp_path / "adapters.json").write_text(json.dumps(manifest))
    model = composed(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=str(tmp_path)):
        model.load_adapter(tmp_path, "registers")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_adapter_that_does_not_fit_is_not_put_on(tmp_path: Path, start: Any) -> None:
    save_adapters(composed(1), tmp_path)
    config, weights = tmp_path / "lora" / "adapter_config.json", tmp_path / "lora" / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
    save_file({key: torch.zeros(7, 5) for key in load_file(weights)}, weights)
    model = composed(0).eval()
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=str(tmp_path / "lora")):
        model.load_adapter(tmp_path / "lora", "new")
    before.check()
    assert list(model.peft_config) == ["registers", "lora"]


@pytest.mark.parametrize("name", ["new", "lora"])
@pytest.mark.parametrize("fault", ["the base's own", "not finite", "no float", "missing"])
def test_one_adapter_is_checked_as_all_of_a_folder_are(tmp_path: Path, fault: str, name: str) -> None:
    save_adapters(composed(1), tmp_path)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    changed = {
        "the base's own": {"base_model.model.layernorm.weight": torch.zeros(32)},
        "not finite": {key: torch.full_like(tensors[key], torch.nan)},
        "no float": {key: tensors[key].to(torch.int32)},
    }
    if fault == "missing":
        del tensors[key]
    save_file(tensors | changed.get(fault, {}), weights)
    model = composed(0).eval()
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=str(weights.parent if fault == "missing" else weights)):
        model.load_adapter(tmp_path / "lora", name)
    before.check()
    assert list(model.peft_config) == ["registers", "lora"]


@pytest.mark.parametrize(("inner", "name"), [("lora", "lora"), ("lora", "new"), ("several", "lora")])
def test_subfolder_is_one_of_a_folder_of_several(tmp_path: Path, inner: str, name: str) -> None:
    source = composed(1)
    outer = tmp_path if inner == "lora" else tmp_path / "several"
    save_adapters(source, outer)
    wanted, model = dict(source.named_parameters()), composed(0)
    others = {key: value.clone() for key, value in model.named_parameters() if ".lora." not in key}
    model.load_adapter(tmp_path, name, subfolder=inner)
    for key, value in wanted.items():
        if ".lora." in key:
            assert torch.equal(model.get_parameter(key.replace(".lora.", f".{name}.")), value)
        elif inner == "lora":
            assert torch.equal(model.get_parameter(key), others[key])
        else:
            assert torch.equal(model.get_parameter(key), value)


@pytest.mark.parametrize("way", ["load_adapters", "new", "lora"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_bias_of_a_saved_head_is_no_stranger(tmp_path: Path, bias: Any, way: str) -> None:
    """With bias="all" PEFT writes it once more, by a name that no module has: the folder was saved and refused."""
    config = LoraConfig(target_modules=["q_proj", "query"], bias=bias, modules_to_save=["classifier"])
    name, inputs = "vit-classifier", make_inputs("vit-classifier")
    model = get_peft_model(build(name), config, "lora").eval()
    saved = get_peft_model_state_dict(model, adapter_name="lora")
    if not any(key.endswith("bias") and "classifier" not in key for key in saved):
        pytest.skip("PEFT 0.18 saves no biases of lora_only")
    for place, value in enumerate(value for value in model.parameters() if value.requires_grad):
        value.data += 0.1 + 0.01 * place
    expected = run(model, inputs)
    if way == "load_adapters":
        save_adapters(model, tmp_path)
        loaded: Any = load_adapters(build(name), tmp_path)
    else:
        model.save_pretrained(str(tmp_path))
        configs = {"registers": RegisterConfig(num_registers=2), "lora": config}
        loaded = compose(build(name), {key: configs[key] for key in ("registers", way) if key in configs})
        loaded.load_adapter(tmp_path / "lora", way)
        loaded.delete_adapter("registers")
    assert_identical(run(loaded.eval(), inputs), expected)


@pytest.mark.parametrize("way", ["load_adapters", "load_adapter"])
def test_a_head_without_its_weight_is_told_by_name(tmp_path: Path, way: str) -> None:
    """Its key alone was the whole message."""
    name = "vit-classifier"
    config = LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    save_adapters(get_peft_model(build(name), config, "own"), tmp_path)
    weights, manifest = tmp_path / "own" / "adapter_model.safetensors", tmp_path / "adapters.json"
    save_file({key: value for key, value in load_file(weights).items() if "classifier.weight" not in key}, weights)
    listed = json.loads(manifest.read_text())
    listed["adapters"][0]["sha256"] = checksum(weights)
    manifest.write_text(json.dumps(listed))
    model: Any = compose(build(name), {"registers": RegisterConfig(num_registers=2)})
    with pytest.raises(AdapterFileError, match=r"own.*'base_model\.model\.classifier\.weight' is missing"):
        load_adapters(model, tmp_path) if way == "load_adapters" else model.load_adapter(tmp_path / "own", "new")


def test_what_the_hub_answers_peft_is_told_without_the_token() -> None:
    """Files in the cache pass with any token, and PEFT asks the Hub once more."""
    response = mock.MagicMock(status_code=401, headers={})
    refused = HfHubHTTPError("401 Unauthorized. You sent Bearer hf_secret", response=response)
    model = composed(0).eval()
    before = Snapshot(model, make_inputs("vit"))
    cached = SavedAdapter("new", Path("cache"), LoraConfig(), True, frozenset())
    with (
        mock.patch.multiple(saving, check_method=mock.DEFAULT, read_alone=mock.Mock(return_value=cached)),
        mock.patch.object(PeftModel, "load_adapter", side_effect=refused),
        pytest.raises(HubAccessError, match="refused the token") as error,
    ):
        model.load_adapter("user/repo", "new", token="hf_" + "secret")
    assert "hf_secret" not in "".join(traceback.format_exception(error.value))
    before.check()


@pytest.mark.parametrize("way", ["load_adapters", "load_adapter"])
def test_two_saves_are_not_mixed(tmp_path: Path, way: str) -> None:
    """Another process saves into the folder while it is read, between its adapters."""
    save_adapters(composed(1), tmp_path)
    model: Any = composed(0) if way == "load_adapter" else build("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load = PeftModel.load_adapter

    def saved_behind(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        save_adapters(composed(2), tmp_path)
        return result

    with (
        mock.patch.object(PeftModel, "load_adapter", saved_behind),
        pytest.raises(AdapterFileError, match="saved anew"),
    ):
        model.load_adapter(tmp_path, "") if way == "load_adapter" else load_adapters(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("first", ["registers", "lora"])
def test_low_cpu_mem_usage_gives_the_same_bits(tmp_path: Path, first: str) -> None:
    """PEFT then asks every layer of the model to move the adapter, also those of other methods."""
    model = composed(1).eval()
    save_adapters(model, tmp_path)
    manifest = json.loads((tmp_path / "adapters.json").read_text())
    manifest["adapters"].sort(key=lambda entry: entry["name"] != first)
    (tmp_path / "adapters.json").write_text(json.dumps(manifest))
    inputs = make_inputs("vit")
    loaded = load_adapters(build("vit"), tmp_path, low_cpu_mem_usage=True).eval()
    assert_identical(run(loaded, inputs), run(model, inputs))
    beside = build("vit")
    beside.load_adapter(str(tmp_path / "registers"), "registers")
    stock = PeftModel.from_pretrained(beside, tmp_path / "lora", low_cpu_mem_usage=True).eval()
    assert_identical(run(stock, inputs), run(model, inputs))


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype_is_as_in_peft(tmp_path: Path, autocast: bool) -> None:
    save_adapters(composed(1), tmp_path)
    option: dict[str, Any] = {"autocast_adapter_dtype": autocast}
    base = build("vit").bfloat16()
    loaded = load_adapters(copy.deepcopy(base), tmp_path, **option)
    for name in ("registers", "lora"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, name, **option)
        dtypes = {key: value.dtype for key, value in stock.state_dict().items() if name in key.split(".")}
        assert dtypes
        assert dtypes == {key: value.dtype for key, value in loaded.state_dict().items() if name in key.split(".")}


@pytest.mark.parametrize("up", [True, False])
def test_one_adapter_of_another_place_is_not_left_unread(tmp_path: Path, up: bool) -> None:
    head = tf.ViTForImageClassification(build("vit").config)
    head.vit.load_state_dict(build("vit").state_dict(), strict=False)
    there, here = (build("vit"), head) if up else (head, build("vit"))
    configs = {"registers": RegisterConfig(), "lora": LoraConfig(target_modules=["q_proj", "query"])}
    save_adapters(compose(there, configs), tmp_path)
    model = compose(here, configs).eval()
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=rf"{tmp_path / 'lora'}.*whole folder"):
        model.load_adapter(tmp_path / "lora", "lora")
    before.check()
    model.load_adapter(tmp_path / "registers", "registers")
    model.load_adapter(tmp_path, "lora")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("order", list(permutations(["lora", "norms", "scales", "registers"], 3)), ids="-".join)
def test_biases_load_in_every_order_of_methods(bias: Any, order: tuple[str, ...], tmp_path: Path) -> None:
    """A folder was saved and refused: another method that came after LoRA had moved a bias into its own layer."""
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["q_proj", "query"], bias=bias, init_lora_weights=False),
        "norms": LNTuningConfig(target_modules=["layernorm_before"]),
        "scales": IA3Config(target_modules=["fc2", "output.dense"], feedforward_modules=["fc2", "output.dense"]),
        "registers": RegisterConfig(num_registers=2, init_std=1.0, modules_to_save=["classifier"]),
    }
    name, inputs = "vit-classifier", make_inputs("vit-classifier")
    alone = get_peft_model_state_dict(get_peft_model(build(name), copy.deepcopy(configs["lora"])))
    if not any(key.endswith("bias") for key in alone):
        pytest.skip("PEFT 0.18 saves no biases of lora_only, of LoRA alone neither")

    def outputs(model: Any) -> list[torch.Tensor]:
        found = [run(model.eval(), inputs)]
        for adapter in order:
            with model.disable_adapter(adapter):
                found.append(run(model, inputs))
        return found

    model = compose(build(name), {key: configs[key] for key in order})
    for place, value in enumerate(value for value in model.parameters() if value.requires_grad):
        value.data += 0.1 + 0.01 * place
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    for found, wanted in zip(outputs(load_adapters(build(name), tmp_path)), expected, strict=True):
        assert_identical(found, wanted)
    other = compose(build(name), {key: configs[key] for key in reversed(order)})
    other.load_adapter(tmp_path, order[0])
    for found, wanted in zip(outputs(other), expected, strict=True):
        assert_identical(found, wanted)
    for adapter in order:
        assert load_adapters(build(name), tmp_path, selected_adapters=[adapter]).active_adapters == [adapter]


@pytest.mark.parametrize("here", ["new", "lora"])
@pytest.mark.parametrize("others", ["norms", "scales", "norms-scales"])
def test_biases_of_lora_alone_load_beside_other_methods(others: str, here: str, tmp_path: Path) -> None:
    """Its file was refused: the other methods' layers are around the modules whose biases it trained."""
    lora = LoraConfig(target_modules=["q_proj", "query"], bias="all", init_lora_weights=False)
    beside: dict[str, Any] = {
        "norms": LNTuningConfig(target_modules=["layernorm_before"]),
        "scales": IA3Config(target_modules=["fc2", "output.dense"], feedforward_modules=["fc2", "output.dense"]),
    }
    configs = {name: beside[name] for name in others.split("-")}
    model, inputs = get_peft_model(build("vit"), lora, "new").eval(), make_inputs("vit")
    for place, value in enumerate(value for value in model.parameters() if value.requires_grad):
        value.data += 0.1 + 0.01 * place
    expected = run(model, inputs)
    model.save_pretrained(str(tmp_path))
    loaded = compose(build("vit"), {"registers": RegisterConfig(num_registers=2), **configs} | {here: lora})
    if here == "new":
        loaded.delete_adapter("new")
    loaded.load_adapter(tmp_path, here, subfolder="new")
    for name in ("registers", *configs):
        loaded.delete_adapter(name)
    assert_identical(run(loaded.eval(), inputs), expected)


@pytest.mark.parametrize("given", [{"r": 2000}, {"r": 2, "rank_pattern": {"output.dense": 2000}}], ids=str)
def test_a_rank_of_lokr_beyond_its_factors_means_whole_factors(given: dict[str, Any], tmp_path: Path) -> None:
    """It was taken for a config that asks for more memory than its tensors have."""
    targets = ["q_proj", "query", "output.dense"]
    lokr = LoKrConfig(target_modules=targets, init_weights=False, **given)
    model = compose(build("vit"), {"registers": RegisterConfig(num_registers=2), "lokr": lokr}).eval()
    save_adapters(model, tmp_path)
    inputs = make_inputs("vit")
    expected = run(model, inputs)
    assert_identical(run(load_adapters(build("vit"), tmp_path).eval(), inputs), expected)
    beside = compose(build("vit"), {"registers": RegisterConfig(num_registers=2)})
    beside.load_adapter(tmp_path / "registers", "registers")
    beside.load_adapter(tmp_path / "lokr", "lokr")
    beside.set_adapter("lokr")
    assert_identical(run(beside.eval(), inputs), expected)


@pytest.mark.parametrize(
    "values",
    [{"layer_replication": [[0, 2], [1, 2]]}, {"trainable_token_indices": [1]}],
    ids=lambda values: min(values),
)
def test_what_cannot_be_composed_is_refused_with_its_file(values: dict[str, Any], tmp_path: Path) -> None:
    save_adapters(composed(1), tmp_path)
    config, manifest = tmp_path / "lora" / "adapter_config.json", tmp_path / "adapters.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    listed = json.loads(manifest.read_text())
    for entry in listed["adapters"]:
        del entry["config_sha256"]
    manifest.write_text(json.dumps(listed))
    base: Any = build("vit")
    before = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=f"{config}: .*{min(values)}|{config} cannot.*{min(values)}"):
        load_adapters(base, tmp_path)
    before.check()


@pytest.mark.parametrize("way", ["load_adapters", "load_adapter", "add_adapter"])
@pytest.mark.parametrize("frozen", ["norms", "lora"])
def test_biases_of_a_frozen_adapter_stay_frozen_beside_biases_that_lora_trains(
    way: str, frozen: str, tmp_path: Path
) -> None:
    """With bias="all" biases of the other adapter's own layers became trainable, in silence."""
    config = LoraConfig(target_modules=["q_proj", "query"], bias="all")
    scaled = IA3Config(target_modules=["fc2", "output.dense"], feedforward_modules=["fc2", "output.dense"])
    other = {
        "norms": LNTuningConfig(target_modules=["layernorm_before"]),
        "lora": LoraConfig(target_modules=["v_proj", "value"], lora_bias=True),
    }[frozen]
    compose(build("vit"), {"scales": scaled, "other": other}).save_pretrained(tmp_path / "frozen")
    compose(build("vit"), {"new": config}).save_pretrained(tmp_path / "new")
    model: Any = load_adapters(build("vit"), tmp_path / "frozen")
    assert not any(value.requires_grad for value in model.parameters())
    if way == "load_adapters":
        model = load_adapters(model, tmp_path / "new", is_trainable=True)
    elif way == "load_adapter":
        model.load_adapter(tmp_path / "new" / "new", "new", is_trainable=True)
    else:
        model.add_adapter("new", config)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert any(key.endswith("bias") for key in trained)
    assert not [key for key in trained if {"other", "scales"} & {*key.split(".")}]


@pytest.mark.parametrize("way", ["load_adapters", "load_adapter"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_frozen_adapter_that_is_the_first_trains_no_biases(bias: Any, way: str, tmp_path: Path) -> None:
    """PEFT marks biases of the base as trainable also where LoRA is loaded frozen."""
    config = LoraConfig(target_modules=["q_proj", "query"], bias=bias)
    compose(build("vit"), {"lora": config}).save_pretrained(tmp_path)
    if way == "load_adapters":
        model: Any = load_adapters(build("vit"), tmp_path)
    else:
        model = compose(build("vit"), {})
        model.load_adapter(tmp_path / "lora", "lora")
    assert not [key for key, value in model.named_parameters() if value.requires_grad]
    again = load_adapters(build("vit"), tmp_path, is_trainable=True)
    assert any(value.requires_grad and key.endswith("bias") for key, value in again.named_parameters())
