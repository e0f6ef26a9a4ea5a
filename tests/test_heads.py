"""Heads beside registers: PEFT's task types, backbones without the head, names of classes, what nobody trains."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import LOADS_HEADS, LOOKS_BELOW_PREFIX, build, loads_heads, make_inputs
from helpers import assert_identical, run
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils import ModulesToSaveWrapper
from PIL import Image

from register_adapter import (
    AdapterFileError,
    PositionConfig,
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    compose,
    export_native,
    find_tower,
    load_adapters,
    save_adapters,
)
from register_adapter.commands.runs.audit import AuditArguments, run_audit
from register_adapter.commands.runs.probe import ProbeArguments, run_probes

NAMES = {0: "cat", 1: "dog", 2: "emu", 3: "fox", 4: "gnu"}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def head_model(folder: Path, **options: Any) -> Any:
    kind = tf.Dinov2ForImageClassification
    return kind.from_pretrained(folder / "base", ignore_mismatched_sizes=True, **options).eval()


def backbone(folder: Path) -> Any:
    return tf.AutoModel.from_pretrained(folder / "base").eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare base, an adapter of it that was trained with a new head, and one folder of several adapters."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    base = tf.Dinov2Model(tf.Dinov2Config(**SIZE, image_size=32, patch_size=8))
    base.save_pretrained(folder / "base")
    kind = getattr(tf, "ViTImageProcessorPil", tf.ViTImageProcessor)
    kind(size={"height": 32, "width": 32}).save_pretrained(folder / "base")
    ids = {name: number for number, name in NAMES.items()}
    model = add_registers(
        head_model(folder, id2label=NAMES, label2id=ids), modules_to_save=["classifier"], init_std=1.0
    ).eval()
    model.save_pretrained(folder / "out")
    save_adapters(model, folder / "several")
    with torch.no_grad():
        features = model.get_base_model().dinov2(PIXELS).last_hidden_state
        torch.save({"features": features, "logits": model(PIXELS).logits}, folder / "expected.pt")
    return folder


# Task types of PEFT


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_every_task_type_wraps_runs_saves_and_loads(task: str, named: bool, tmp_path: Path) -> None:
    name = "vit" if task == "FEATURE_EXTRACTION" else "vit-classifier"
    heads = ["classifier"] if named and name == "vit-classifier" else None
    config = RegisterConfig(task_type=task, modules_to_save=heads, init_std=1.0)
    model, inputs = get_peft_model(build(name), config).eval(), make_inputs(name)
    trains = {key for key, value in model.named_parameters() if value.requires_grad}
    assert any("register" in key for key in trains)
    assert any("classifier" in key for key in trains) == (heads is not None or task in ("SEQ_CLS", "TOKEN_CLS"))
    for number in range(2):  # what was loaded is saved and loaded like it
        folder = str(tmp_path / str(number))
        model.save_pretrained(folder)
        written = json.loads(Path(folder, "adapter_config.json").read_text())["modules_to_save"] or []
        assert len(set(written)) == len(written)
        loaded = PeftModel.from_pretrained(build(name), folder).eval()
        assert_identical(run(loaded, inputs), run(model, inputs))
        model = loaded


def test_a_typo_beside_a_task_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'clasifier', which ViTForImageClassification lacks"):
        get_peft_model(build("vit-classifier"), RegisterConfig(task_type="SEQ_CLS", modules_to_save=["clasifier"]))


@pytest.mark.parametrize("kind", [RegisterConfig, PositionConfig])
@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("vit-classifier", "clasifier", "'clasifier', which ViTForImageClassification lacks"),
        ("vit-classifier", "embeddings.dropout", "'embeddings.dropout', a Dropout without parameters"),
        ("vit-classifier", "blocks", "all blocks of ViTModel, .* single blocks"),
        ("timm", "blocks", "all blocks of VisionTransformer, .* single blocks"),
    ],
)
def test_what_cannot_be_trained_beside_is_refused(kind: Any, name: str, module: str, message: str) -> None:
    if name == "timm":
        timm = pytest.importorskip("timm", reason="its blocks are an nn.Sequential")
        base = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2)
    else:
        base = build(name)
        blocks = find_tower(base).part("blocks")
        module = module if module != "blocks" else next(path for path, part in base.named_modules() if part is blocks)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, kind(modules_to_save=[module]))
    assert not any(isinstance(part, ModulesToSaveWrapper) for part in base.modules())


def test_a_task_types_adapter_loads_without_its_head(tmp_path: Path) -> None:
    config = RegisterConfig(task_type="SEQ_CLS", init_std=1.0)
    model = get_peft_model(build("vit-classifier"), config).eval()
    model.save_pretrained(str(tmp_path))
    bare = build("vit")
    bare.load_state_dict(build("vit-classifier").vit.state_dict(), strict=False)
    with pytest.warns(UserWarning, match="'classifier' trained beside its registers"):
        loaded = PeftModel.from_pretrained(bare, str(tmp_path)).eval()
    inputs = make_inputs("vit-classifier")["pixel_values"]
    with torch.no_grad():
        expected = model.get_base_model().vit(inputs).last_hidden_state
        assert torch.equal(loaded(pixel_values=inputs).last_hidden_state, expected)


# A backbone without the head

ROUTES: dict[str, Callable[[Path], Any]] = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(backbone(folder), str(folder / "out")),
    "RegisterPeftModel": lambda folder: RegisterPeftModel.from_pretrained(backbone(folder), folder / "out"),
    "AutoModel": lambda folder: tf.AutoModel.from_pretrained(folder / "out"),
    "load_adapter": lambda folder: _load(backbone(folder), folder / "out"),
    "load_adapters": lambda folder: load_adapters(backbone(folder), folder / "several"),
    "a second adapter": lambda folder: _second(add_registers(backbone(folder)), folder / "out"),
}


def _load(model: Any, adapter: Path) -> Any:
    model.load_adapter(str(adapter))
    return model


def _second(model: Any, adapter: Path) -> Any:
    model.load_adapter(str(adapter), "more")
    model.set_adapter("more")
    return model


@pytest.mark.parametrize("route", ROUTES)
def test_registers_of_a_head_model_load_onto_the_backbone(route: str, trained: Path, tmp_path: Path) -> None:
    if route in ("AutoModel", "load_adapter") and not LOOKS_BELOW_PREFIX:
        pytest.skip("transformers 4 does not look below base_model_prefix")
    expected = torch.load(trained / "expected.pt")["features"]
    with pytest.warns(UserWarning, match="has 'classifier' trained beside its registers, and Dinov2Model has no"):
        model = ROUTES[route](trained).eval()
    with torch.no_grad():
        assert torch.equal(model(PIXELS).last_hidden_state, expected)
    if route != "PeftModel":
        return
    model.save_pretrained(str(tmp_path))  # and the registers alone are an adapter without a head
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained beside.*")
        again = PeftModel.from_pretrained(backbone(trained), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(PIXELS).last_hidden_state, expected)


@pytest.mark.slow
def test_the_commands_take_an_adapter_with_a_head(trained: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for number in range(6):
            noise = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(noise.byte().numpy()).save(images / name / f"{number}.png")
    base, adapter = str(trained / "base"), str(trained / "out")
    with pytest.warns(UserWarning, match="'classifier' trained beside"):
        reports, _ = run_audit(AuditArguments(base, str(images), str(tmp_path / "audit"), adapters=[adapter]))
    assert len(reports) == 2
    with pytest.warns(UserWarning, match="'classifier' trained beside"):
        assert run_probes(ProbeArguments(base, str(images), str(tmp_path / "probe"), adapter=adapter))


def test_a_typo_in_a_new_config_is_refused(trained: Path) -> None:
    model = backbone(trained)
    with pytest.raises(ValueError, match="modules_to_save names 'clasifier', which Dinov2Model lacks"):
        add_registers(model, modules_to_save=["clasifier"])
    assert not hasattr(model, "peft_config")


# Names of classes

HEADS: dict[str, Callable[[Path], Any]] = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(head_model(folder), str(folder / "out")),
    "AutoPeftModel": lambda folder: AutoPeftModel.from_pretrained(str(folder / "out")),
    "AutoModel": lambda folder: tf.AutoModelForImageClassification.from_pretrained(folder / "out"),
    "load_adapter": lambda folder: _load(head_model(folder), folder / "out"),
    "load_adapters": lambda folder: load_adapters(head_model(folder), folder / "several"),
}


@pytest.mark.parametrize("route", HEADS)
def test_a_loaded_head_brings_its_classes_and_takes_them_along(route: str, trained: Path) -> None:
    by_transformers = route in ("AutoModel", "load_adapter")
    model = loads_heads(lambda: HEADS[route](trained)) if by_transformers else HEADS[route](trained)
    model.eval()
    expected = torch.load(trained / "expected.pt")["logits"]
    assert (model.config.num_labels, model.config.id2label) == (5, NAMES)
    assert model.config.label2id == {name: number for number, name in NAMES.items()}
    with torch.no_grad():
        output = model(PIXELS, labels=torch.tensor([4, 0]))
    assert torch.equal(output.logits, expected)
    assert bool(output.loss.isfinite())
    if isinstance(model, PeftModel):
        config = model.get_base_model().config
        with model.disable_adapter():
            assert config.num_labels == 2
        assert config.num_labels == 5
        base = model.unload()
    else:
        model.delete_adapter("default")
        base = model
    assert base.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert base.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


@pytest.mark.skipif(not LOADS_HEADS or not LOOKS_BELOW_PREFIX, reason="transformers loads heads in another way")
@pytest.mark.parametrize("route", ["AutoModel", "load_adapter"])
def test_a_head_that_transformers_forgets_is_missed(route: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from 5.0 to 5.17, where the head was one of other values, under a table of missing keys."""
    monkeypatch.setattr(ModulesToSaveWrapper, "adapter_state_dict_load_map", lambda *_: {})
    with pytest.raises(AdapterFileError, match=r"has not put 'classifier' .* PeftModel\.from_pretrained"):
        HEADS[route](trained)


