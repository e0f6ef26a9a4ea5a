"""What is saved comes back bit for bit, by every route, in a fresh process, in other models of the same tower."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from crossings import crossings
from families import CASES, LOADS_HEADS, LOOKS_BELOW_PREFIX, TOWERS, build, loads_heads, make_inputs
from helpers import Snapshot, assert_identical, differs, run
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from processes import run_script
from safetensors import safe_open

from register_adapter import RegisterConfig, RegisterPeftModel, add_registers, find_register_layer, find_tower

# DPT builds its backbone by a way of its own, which from_pretrained of a tiny one does not survive.
SAVED = [name for name in CASES if name != "depth"]
#: A tower and the models of the same family that hold such a tower.
HOLDERS = {
    "vit": ["vit-classifier", "vit-masked", "dual-encoder"],
    "deit": ["deit-classifier", "deit-teacher", "deit-masked", "captioner"],
    "clip-vision": ["clip", "clip-projection", "clip-classifier", "llava"],
    "dinov2": ["dinov2-classifier", "dinov2-backbone"],
    "dinov2-registers": ["dinov2-registers-classifier", "dinov2-registers-backbone"],
    "siglip-vision": ["siglip", "siglip-classifier"],
}
PAIRS = [(tower, holder) for tower, holders in HOLDERS.items() for holder in holders]
# The tower has another place in the two models, and neither place is the other's base_model_prefix.
NOT_FOUND_BY_TRANSFORMERS = {
    ("vit", "dual-encoder"),
    ("dual-encoder", "vit"),
    ("deit", "captioner"),
    ("captioner", "deit"),
    ("clip-vision", "clip"),
    ("clip-vision", "clip-classifier"),
    ("clip-vision", "llava"),
    ("llava", "clip-vision"),
    ("siglip-vision", "siglip"),
    ("siglip-vision", "siglip-classifier"),
}


def tokens(model: torch.nn.Module, name: str = "default") -> torch.Tensor:
    return find_register_layer(model).tokens(name).weight


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return str(folder)


#: Routes of ``scripts/load_by_every_route.py``.
ROUTES = ("PeftModel", "PeftModel, low memory", "PeftModel, trainable", "AutoPeftModel")
ROUTES += ("from_pretrained(adapter)", "load_adapter")
#: One tower, model with a trained head, model of two towers, and of a tower within a tower: every route. One on others.
LOADED = crossings(SAVED, ROUTES, whole=("vit", "vit-classifier", "clip", "llava"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """One fresh process for all models: starting one takes longer than loading them all."""
    root = tmp_path_factory.mktemp("saved")
    for name in SAVED:
        folder, inputs = root / name, make_inputs(name)
        built = build(name)
        built.save_pretrained(folder / "base")
        base = type(built).from_pretrained(folder / "base")
        heads = ["classifier"] if name.endswith("classifier") else None
        model = add_registers(base, 4, modules_to_save=heads).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
        model.save_pretrained(str(folder / "adapter"))
        routes = [route for model_name, route in LOADED if model_name == name]
        expected = {"class": type(base).__name__, "inputs": inputs, "outputs": run(model, inputs), "routes": routes}
        torch.save(expected, folder / "expected.pt")
    answers: dict[str, dict[str, str]] = json.loads(run_script("load_by_every_route", root).stdout.splitlines()[-1])
    return answers


def class_of(name: str) -> Any:
    return type(build(name))


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_bits_by_every_route(reports: dict[str, dict[str, str]]) -> None:
    results = {(name, route): result for name, routes in reports.items() for route, result in routes.items()}
    assert set(results) == set(LOADED)
    forgotten = [] if LOADS_HEADS else ["forgets modules_to_save"]
    others = {where: result for where, result in results.items() if result != "identical"}
    assert {where: result for where, result in others.items() if not any(part in result for part in forgotten)} == {}


@pytest.mark.parametrize("name", TOWERS)
def test_auto_model_loads_an_adapter_folder(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    base = class_of(name).from_pretrained(tmp_path / "base")
    known = base.config.model_type in tf.CONFIG_MAPPING and type(base.config) in tf.AutoModel._model_mapping
    if not known:
        pytest.skip("AutoModel does not know this tower in this version of transformers")
    model, inputs = add_registers(base, 4).eval(), make_inputs(name)
    adapter = saved(model, tmp_path / "adapter")
    assert_identical(run(tf.AutoModel.from_pretrained(adapter), inputs), run(model, inputs))


def test_auto_model_with_a_head_loads_an_adapter_folder(tmp_path: Path) -> None:
    build("vit-classifier").save_pretrained(tmp_path / "base")
    base = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model, inputs = add_registers(base, 4, modules_to_save=["classifier"]).eval(), make_inputs("vit-classifier")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1
    adapter = saved(model, tmp_path / "adapter")
    loaded = loads_heads(lambda: tf.AutoModelForImageClassification.from_pretrained(adapter))
    assert_identical(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize(("source", "target"), [*PAIRS, *[(holder, tower) for tower, holder in PAIRS]])
def test_an_adapter_fits_every_model_with_the_same_tower(source: str, target: str, tmp_path: Path) -> None:
    trained = add_registers(build(source), 4)
    receiver, inputs = with_tower_of(target, source), make_inputs(target)
    expected_base = run(receiver, inputs)
    loaded = PeftModel.from_pretrained(receiver, saved(trained, tmp_path))
    assert torch.equal(tokens(loaded), tokens(trained))
    assert differs(run(loaded, inputs), expected_base)


@pytest.mark.parametrize(
    ("source", "target", "is_trainable"),
    crossings([*PAIRS, *[(holder, tower) for tower, holder in PAIRS]], (False, True), whole=PAIRS[:1]),
)
def test_transformers_loads_another_models_adapter_or_says_that_it_cannot(
    source: str, target: str, is_trainable: bool, tmp_path: Path
) -> None:
    """transformers finds a tower only below a model's base_model_prefix; elsewhere no random register may stay."""
    trained = add_registers(build(source), 4)
    model, inputs = with_tower_of(target, source), make_inputs(target)
    expected_base = run(model, inputs)
    adapter = saved(trained, tmp_path)

    def load_and_train() -> None:
        model.load_adapter(adapter, is_trainable=is_trainable)
        model.train()

    if not found_by_transformers(source, target):
        with pytest.raises(ValueError, match=r"(?s)no \(finite\) register values.*PeftModel\.from_pretrained"):
            load_and_train()
        assert find_register_layer(model) is None, "what was refused was taken off again"
        assert_identical(run(model.eval(), inputs), expected_base)
    else:
        model.load_adapter(adapter, is_trainable=is_trainable)
        assert torch.equal(tokens(model), tokens(trained))
        assert differs(run(model, inputs), expected_base)


