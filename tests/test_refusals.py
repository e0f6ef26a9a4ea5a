"""Every fault of an adapter's files, by every way into a model: refused by the file's name, the model as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from crossings import crossings
from helpers import assert_identical, hooks, run
from peft import AutoPeftModel, LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from register_adapter import (
    AdapterFileError,
    Anatomy,
    BaseModelMismatchError,
    RegisterConfig,
    RegisterLayer,
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    compose,
    load_adapters,
)
from register_adapter.training.checkpoints.folder import _write_tensors
from register_adapter.training.launch import main

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = f"{PREFIX}vit.registers.register_adapter_tokens."
WIDTH, CLASSES = 32, 5
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def build(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    options = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.ViTConfig(**options, image_size=32, patch_size=8, num_labels=CLASSES)
    return tf.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base that was loaded from a folder."""
    folder = tmp_path_factory.mktemp("good") / "base"
    build().save_pretrained(folder)
    return tf.ViTForImageClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def good(loaded: Any) -> Path:
    """An adapter with a head, beside its base."""
    folder = Path(loaded.name_or_path).with_name("adapter")
    add_registers(copy.deepcopy(loaded), 4, modules_to_save=["classifier"]).save_pretrained(folder)
    return folder


@pytest.fixture
def base(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@pytest.fixture
def untouched() -> Callable[[nn.Module], Callable[[], None]]:
    """Notes everything about a model; what it returns fails if anything of it is different later."""

    def state(model: nn.Module) -> dict[str, Any]:
        plain = (int, float, str, bool, tuple, type(None))
        return {
            "modules": {name: type(module) for name, module in model.named_modules()},
            "hooks": hooks(model),
            "training": {name: module.training for name, module in model.named_modules()},
            "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
            "attributes": {
                name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
                for name, module in model.named_modules()
            },
            "names": {name: set(vars(module)) for name, module in model.named_modules()},
            "configs": {
                name: repr(module.config) for name, module in model.named_modules() if hasattr(module, "config")
            },
            "peft_config": {name: repr(config) for name, config in getattr(model, "peft_config", {}).items()},
        }

    def note(model: nn.Module) -> Callable[[], None]:
        # transformers puts recording hooks of its own on a model at the first request for hidden states.
        run(model, PIXELS, output_hidden_states=True)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        outputs, before = run(model, PIXELS), state(model)

        def check() -> None:
            after = state(model)
            for kind in before:
                assert after[kind] == before[kind], kind
            assert_identical(model.state_dict(), values)
            assert_identical(run(model, PIXELS), outputs)

        return check

    return note


# --- faults -----------------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], None]


def change(tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Spoil:
    """Other values in the config, as if written by hand, and other tensors; ``None`` takes a tensor away."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, "weights_sha256": None, **config}))
        given = {**load_file(folder / WEIGHTS), **(tensors or {})}
        save_file({key: value for key, value in given.items() if value is not None}, folder / WEIGHTS)

    return spoil


def without_weights(**config: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        change(**config)(folder)
        (folder / WEIGHTS).unlink()

    return spoil


def neurons(units: list[int], **config: Any) -> Spoil:
    more = {"usual": torch.ones(2), "limits": torch.ones(2), "strength": torch.ones(2), "units": torch.tensor(units)}
    tensors: dict[str, Any] = {f"{TOKENS}{name}": value for name, value in more.items()}
    return change(tensors, **{"register_neurons": {"0": 2}, **config})


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def anatomy(**fields: Any) -> Spoil:
    known = {"family": "vit", "embeddings": "embeddings", "remove": "layernorm", "blocks": "layers"}
    return change(anatomy={**known, "input_shape": [3, 32, 32], **fields}, target_modules="vit")


def of_another_base(**config: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        tower = json.loads((folder / CONFIG).read_text())["base_tower"]
        change(base_tower={**tower, "fingerprint": [value + 0.5 for value in tower["fingerprint"]]}, **config)(folder)

    return spoil


HEAD = f"{PREFIX}classifier."
FAULTS: dict[str, Spoil] = {
    "a head of another width": change({f"{HEAD}weight": torch.ones(CLASSES, 64)}),
    "a head without classes": change({f"{HEAD}weight": torch.ones(0, WIDTH), f"{HEAD}bias": torch.ones(0)}),
    "a head without a bias": change({f"{HEAD}bias": None}),
    "a head whose bias has another size": change({f"{HEAD}bias": torch.ones(3)}),
    "a head with a tensor too many": change({f"{HEAD}scale": torch.ones(3)}),
    "a head with NaN": change({f"{HEAD}bias": torch.full((CLASSES,), torch.nan)}),
    "a head around the tower": change({"vit.x": torch.ones(2)}, modules_to_save=["classifier", "vit"]),
    "the base's own tensor": change({f"{PREFIX}vit.layernorm.weight": torch.zeros(WIDTH)}),
    "the base's own tensor without a prefix": change({"vit.layernorm.weight": torch.zeros(WIDTH)}),
    "registers of another width": change({f"{TOKENS}weight": torch.ones(4, 64)}),
    "registers with NaN": change({f"{TOKENS}weight": torch.full((4, WIDTH), torch.nan)}),
    "a neuron beyond the MLP": neurons([1, 64]),
    "negative neurons": neurons([-1, 3]),
    "neurons of a block that is not there": neurons([1, 2], register_neurons={"7": 2}),
    "a truncated file": truncated,
    "no weights": without_weights(),
    "no weights and no identity": without_weights(base_tower=None),
    "another base": of_another_base(),
    "another base, excused by the file": of_another_base(ignore_base_mismatch=True),
    "a block that is not there": change(insert_layer=9),
    "a tower that is not there": change(target_modules="text"),
    "an anatomy that counts": anatomy(method_counter="layernorm_before.eps"),
    "an anatomy with methods": anatomy(methods=["named_modules"]),
    "an anatomy with a method of the config": anatomy(counted_methods=["config.to_dict"], method_counter="training"),
    "an anatomy with a rotary argument": anatomy(rotary="nothing"),
    "an anatomy into an attribute": anatomy(embeddings="config.hidden_size"),
    "an anatomy into what is private": anatomy(embeddings="_modules.embeddings"),
    "an anatomy with a method for a module": anatomy(embeddings="named_modules"),
    "an anatomy with a parameter for a module": anatomy(embeddings="layernorm.weight"),
    "an anatomy that leaves too early": anatomy(remove="layers.1.mlp"),
    "an anatomy with a huge input": anatomy(input_shape=[3, 4096, 10**9]),
    "an anatomy of an endless prefix": anatomy(prefix=10**400),
    "a number of a wrong type": change(num_registers="4"),
    "a huge number of registers": change(num_registers=10**400),
    "a huge gate": change(gate=10**400),
    "a name that is a list": change(base_model_name_or_path=["a"]),
}


# --- ways in ----------------------------------------------------------------------------------------------------------

Attempt = tuple[nn.Module, Callable[[], Any]]


def as_folder(adapter: Path) -> Path:
    """What save_adapters would have written, with checksums of what is there."""
    folder = adapter.with_name("several")
    shutil.copytree(adapter, folder / "one")
    weights = folder / "one" / WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    entry = {"name": "one", "method": "REGISTER_ADAPTER", "active": True, "sha256": digest}
    (folder / "adapters.json").write_text(json.dumps({"format_version": 1, "adapters": [entry]}))
    return folder


def first(call: Callable[[Any, str], Any]) -> Callable[[Any, Path], Attempt]:
    return lambda base, adapter: (base, lambda: call(base, str(adapter)))


def second(base: Any, adapter: Path) -> Attempt:
    model = add_registers(base, 2).eval()
    return model, lambda: model.load_adapter(str(adapter), "second")


def second_of_peft(base: Any, adapter: Path) -> Attempt:
    model = get_peft_model(base, RegisterConfig(num_registers=2)).eval()
    return model, lambda: model.load_adapter(str(adapter), "second")


def second_of_transformers(base: Any, adapter: Path) -> Attempt:
    base.add_adapter(RegisterConfig(num_registers=2), "first")
    base.eval()
    return base, lambda: base.load_adapter(str(adapter), "second")


WAYS: dict[str, Callable[[Any, Path], Attempt]] = {
    "PeftModel": first(PeftModel.from_pretrained),
    "RegisterPeftModel": first(RegisterPeftModel.from_pretrained),
    "RegisterPeftModel, trainable": first(
        lambda b, name: RegisterPeftModel.from_pretrained(b, name, is_trainable=True)
    ),
    "get_peft_model": first(lambda base, name: get_peft_model(base, PeftConfig.from_pretrained(name))),
    "transformers": first(lambda base, name: base.load_adapter(name)),
    "transformers, trainable": first(lambda base, name: base.load_adapter(name, is_trainable=True)),
    "transformers' add_adapter": first(lambda base, name: base.add_adapter(PeftConfig.from_pretrained(name))),
    "second adapter": second,
    "second adapter of a PeftModel": second_of_peft,
    "second adapter, transformers": second_of_transformers,
    "load_adapters": first(lambda base, name: load_adapters(base, as_folder(Path(name)))),
    # They build the base themselves.
    "AutoPeftModel": first(lambda _, name: AutoPeftModel.from_pretrained(name)),
    "AutoModel": first(lambda _, name: tf.AutoModelForImageClassification.from_pretrained(name)),
}
#: One fault of each place where it can be noticed: they come in every way, the others in four.
EVERYWHERE = ("a head without a bias", "the base's own tensor", "registers with NaN", "a truncated file", "no weights")
EVERYWHERE += ("no weights and no identity", "another base, excused by the file", "a block that is not there")
EVERYWHERE += ("an anatomy with methods", "a number of a wrong type", "a name that is a list")
#: A config without weights or identity is one to train with; a tower has the anatomy of its first adapter; and
#: transformers itself reads the name of the base.
NO_FAULTS = {
    "no weights and no identity": ("get_peft_model", "transformers' add_adapter", "transformers, trainable"),
    "an anatomy that leaves too early": tuple(way for way in WAYS if way.startswith("second")),
    "a name that is a list": ("AutoModel",),
}


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy of the good one, its base beside it."""
    shutil.copytree(good, tmp_path / "adapter")
    (tmp_path / "base").symlink_to(good.parent / "base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("way", WAYS)
def test_the_good_adapter_gets_in(way: str, base: Any, adapter: Path) -> None:
    WAYS[way](base, adapter)[1]()


@pytest.mark.parametrize(("fault", "way"), crossings(FAULTS, WAYS, whole=EVERYWHERE, each=4))
def test_a_refused_adapter_leaves_the_model_as_it_was(
    fault: str, way: str, base: Any, adapter: Path, untouched: Any
) -> None:
    if way in NO_FAULTS.get(fault, ()):
        pytest.skip("no fault")
    FAULTS[fault](adapter)
    model, load = WAYS[way](base, adapter)
    check = untouched(model)
    with pytest.raises((AdapterFileError, BaseModelMismatchError, UnsupportedModelError)) as caught:
        load()
    assert str(adapter.parent) in str(caught.value), "the file is not named"
    check()


# --- other methods beside registers -----------------------------------------------------------------------------------


def beside(**options: Any) -> dict[str, PeftConfig]:
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "query", "value"], **options)
    return {"registers": RegisterConfig(num_registers=2), "lora": lora}


def spoil_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """More tensors, and the manifest's checksums of everything."""
    save_file({**load_file(folder / "lora" / WEIGHTS), **tensors}, folder / "lora" / WEIGHTS)
    manifest = json.loads((folder / "adapters.json").read_text())
    for entry in manifest["adapters"]:
        entry["sha256"] = hashlib.sha256((folder / entry["name"] / WEIGHTS).read_bytes()).hexdigest()
        entry["config_sha256"] = hashlib.sha256((folder / entry["name"] / CONFIG).read_bytes()).hexdigest()
    (folder / "adapters.json").write_text(json.dumps(manifest))


def some_key(folder: Path, part: str) -> str:
    return next(key for key in load_file(folder / "lora" / WEIGHTS) if part in key)


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
@pytest.mark.parametrize("fault", ["the base's own tensor", "NaN", "another rank", "a missing tensor"])
def test_a_refused_lora_leaves_the_base_as_it_was(
    fault: str, start: Any, base: Any, loaded: Any, tmp_path: Path, untouched: Any
) -> None:
    compose(copy.deepcopy(loaded), beside(init_lora_weights=start)).save_pretrained(tmp_path)
    key = some_key(tmp_path, "lora_A")
    width = load_file(tmp_path / "lora" / WEIGHTS)[key].shape[1]
    spoil_tensors(
        tmp_path,
        {
            "the base's own tensor": {f"{PREFIX}vit.layernorm.weight": torch.zeros(WIDTH)},
            "NaN": {key: torch.full((8, width), torch.nan)},
            "another rank": {key: torch.ones(3, width)},
            "a missing tensor": {key: torch.ones(8, width), f"{PREFIX}vit.lora_nothing.weight": torch.ones(1)},
        }[fault],
    )
    check = untouched(base)
    with pytest.raises(AdapterFileError) as caught:
        load_adapters(base, tmp_path)
    assert str(tmp_path / "lora") in str(caught.value)
    check()


def test_tuned_layer_norms_replace_no_other_tensor(base: Any, loaded: Any, tmp_path: Path, untouched: Any) -> None:
    norms = LNTuningConfig(target_modules=["layernorm_before"])
    compose(copy.deepcopy(loaded), {"registers": RegisterConfig(num_registers=2), "lora": norms}).save_pretrained(
        tmp_path
    )
    load_adapters(copy.deepcopy(loaded), tmp_path)
    spoil_tensors(tmp_path, {f"{PREFIX}classifier.weight": torch.zeros(CLASSES, WIDTH)})
    check = untouched(base)
    with pytest.raises(AdapterFileError, match=r"classifier\.weight"):
        load_adapters(base, tmp_path)
    check()


@pytest.mark.parametrize("name", ["os", "megatron.core.evil", 3])
def test_no_module_is_imported_by_the_name_that_lora_gives(name: Any, base: Any, loaded: Any, tmp_path: Path) -> None:
    compose(copy.deepcopy(loaded), beside()).save_pretrained(tmp_path)
    path = tmp_path / "lora" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "megatron_core": name}))
    spoil_tensors(tmp_path, {})
    with pytest.raises(AdapterFileError, match="megatron_core") as caught:
        load_adapters(base, tmp_path)
    assert str(path) in str(caught.value)