def test_the_pipeline_and_an_export_have_the_names(trained: Path) -> None:
    model = HEADS["PeftModel"](trained).eval()
    processor = tf.AutoImageProcessor.from_pretrained(trained / "base")
    classify = tf.pipeline("image-classification", model=model, image_processor=processor)
    assert {answer["label"] for answer in classify(Image.new("RGB", (32, 32)), top_k=5)} == set(NAMES.values())
    plain = export_native(model, image_size=32)
    assert (plain.config.num_labels, plain.config.id2label) == (5, NAMES)


def test_classes_follow_the_active_adapter(trained: Path) -> None:
    model = HEADS["PeftModel"](trained)
    model.add_adapter("other", RegisterConfig(modules_to_save=["classifier"], id2label={0: "yes", 1: "no"}))
    model.set_adapter("other")
    assert model.config.id2label == {0: "yes", 1: "no"}
    model.set_adapter("default")
    assert model.config.id2label == NAMES
    model.delete_adapter("default")
    assert model.config.id2label == {0: "yes", 1: "no"}


def test_names_are_written_and_one_config_serves_two_bases(trained: Path, tmp_path: Path) -> None:
    config = RegisterConfig(modules_to_save=["classifier"])
    first = get_peft_model(head_model(trained, num_labels=3), config)
    second = get_peft_model(head_model(trained, num_labels=4), config)
    first.save_pretrained(str(tmp_path / "first"))
    second.save_pretrained(str(tmp_path / "second"))
    for name, number in (("first", 3), ("second", 4)):
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert written["id2label"] == {str(index): f"LABEL_{index}" for index in range(number)}