def found_by_transformers(source: str, target: str) -> bool:
    if LOOKS_BELOW_PREFIX:
        if (source, target) == ("clip-vision", "clip-projection"):
            return LOADS_HEADS  # its tower was found in the same release
        return (source, target) not in NOT_FOUND_BY_TRANSFORMERS
    return find_tower(build(source)).path == find_tower(build(target)).path


def with_tower_of(target: str, source: str) -> Any:
    """The model ``target`` with the weights of the tower in ``source``."""
    receiver = build(target)
    result = find_tower(receiver).module.load_state_dict(find_tower(build(source)).module.state_dict(), strict=False)
    assert not [key for key in result.missing_keys if "mask_token" not in key and "pooler" not in key]
    return receiver


def test_adapters_are_added_switched_loaded_and_deleted(tmp_path: Path) -> None:
    model, inputs = add_registers(build("dinov2"), 4, init_std=1.0).eval(), make_inputs("dinov2")
    plain = run(build("dinov2"), inputs)
    model.add_adapter("second", RegisterConfig(num_registers=2, init_std=1.0))
    first = run(model, inputs)
    model.set_adapter("second")
    second = run(model, inputs)
    assert differs(first, plain)
    assert differs(second, first)
    assert not tokens(model).requires_grad
    assert tokens(model, "second").requires_grad

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build("dinov2"), str(tmp_path))
    assert_identical(run(again, inputs), first)
    again.load_adapter(str(tmp_path / "second"), "renamed")
    assert_identical(run(again, inputs), first)
    again.set_adapter("renamed")
    assert_identical(run(again, inputs), second)
    again.delete_adapter("renamed")
    assert_identical(run(again, inputs), first)
    assert list(again.peft_config) == ["default"]


def test_two_active_adapters_put_both_their_registers_in() -> None:
    model, inputs = add_registers(build("vit", "eager"), 4).eval(), make_inputs("vit")
    model.add_adapter("second", RegisterConfig(num_registers=2))
    model.base_model.set_adapter(["default", "second"])
    assert find_register_layer(model).num_active == 6
    plain = run(build("vit", "eager"), inputs, output_attentions=True)
    both = run(model, inputs, output_attentions=True)
    assert {key: value.shape for key, value in both.items()} == {key: value.shape for key, value in plain.items()}