def test_a_class_outside_of_the_list_is_not_imported(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("register_adapter.tuner.config.CHECKS_IMPORTS", False)  # as in PEFT 0.18
    evil = adapter.parent / "strange_module_of_a_test.py"
    evil.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(evil.parent)
    change(auto_mapping={"parent_library": evil.stem, "base_model_class": "Model"})(adapter)
    assert PeftConfig.from_pretrained(str(adapter)).auto_mapping is None
    with pytest.raises(ValueError, match="auto class"):
        AutoPeftModel.from_pretrained(str(adapter))


def test_an_anatomy_given_in_code_may_do_what_a_file_may_not(adapter: Path, base: Any) -> None:
    with_power = Anatomy("vit", blocks="layers", methods=("get_input_embeddings",), input_shape=(3, 32, 32))
    anatomy(methods=["get_input_embeddings"])(adapter)
    with pytest.raises(AdapterFileError, match="methods name what is set or called"):
        PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    model = PeftModel.from_pretrained(base, adapter, anatomy=with_power)
    assert model.peft_config["default"].anatomy == with_power


def test_an_interrupt_while_registers_are_put_on_leaves_the_model_as_it_was(
    base: Any, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    check = untouched(base)
    monkeypatch.setattr(RegisterLayer, "attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_registers(base, 4)
    monkeypatch.undo()
    check()


def interrupt_loading(base: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT looks for the weights once more when the registers are on; Ctrl-C or a connection that breaks left them."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("head", [False, True], ids=["registers", "and a head"])
def test_a_load_that_was_interrupted_can_be_tried_again_on_the_same_base(
    base: Any, head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_registers(copy.deepcopy(base), 2, init_std=1.0, modules_to_save=["classifier"] if head else None)
    model.save_pretrained(tmp_path)

    interrupt_loading(base, tmp_path, monkeypatch)
    assert_identical(run(PeftModel.from_pretrained(base, tmp_path), PIXELS), run(model, PIXELS))

    other = add_registers(copy.deepcopy(base), 2, adapter_name="one")
    with pytest.raises(ValueError, match="register adapter 'one' already"):
        PeftModel.from_pretrained(other.get_base_model(), tmp_path, "one")


@pytest.mark.parametrize("since", ["module", "adapter"])
def test_what_was_done_to_a_base_since_an_interrupted_load_is_not_undone(
    base: Any, since: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_registers(copy.deepcopy(base), 2).save_pretrained(tmp_path)

    interrupt_loading(base, tmp_path, monkeypatch)
    if since == "module":
        base.classifier = new = nn.Linear(WIDTH, 2)
    else:
        base.peft_config["lora"] = new = LoraConfig()
    with pytest.raises(ValueError, match="register adapter 'default' already"):
        PeftModel.from_pretrained(base, tmp_path)
    assert new in (base.classifier, base.peft_config.get("lora"))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("register_adapter.training.launch._train", lambda *_: pytest.fail("began to load"))
    (tmp_path / "file").write_text("")
    arguments = ["--model_name_or_path", "no/model", "--dataset_name", "no/data"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--output_dir", str(tmp_path / "file" / "out")])
    assert caught.value.code == 2
    assert "file" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_system() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no device that is full")
    with pytest.raises(OSError, match="is the disk full"):
        _write_tensors({"step": torch.zeros(10**6)}, full)


def test_an_interrupt_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("register_adapter.training.launch._train", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["--model_name_or_path", "no/model", "--dataset_name", "no/data", "--output_dir", str(tmp_path)])
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err