def test_an_adapter_without_names_brings_their_number(trained: Path, tmp_path: Path) -> None:
    model = HEADS["PeftModel"](trained)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": None}))
    loaded = PeftModel.from_pretrained(head_model(trained), str(tmp_path))
    assert loaded.config.num_labels == 5


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, load_adapters], ids=["PeftModel", "load_adapters"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_head_of_another_size_comes_with_low_cpu_mem_usage(load: Any, is_trainable: bool, trained: Path) -> None:
    folder = trained / ("several" if load is load_adapters else "out")
    base = head_model(trained, num_labels=3)
    model = load(base, folder, low_cpu_mem_usage=True, is_trainable=is_trainable).eval()
    with torch.no_grad():
        assert torch.equal(model(PIXELS).logits, torch.load(trained / "expected.pt")["logits"])
    assert (model.config.num_labels, model.config.id2label) == (5, NAMES)
    copies = [value for key, value in model.named_parameters() if ".modules_to_save." in key]
    assert [value.requires_grad for value in copies] == [is_trainable] * 2


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ({0: "a", 2: "b"}, ValueError, "must number the classes 0, 1, 2…"),
        ({0: "a", "x": "b"}, ValueError, "must number the classes"),
        ({0: 3}, TypeError, "must hold names, got 3"),
        (["a"], TypeError, "id2label must be dict or None"),
        ({0: "a", 1: "b", 2: "c"}, ValueError, r"names 3 classes and .* have \[2\] outputs. Load the base with"),
    ],
)
def test_bad_names_are_refused(labels: Any, error: type[Exception], message: str, trained: Path) -> None:
    model = head_model(trained)
    with pytest.raises(error, match=message):
        add_registers(model, modules_to_save=["classifier"], id2label=labels)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("number", [5, 2])
def test_names_that_the_user_sets_meanwhile_are_the_heads(number: int, trained: Path) -> None:
    """Of another number than the head has outputs they are not, and stay."""
    model = HEADS["PeftModel"](trained)
    own, mine = dict(head_model(trained).config.id2label), {index: f"mine {index}" for index in range(number)}
    model.get_base_model().config.id2label = dict(mine)
    with model.disable_adapter():
        assert model.config.id2label == (own if number == 5 else mine)
    assert model.config.id2label == (mine if number == 5 else NAMES)
    base = model.unload()
    assert base.config.id2label == (own if number == 5 else mine)