def test_the_transformers_api_adds_switches_and_deletes(tmp_path: Path) -> None:
    trained = add_registers(build("vit"), 4, init_std=1.0)
    adapter, inputs = saved(trained, tmp_path / "adapter"), make_inputs("vit")
    base = build("vit")
    snapshot = Snapshot(base, inputs)
    base.load_adapter(adapter, "loaded")
    loaded = run(base, inputs)
    assert_identical(loaded, run(trained.eval(), inputs))
    base.add_adapter(RegisterConfig(num_registers=2, init_std=1.0), "fresh")
    fresh = run(base, inputs)
    assert differs(fresh, loaded)
    base.set_adapter("loaded")
    assert_identical(run(base, inputs), loaded)
    base.disable_adapters()
    assert_identical(run(base, inputs), snapshot.outputs)
    base.enable_adapters()
    assert_identical(run(base, inputs), loaded)
    base.delete_adapter("loaded")
    assert_identical(run(base, inputs), fresh)
    base.delete_adapter("fresh")
    snapshot.check_values()


def test_transformers_switches_a_head_on_again_with_its_registers(tmp_path: Path) -> None:
    """`enable_adapters()` of transformers passes over ``modules_to_save``, which `disable_adapters()` switches off."""
    base, inputs = tf.ViTForImageClassification(build("vit").config).eval(), make_inputs("vit")
    names = {number: f"kind {number}" for number in range(base.config.num_labels)}
    config = RegisterConfig(num_registers=2, init_std=1.0, modules_to_save=["classifier"], id2label=names)
    trained = get_peft_model(deepcopy(base), config).eval()
    with torch.no_grad():
        trained.get_base_model().classifier.modules_to_save["default"].weight.normal_()
    expected, plain = run(trained, inputs), run(base, inputs)
    loads_heads(lambda: base.load_adapter(saved(trained, tmp_path / "adapter")))
    base.eval()
    assert_identical(run(base, inputs), expected)
    base.disable_adapters()
    assert_identical(run(base, inputs), plain)
    assert base.config.id2label != names
    base.enable_adapters()
    assert_identical(run(base, inputs), expected)
    assert base.config.id2label == names


def test_a_whole_model_saved_by_transformers_holds_its_adapter(tmp_path: Path) -> None:
    base, inputs = build("vit"), make_inputs("vit")
    base.save_pretrained(tmp_path / "base")
    base = tf.ViTModel.from_pretrained(tmp_path / "base")
    base.add_adapter(RegisterConfig(num_registers=4, init_std=1.0))
    base.eval()
    base.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert_identical(run(tf.ViTModel.from_pretrained(tmp_path / "saved"), inputs), run(base, inputs))


