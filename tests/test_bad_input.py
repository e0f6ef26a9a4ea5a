"""Bad models, arguments, files and disks: each is refused with an error that says what was found; nothing changes."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import WIDTH, build, make_inputs, perturb
from helpers import Snapshot, assert_identical, hooks, run
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from processes import run_script
from safetensors.torch import load_file, save_file
from torch import nn

from register_adapter import (
    AdapterFileError,
    Anatomy,
    BaseModelMismatchError,
    RegisterConfig,
    RegisterPeftModel,
    UnsupportedModelError,
    add_registers,
    find_register_layer,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.registers.register_adapter_tokens.weight"


class Bomb:
    """A pickle of it creates a file as soon as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


# --- the files of an adapter, spoiled ---------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        try:
            save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
        except KeyError as error:
            pytest.skip(f"this version of safetensors writes no {error}")

    return spoil


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return spoil


def header(text: bytes) -> Callable[[Path], None]:
    return raw(lambda _: len(text).to_bytes(8, "little") + text)


def pickle_as(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded")))

    return spoil


def set_nan(values: dict[str, torch.Tensor]) -> None:
    values[KEY][1, 2] = torch.nan


NOT_WHOLE = "not a whole safetensors file"
#: What is wrong with the weights, and what the error says of it.
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (tensors(lambda values: values.update(other=values.pop(KEY))), r"found 0 among \['other'\]"),
    "empty": (tensors(lambda values: values.pop(KEY)), r"found 0 among \[\]"),
    "extra": (tensors(lambda values: values.update(other=torch.ones(2))), r"does not mention: \['other'\]"),
    "twice": (tensors(lambda values: values.update({f"more.{KEY}": torch.ones(4, WIDTH)})), r"found 2 among"),
    "too many registers": (
        tensors(lambda values: values.update({KEY: torch.ones(5, WIDTH)})),
        r"shape \(5, 32\), the config says \(4, 32\)",
    ),
    "another width": (tensors(lambda values: values.update({KEY: torch.ones(4, 64)})), r"shape \(4, 64\)"),
    "one dimension": (tensors(lambda values: values.update({KEY: torch.ones(128)})), r"shape \(128,\)"),
    "no dimension": (tensors(lambda values: values.update({KEY: torch.tensor(1.0)})), r"shape \(\)"),
    "NaN": (tensors(set_nan), r"not finite"),
    "infinity": (tensors(lambda values: values[KEY].fill_(torch.inf)), r"not finite"),
    "int8": (tensors(lambda values: values.update({KEY: values[KEY].to(torch.int8)})), r"dtype torch\.int8"),
    "complex": (tensors(lambda values: values.update({KEY: values[KEY].to(torch.complex64)})), r"complex64"),
    "truncated": (raw(lambda data: data[:-100]), NOT_WHOLE),
    "truncated header": (raw(lambda data: data[:20]), NOT_WHOLE),
    "zero bytes": (raw(lambda data: b""), NOT_WHOLE),
    "oversized header": (raw(lambda data: (2**62).to_bytes(8, "little") + data[8:]), NOT_WHOLE),
    "header not UTF-8": (header(b"\xff\xfe{}\x00"), NOT_WHOLE),
    "header not JSON": (header(b"{not json}"), NOT_WHOLE),
    "header is a list": (header(b"[1, 2, 3]"), NOT_WHOLE),
    "offsets beyond the file": (
        header(json.dumps({KEY: {"dtype": "F32", "shape": [4, WIDTH], "data_offsets": [0, 512]}}).encode()),
        NOT_WHOLE,
    ),
    "a pickle named safetensors": (pickle_as(WEIGHTS), NOT_WHOLE),
    "a pickle": (pickle_as("adapter_model.bin"), r"pickled weights.*never loaded"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A good adapter of 4 registers for the model ``vit``, whose base lies beside it."""
    build("vit").save_pretrained(tmp_path / "base")
    model = add_registers(tf.ViTModel.from_pretrained(tmp_path / "base"), 4)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_weights_are_refused_before_the_model_changes(fault: str, adapter: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(adapter)
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        PeftModel.from_pretrained(base, str(adapter))
    snapshot.check()
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_weights_are_refused_as_a_second_adapter(fault: str, adapter: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(adapter)
    model = add_registers(build("vit"), 2).eval()
    snapshot = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        model.load_adapter(str(adapter), "second")
    snapshot.check()
    assert list(model.peft_config) == ["default"]
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_weights_are_refused_by_auto_peft_model(fault: str, adapter: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(adapter)
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        AutoPeftModel.from_pretrained(str(adapter))
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_trainable", [False, True], ids=["frozen", "trainable"])
def test_bad_weights_are_refused_by_transformers(fault: str, is_trainable: bool, adapter: Path) -> None:
    spoil, message = FAULTS[fault]
    spoil(adapter)
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        base.load_adapter(str(adapter), is_trainable=is_trainable)
    snapshot.check()
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize("fault", ["missing", "NaN", "another width", "int8", "extra"])
def test_bad_weights_are_refused_where_the_config_is_handed_over(fault: str, adapter: Path) -> None:
    """PEFT skips the reading of the config then; the weights are checked as they come in."""
    spoil, message = FAULTS[fault]
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        if fault == "extra":
            pytest.skip("this PEFT hands tensors to the module that they are for: a stranger reaches none")
        message += "|no .finite. register values"
    config = RegisterConfig.from_pretrained(str(adapter))
    spoil(adapter)
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        PeftModel.from_pretrained(base, str(adapter), config=config)
    assert_identical(run(base, snapshot.inputs), snapshot.outputs)


def test_weights_are_checked_without_a_known_width_too(adapter: Path) -> None:
    spoil_config(adapter, base_tower=None)
    assert RegisterConfig.from_pretrained(str(adapter)).identity is None
    FAULTS["no dimension"][0](adapter)
    with pytest.raises(AdapterFileError, match=r"has shape \(\)"):
        RegisterConfig.from_pretrained(str(adapter))


def test_a_folder_without_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    base = build("vit")
    expected = run(base, make_inputs("vit"))
    with pytest.raises((AdapterFileError, ValueError, OSError)):
        PeftModel.from_pretrained(base, str(adapter))
    assert_identical(run(base, make_inputs("vit")), expected)


# --- its config -------------------------------------------------------------------------------------------------------


def spoil_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_registers": 0}, "at least 1, got 0"),
        ({"num_registers": "4"}, "num_registers must be int, got '4' of type str"),
        ({"num_registers": 4.0}, "got 4.0 of type float"),
        ({"num_registers": None}, "got None of type NoneType"),
        ({"init": "random"}, "init must be one of normal, zeros, cls, test_time, outliers, got 'random'"),
        ({"init_std": "wide"}, "init_std must be int or float, got 'wide'"),
        ({"attentions": 3}, "attentions must be str, got 3"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be .*, got 'classifier' of type str"),
        ({"modules_to_save": [3]}, r"modules_to_save must hold names, got \[3\]"),
        ({"target_modules": [None]}, r"target_modules must hold names, got \[None\]"),
        ({"base_tower": "vit"}, "base_tower must be dict or None, got 'vit'"),
        ({"base_tower": {"family": "vit"}}, r"base_tower\['hidden_size'\] must be int, got None"),
        ({"anatomy": {"family": "mine", "heads": 3}}, r"unknown keys \['heads'\] in an anatomy"),
        ({"anatomy": {"family": 3}}, "'family' of an anatomy must be str, got 3"),
        (
            {"anatomy": {"family": "mine", "blocks": [3]}},
            r"'blocks' of an anatomy must be the name of a module, got \(3,\)",
        ),
        ({"anatomy": {"family": "mine", "prefix": "1"}}, "'prefix' of an anatomy must be int, got '1'"),
        ({"format_version": "new"}, "format_version must be int, got 'new'"),
        ({"format_version": 0}, "format_version must be at least 1, got 0"),
        ({"task_type": "NO_SUCH_TASK"}, "NO_SUCH_TASK"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_a_wrong_type_or_value_is_refused(values: dict[str, Any], message: str, adapter: Path) -> None:
    spoil_config(adapter, **values)
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    for load in (PeftModel.from_pretrained, lambda base, folder: base.load_adapter(folder)):
        with pytest.raises(AdapterFileError, match=message) as caught:
            load(base, str(adapter))
        assert str(adapter / CONFIG) in str(caught.value)
        snapshot.check()


def test_a_fingerprint_that_is_none_is_refused(adapter: Path) -> None:
    tower = json.loads((adapter / CONFIG).read_text())["base_tower"]
    base = build("vit")
    for value in ("abc", [float("nan")] * 24, ["a"], {}):
        spoil_config(adapter, base_tower={**tower, "fingerprint": value})
        with pytest.raises(AdapterFileError, match="fingerprint"):
            PeftModel.from_pretrained(base, str(adapter))
    spoil_config(adapter, base_tower={**tower, "fingerprint": tower["fingerprint"][:3]})
    with pytest.raises(ValueError, match="differ in weights"):
        PeftModel.from_pretrained(base, str(adapter))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 99}, "written in format 99, newer than 2"),
        ({"gating": "new", "heads": 3}, r"\['gating', 'heads'\]"),
    ],
    ids=["newer version", "unknown keys"],
)
def test_a_config_of_a_newer_release_warns_and_loads(values: dict[str, Any], message: str, adapter: Path) -> None:
    trained = PeftModel.from_pretrained(build("vit"), str(adapter))
    spoil_config(adapter, **values)
    inputs = make_inputs("vit")
    with pytest.warns(UserWarning, match=message):
        loaded = PeftModel.from_pretrained(build("vit"), str(adapter))
    assert_identical(run(loaded, inputs), run(trained, inputs))
    base = build("vit")
    with pytest.warns(UserWarning, match=message):
        base.load_adapter(str(adapter))
    assert_identical(run(base, inputs), run(trained, inputs))


def test_an_unknown_key_of_the_tower_warns_and_loads(adapter: Path) -> None:
    tower = json.loads((adapter / CONFIG).read_text())["base_tower"]
    spoil_config(adapter, base_tower={**tower, "pooling": "mean"})
    with pytest.warns(UserWarning, match=r"\['pooling'\]"):
        PeftModel.from_pretrained(build("vit"), str(adapter))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "not a JSON file in UTF-8"),
        (b"\xff\xfe\x00", "not a JSON file in UTF-8"),
        (b"", "not a JSON file in UTF-8"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b"3", "must hold a JSON object, found int"),
    ],
    ids=["not JSON", "not UTF-8", "empty", "a list", "a number"],
)
def test_a_config_that_is_no_json_object_is_refused(content: bytes, message: str, adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(content)
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=message):
        RegisterPeftModel.from_pretrained(base, str(adapter))
    # PEFT and transformers read it themselves, to learn which method it is for.
    for load in (PeftModel.from_pretrained, lambda base, folder: base.load_adapter(folder)):
        with pytest.raises((ValueError, TypeError)):
            load(base, str(adapter))
        snapshot.check()


# --- models and arguments ---------------------------------------------------------------------------------------------


def swin() -> nn.Module:
    return tf.SwinModel(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


def resnet() -> nn.Module:
    return tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))


def bert() -> nn.Module:
    return tf.BertModel(
        tf.BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


@pytest.mark.parametrize("make", [swin, resnet, bert, lambda: nn.Linear(4, 4)])
def test_a_model_without_a_tower_for_registers_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    keys, grads = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    installed, modules = hooks(model), [name for name, _ in model.named_modules()]
    for attach in (add_registers, lambda model: get_peft_model(model, RegisterConfig())):
        with pytest.raises(UnsupportedModelError) as caught:
            attach(model)
        text = str(caught.value)
        assert f"{type(model).__name__} has no vision tower" in text
        assert "ViTModel" in text
        assert "anatomy=Anatomy(" in text
    assert list(model.state_dict()) == keys
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert (hooks(model), [name for name, _ in model.named_modules()]) == (installed, modules)
    assert not hasattr(model, "peft_config")


class Twins(nn.Module):
    """A student and a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = build("vit"), build("dinov2")

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {
            "student": self.student(pixel_values).last_hidden_state,
            "teacher": self.teacher(pixel_values).last_hidden_state,
        }


def test_two_towers_are_named_with_the_way_to_choose() -> None:
    model, inputs = Twins().eval(), make_inputs("vit")
    snapshot = Snapshot(model, inputs)
    with pytest.raises(UnsupportedModelError, match=r"2 vision towers: student, teacher.*target_modules='student'"):
        add_registers(model, 4)
    for wrong in ("nobody", "embeddings"):
        with pytest.raises(UnsupportedModelError, match=f"'{wrong}' names 0 vision towers.*'student', 'teacher'"):
            add_registers(model, 4, target_modules=wrong)
    with pytest.raises(ValueError, match=r"one vision tower, got \['student', 'teacher'\]"):
        add_registers(model, 4, target_modules=["student", "teacher"])
    snapshot.check()


@pytest.mark.parametrize("chosen", ["student", "teacher"])
def test_a_chosen_tower_of_two_gets_the_registers_and_is_found_again(chosen: str, tmp_path: Path) -> None:
    model, inputs = Twins().eval(), make_inputs("vit")
    plain = run(model, inputs)
    trained = add_registers(model, 4, target_modules=chosen).eval()
    outputs = run(trained, inputs)
    (other,) = {"student", "teacher"} - {chosen}
    assert torch.equal(outputs[other], plain[other])
    assert not torch.equal(outputs[chosen], plain[chosen])
    assert outputs[chosen].shape == plain[chosen].shape
    trained.save_pretrained(str(tmp_path))
    assert_identical(run(PeftModel.from_pretrained(Twins().eval(), str(tmp_path)), inputs), outputs)


def test_both_towers_of_two_can_carry_registers() -> None:
    base, inputs = Twins().eval(), make_inputs("vit")
    snapshot = Snapshot(base, inputs)
    model = add_registers(base, 4, target_modules="student").eval()
    model.add_adapter("second", RegisterConfig(num_registers=2, target_modules="teacher"))
    first = run(model, inputs)
    assert torch.equal(first["teacher"], snapshot.outputs["teacher"])
    model.set_adapter("second")
    second = run(model, inputs)
    assert torch.equal(second["student"], snapshot.outputs["student"])
    assert not torch.equal(second["teacher"], snapshot.outputs["teacher"])
    model.base_model.set_adapter(["default", "second"])
    assert_identical(run(model, inputs), {"student": first["student"], "teacher": second["teacher"]})
    with pytest.raises(ValueError, match="'second' already"):
        get_peft_model(base, RegisterConfig(target_modules="student"), "second")
    model.unload()
    snapshot.check()


def test_a_tower_is_chosen_by_the_end_of_its_name() -> None:
    model = add_registers(build("clip"), 4, target_modules=["vision_model"])
    assert find_register_layer(model).tower.path.endswith("vision_model")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        (-1, ValueError, "must be at least 1, got -1"),
        (2.5, TypeError, "must be int, got 2.5 of type float"),
        ("4", TypeError, "must be int, got '4' of type str"),
        (True, TypeError, "must be int, got True of type bool"),
        (None, TypeError, "must be int, got None"),
    ],
)
def test_a_number_of_registers_that_is_none_is_refused(value: Any, error: type[Exception], message: str) -> None:
    base = build("vit")
    snapshot = Snapshot(base, make_inputs("vit"))
    with pytest.raises(error, match=f"num_registers {message}"):
        add_registers(base, value)
    with pytest.raises(error, match=f"num_registers {message}"):
        get_peft_model(base, RegisterConfig(num_registers=value))
    snapshot.check()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("siglip-vision", {"init": "cls"}, "'siglip' has none"),
        (
            "vit-classifier",
            {"modules_to_save": ["head"]},
            r"'head', which ViTForImageClassification lacks.*'classifier'",
        ),
        ("vit-classifier", {"modules_to_save": ["layernorm"]}, "'layernorm', where registers enter or leave ViTModel"),
        ("vit-classifier", {"modules_to_save": ["vit"]}, "'vit', where registers enter or leave"),
        ("clip-vision", {"modules_to_save": ["encoder"]}, "'encoder', where registers enter or leave"),
        ("vit", {"init_std": -1.0}, "init_std must be a finite number of at least 0, got -1.0"),
        ("vit", {"init_std": float("nan")}, "init_std must be a finite number"),
        ("vit", {"init_std": 1e39}, "init_std must be at most 1e\\+15"),
        ("vit", {"key_value": True, "gate": 1e39}, "gate must be at most 3.4e\\+38 on either side of 0"),
        ("vit", {"key_value": True, "gate": -1e308}, "gate must be at most 3.4e\\+38 on either side of 0"),
        ("vit", {"attentions": "none"}, "attentions must be one of slice, full, got 'none'"),
        ("vit", {"registers": 3}, "registers"),
        ("vit", {"anatomy": Anatomy("mine", embeddings="nowhere")}, "anatomy 'mine' does not fit ViTModel.*nowhere"),
        ("vit", {"anatomy": Anatomy("mine"), "target_modules": "nobody"}, "ViTModel has no module 'nobody'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    base = build(name)
    snapshot = Snapshot(base, make_inputs(name))
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        add_registers(base, 4, **options)
    snapshot.check()


def test_a_tower_that_has_registers_of_its_own_by_that_name_is_refused() -> None:
    base = build("vit")
    base.registers = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"attribute 'registers' of its own \(Linear\)"):
        add_registers(base, 4)
    assert isinstance(base.registers, nn.Linear)