# Weights that nobody trains


@pytest.mark.parametrize("wrap", ["add_registers", "get_peft_model", "transformers", "compose"])
def test_a_new_head_that_nothing_trains_is_named(wrap: str, trained: Path) -> None:
    base = tf.Dinov2ForImageClassification.from_pretrained(trained / "base", num_labels=3)
    ways: dict[str, Callable[[], Any]] = {
        "add_registers": lambda: add_registers(base),
        "get_peft_model": lambda: get_peft_model(base, RegisterConfig()),
        "transformers": lambda: base.add_adapter(RegisterConfig()),
        "compose": lambda: compose(
            base, {"registers": RegisterConfig(), "lora": LoraConfig(target_modules=["query", "q_proj"])}
        ),
    }
    with pytest.warns(UserWarning, match=r"no weights for classifier of .*modules_to_save=\['classifier'\]"):
        ways[wrap]()


@pytest.mark.parametrize("order", [("registers", "lora"), ("lora", "registers")])
def test_there_is_no_warning_of_a_head_that_another_adapter_trains(order: tuple[str, str], trained: Path) -> None:
    configs = {
        "registers": RegisterConfig(),
        "lora": LoraConfig(target_modules=["query", "q_proj"], modules_to_save=["classifier"]),
    }
    base = tf.Dinov2ForImageClassification.from_pretrained(trained / "base", num_labels=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*had no weights.*")
        model = compose(base, {name: configs[name] for name in order})
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "classifier" in name)
    other = tf.Dinov2ForImageClassification.from_pretrained(trained / "base", num_labels=3)
    with pytest.warns(UserWarning, match="no weights for classifier"):  # what one call trains is none of the next one's
        compose(other, {"registers": RegisterConfig()})


def test_there_is_no_warning_where_nothing_is_random_or_it_is_trained(trained: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*had no weights.*")
        add_registers(backbone(trained))
        add_registers(build("vit-classifier"))  # made, not loaded
        model = add_registers(head_model(trained, num_labels=3), modules_to_save=["classifier"])
        head_model(trained).save_pretrained(tmp_path)
        add_registers(tf.Dinov2ForImageClassification.from_pretrained(tmp_path))
        model.add_adapter("more", RegisterConfig(modules_to_save=["classifier"]))


@pytest.mark.parametrize("way", ["compose", "add_adapter"])
@pytest.mark.parametrize("first", ["registers", "lora"])
def test_a_task_trains_the_head_of_a_composed_model_too(first: str, way: str, trained: Path, tmp_path: Path) -> None:
    """As PEFT's class for the task does; the first adapter that is for the task has the head, the other leaves it."""
    configs: dict[str, Any] = {
        "registers": RegisterConfig(num_registers=2, task_type="SEQ_CLS"),
        "lora": LoraConfig(target_modules=["query", "q_proj"], task_type="SEQ_CLS"),
    }
    configs = {first: configs.pop(first), **configs}
    base = head_model(trained, num_labels=5)
    if way == "compose":
        model = compose(base, configs)
    else:
        model = compose(base, {first: configs[first]})
        model.add_adapter(*next(item for item in configs.items() if item[0] != first))
        model.set_adapter(list(configs))
    heads = [name for name, value in model.named_parameters() if value.requires_grad and ".classifier." in name]
    assert [name.rpartition("modules_to_save.")[2] for name in heads] == [f"{first}.weight", f"{first}.bias"]
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.2)
    model.eval().save_pretrained(tmp_path)
    again = load_adapters(head_model(trained, num_labels=5), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(PIXELS).logits, model(PIXELS).logits)


@pytest.mark.parametrize("first", ["registers", "lora"])
def test_a_head_that_a_later_config_names_is_left_to_it(first: str, trained: Path) -> None:
    """Though the first one's task would have it trained."""
    configs: dict[str, Any] = {
        "registers": RegisterConfig(num_registers=2, task_type="SEQ_CLS"),
        "lora": LoraConfig(target_modules=["query", "q_proj"], task_type="SEQ_CLS"),
    }
    configs = {first: configs.pop(first), **configs}
    last = [*configs][-1]
    configs[last].modules_to_save = ["classifier"]
    model = compose(head_model(trained, num_labels=5), configs)
    heads = [name for name, value in model.named_parameters() if value.requires_grad and ".classifier." in name]
    assert [name.rpartition("modules_to_save.")[2] for name in heads] == [f"{last}.weight", f"{last}.bias"]