@pytest.mark.parametrize(
    "options",
    [{"low_cpu_mem_usage": True}, {"is_trainable": True}, {"torch_device": "cpu"}, {"key_mapping": {"^never$": "x"}}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_from_pretrained_give_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = add_registers(build("vit"), 4).eval(), make_inputs("vit")
    adapter = saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(build("vit"), adapter, **options)
    assert tokens(loaded).requires_grad == options.get("is_trainable", False)
    assert tokens(loaded).device.type == "cpu"
    assert_identical(run(loaded.eval(), inputs), run(model, inputs))


@pytest.mark.parametrize("options", [{"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=lambda o: next(iter(o)))
def test_options_of_load_adapter_give_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = add_registers(build("vit"), 4).eval(), make_inputs("vit")
    adapter = saved(model, tmp_path)
    base = build("vit")
    base.load_adapter(adapter, **options)
    assert_identical(run(base, inputs), run(model, inputs))
    second = add_registers(build("vit"), 2).eval()
    second.load_adapter(adapter, "other", **options)
    second.set_adapter("other")
    assert_identical(run(second, inputs), run(model, inputs))


def test_a_loaded_adapter_trains_on(tmp_path: Path) -> None:
    adapter = saved(add_registers(build("vit"), 4), tmp_path)
    for load in (
        lambda base: PeftModel.from_pretrained(base, adapter, is_trainable=True),
        lambda base: [base.load_adapter(adapter, is_trainable=True), base][1],
    ):
        model = load(build("vit")).train()
        model(**make_inputs("vit")).last_hidden_state.square().sum().backward()
        assert tokens(model).grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_adapter_loads_into_a_base_of_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    trained = add_registers(build("vit"), 4)
    loaded = PeftModel.from_pretrained(build("vit", dtype=dtype), saved(trained, tmp_path))
    assert torch.equal(tokens(loaded), tokens(trained))
    assert run(loaded, make_inputs("vit", dtype=dtype))["last_hidden_state"].dtype == dtype


def test_a_half_precision_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(build("vit", dtype=torch.bfloat16), RegisterConfig(), autocast_adapter_dtype=False).eval()
    assert tokens(model).dtype == torch.bfloat16
    adapter, inputs = saved(model, tmp_path), make_inputs("vit", dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(build("vit", dtype=torch.bfloat16), adapter)
    assert_identical(run(loaded, inputs), run(model, inputs))


def test_only_safetensors_are_written_and_the_file_is_small(tmp_path: Path) -> None:
    config = tf.ViTConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, image_size=32, patch_size=16)
    model = add_registers(tf.ViTModel(config), 4)
    model.save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    assert 4 * 768 * 4 < weights.stat().st_size <= 14_000
    with safe_open(weights, framework="pt") as file:
        assert [(key, file.get_slice(key).get_shape()) for key in file.keys()] == [  # noqa: SIM118 - not a mapping
            ("base_model.model.registers.register_adapter_tokens.weight", [4, 768])
        ]
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
    assert not (tmp_path / "pickled").exists()


def test_saving_again_replaces_the_adapter_and_leaves_other_files(tmp_path: Path) -> None:
    model = add_registers(build("vit"), 4)
    saved(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with torch.no_grad():
        tokens(model).fill_(1.0)
    saved(model, tmp_path / "out")
    assert torch.equal(tokens(PeftModel.from_pretrained(build("vit"), str(tmp_path / "out"))), torch.ones(4, 32))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the staging folder is gone"


def test_the_config_comes_back_as_it_was(tmp_path: Path) -> None:
    options = {
        "num_registers": 3,
        "init": "cls",
        "init_std": 0.5,
        "attentions": "full",
        "modules_to_save": ["classifier"],
    }
    model = add_registers(build("vit-classifier"), **options)
    loaded = PeftModel.from_pretrained(build("vit-classifier"), saved(model, tmp_path)).peft_config["default"]
    assert {key: getattr(loaded, key) for key in options} == options
    assert loaded.identity == model.peft_config["default"].identity
    assert loaded.identity is not None
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "REGISTER_ADAPTER"
    assert values["inference_mode"] is True
    assert "ignore_base_mismatch" not in values


def test_a_loaded_adapter_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    saved(add_registers(build("vit"), 4), tmp_path / "first")
    loaded = PeftModel.from_pretrained(build("vit"), str(tmp_path / "first"))
    loaded.save_pretrained(str(tmp_path / "second"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_registers_and_lora_round_trip_side_by_side(tmp_path: Path) -> None:
    inputs = make_inputs("vit")

    def pair() -> Any:
        base = build("vit")
        base.add_adapter(RegisterConfig(num_registers=4, init_std=1.0), "registers")
        return base, get_peft_model(
            base, LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
        ).eval()

    base, model = pair()
    trained = tokens(base, "registers").detach().clone()
    adapter = saved(add_registers(build("vit"), 4), tmp_path / "registers")
    holder = PeftModel.from_pretrained(build("vit"), adapter)
    with torch.no_grad():
        tokens(holder).copy_(trained)
    saved(holder, tmp_path / "registers")
    saved(model, tmp_path / "lora")
    again = build("vit")
    again.load_adapter(str(tmp_path / "registers"), "registers")
    assert torch.equal(tokens(again, "registers"), trained)
    both = PeftModel.from_pretrained(again, str(tmp_path / "lora"))
    assert_identical(run(both, inputs), run(model, inputs))


def test_the_packages_own_class_loads_too(tmp_path: Path) -> None:
    model, inputs = add_registers(build("vit"), 4).eval(), make_inputs("vit")
    loaded = RegisterPeftModel.from_pretrained(build("vit"), saved(model, tmp_path))
    assert isinstance(loaded, RegisterPeftModel)
    assert_identical(run(loaded, inputs), run(model, inputs))


def test_auto_peft_model_names_the_base_it_needs(tmp_path: Path) -> None:
    """A base without a name cannot be found again; the error has to say so instead of loading something else."""
    adapter = saved(add_registers(build("vit"), 4), tmp_path)
    with pytest.raises((ValueError, OSError)):
        AutoPeftModel.from_pretrained(adapter)