def test_a_name_in_use_is_refused_on_every_path(adapter: Path) -> None:
    base = build("vit")
    model = add_registers(base, 4).eval()
    snapshot = Snapshot(model, make_inputs("vit"))
    attempts: list[Callable[[], Any]] = [
        lambda: model.add_adapter("default", RegisterConfig()),
        lambda: get_peft_model(base, RegisterConfig()),
        lambda: add_registers(base, 2),
        lambda: inject_adapter_in_model(RegisterConfig(), base, "default"),
        lambda: PeftModel.from_pretrained(base, str(adapter)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"(already|has register adapter) .*|'default'"):
            attempt()
        snapshot.check()

    base = build("vit")
    base.load_adapter(str(adapter), "mine")
    snapshot = Snapshot(base, make_inputs("vit"))
    for attempt in (
        lambda: base.load_adapter(str(adapter), "mine"),
        lambda: base.add_adapter(RegisterConfig(), "mine"),
        lambda: get_peft_model(base, RegisterConfig(), "mine"),
    ):
        with pytest.raises(ValueError, match=r"mine.* already|already.*mine"):
            attempt()
        snapshot.check()


def test_a_second_adapter_that_is_refused_leaves_no_name_behind(adapter: Path) -> None:
    other = build("vit")
    perturb(other, seed=3)
    other.add_adapter(RegisterConfig(num_registers=2), "mine")
    other.eval()
    snapshot = Snapshot(other, make_inputs("vit"))
    with pytest.raises(BaseModelMismatchError):
        other.load_adapter(str(adapter), "theirs")
    snapshot.check()
    assert list(other.peft_config) == ["mine"]


def test_an_adapter_of_another_method_is_not_taken_for_registers(tmp_path: Path) -> None:
    lora = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj", "query"]))
    lora.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match=r"LORA.*not registers"):
        RegisterConfig.from_pretrained(str(tmp_path))


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    """The limit on a file's size makes a write fail in the middle, as a full disk does: of any file, of the weights."""
    outcome = json.loads(run_script("save_to_a_full_disk", tmp_path, 10, 8192).stdout.splitlines()[-1])
    assert outcome["size"] > 16_000
    for report in outcome["reports"].values():
        assert "could not be saved" in report["error"]
        assert "what was there before is untouched" in report["error"]
        assert report["same"]
        assert report["left"] == ["adapter"], "half-written files are gone"
    assert outcome["replaced"], "with room again it is saved"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        add_registers(build("vit"), 4).save_pretrained(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_in_the_place_of_a_number_is_refused_with_the_call_that_takes_it():
    with pytest.raises(TypeError, match=r"got a RegisterConfig; with a config, call get_peft_model\(model, config\)"):
        add_registers(torch.nn.Linear(2, 2), RegisterConfig(num_registers=4))
