"""Exports: exact, without a trace of this package, and readable by somebody who never installed it."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers as tf
from command_line import call, run_here
from crossings import crossings
from families import CASES, IMAGE, LABELS, PATCHES, build, make_inputs, perturb
from helpers import Snapshot, assert_identical, differs, hooks, run
from peft import LoraConfig, get_peft_model
from processes import SCRIPTS, run_module, run_script

from register_adapter import (
    HubAccessError,
    MissingExtraError,
    RegisterConfig,
    UnsupportedModelError,
    add_registers,
    export_native,
    export_onnx,
    export_program,
    find_register_layer,
    save_native,
)
from register_adapter.errors import AdapterFileError
from register_adapter.export import NATIVE, export_saved
from register_adapter.export import saved as saved_module
from register_adapter.export.comparison import check_equal, tensors
from register_adapter.export.subject import Subject
from register_adapter.tuner.hooks.tokens import cut_tokens

#: Models of the tests that have a class with registers; ``native`` gives their number.
WITH_NATIVE_CLASS = [
    name
    for name in (
        *("dinov2", "dinov2-swiglu", "dinov2-classifier", "dinov2-backbone"),
        *("dinov2-registers", "dinov2-registers-classifier", "dinov2-registers-backbone"),
        *("dinov3", "dinov3-swiglu", "dinov3-backbone", "sapiens2", "sapiens2-backbone", "tipsv2", "tipsv2-backbone"),
    )
    if name in CASES
]
WITHOUT = ("vit-classifier", "deit", "clip-projection", "siglip-vision", "clip")


def adapted(name, num_registers=2, dtype=torch.float32, attention="sdpa", **options):
    """A model with registers that matter."""
    model = add_registers(build(name, attention, dtype), num_registers, **options).eval()
    perturb_registers(model)
    return model


def perturb_registers(model):
    layer = find_register_layer(model)
    for index, name in enumerate(layer.names):
        perturb(layer.tokens(name), seed=index, scale=1.0)


def native_registers(model):
    return getattr(model.config, "num_register_tokens", 0)


def outputs(model, inputs, prefix=None, count=0):
    """The flat outputs; with a prefix, tokens of the last hidden state after it are cut out."""
    results = run(model, inputs)
    if prefix is not None and "last_hidden_state" in results:
        hidden = results["last_hidden_state"]
        results["last_hidden_state"] = cut_tokens(hidden, prefix, count, hidden.shape[1])
    return results


# The native class


@pytest.mark.parametrize(
    ("name", "attention", "precision"),
    crossings(WITH_NATIVE_CLASS, ("sdpa", "eager"), ("float32", "bfloat16"), whole=("dinov2",), each=2),
)
def test_a_native_model_gives_the_same_numbers(name, attention, precision):
    dtype = getattr(torch, precision)
    model, inputs = adapted(name, 2, dtype, attention), make_inputs(name, dtype=dtype)
    native = native_registers(model)
    plain = export_native(model)
    assert type(plain).__name__ == NATIVE[type(model.get_base_model()).__name__].name
    assert plain.config.num_register_tokens == native + 2
    assert plain.dtype == plain.config.dtype == dtype
    assert plain.config._attn_implementation == attention
    assert differs(run(model, inputs), run(build(name, attention, dtype), inputs)), "the registers do nothing"
    assert_identical(outputs(plain, inputs, prefix=1 + native, count=2), run(model, inputs))


@pytest.mark.parametrize("name", WITH_NATIVE_CLASS)
def test_nothing_of_the_adapter_is_left_and_the_base_is_untouched(name):
    model, inputs = adapted(name), make_inputs(name)
    before = Snapshot(model, inputs)
    model.train()
    plain = export_native(model)
    assert all(module.training for module in model.modules())
    model.eval()
    before.check()
    fresh = type(plain)(plain.config)
    assert list(plain.state_dict()) == list(fresh.state_dict())
    assert set(vars(plain)) - {"generation_config"} <= set(vars(fresh))
    run(fresh, inputs)  # transformers puts recording hooks of its own on a backbone at its first use
    assert hooks(plain) == hooks(fresh)
    assert not [m for m in plain.modules() if type(m).__module__.startswith(("register_adapter", "peft"))]
    assert set(plain.config.to_dict()) == set(fresh.config.to_dict())
    assert not plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in plain.state_dict().values()}


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers"])
def test_several_adapters_are_joined_in_the_order_of_activation(name):
    model = adapted(name, 1, adapter_name="a")
    model.add_adapter("b", RegisterConfig(num_registers=3))
    model.add_adapter("c", RegisterConfig(num_registers=2))
    perturb_registers(model)
    model.base_model.set_adapter(["b", "a"])
    plain, layer = export_native(model), find_register_layer(model)
    native = native_registers(model)
    expected = torch.cat([layer.tokens("b").weight, layer.tokens("a").weight])
    assert torch.equal(plain.embeddings.register_tokens[0, native:], expected)
    inputs = make_inputs(name)
    assert_identical(outputs(plain, inputs, prefix=1 + native, count=4), run(model, inputs))


@pytest.mark.parametrize("classes", [LABELS, 7])
def test_a_trained_head_goes_in_with_its_classes(classes):
    base = build("dinov2-classifier")
    if classes != LABELS:
        base.classifier = torch.nn.Linear(base.classifier.in_features, classes)
    model = add_registers(base, 2, modules_to_save=["classifier"]).eval()
    perturb(model.base_model.model.classifier.modules_to_save["default"], seed=3)
    perturb_registers(model)
    plain, inputs = export_native(model), make_inputs("dinov2-classifier")
    assert plain.config.num_labels == classes
    assert_identical(run(plain, inputs), run(model, inputs))
    assert not torch.equal(plain.classifier.weight, base.classifier.original_module.weight)


def test_a_model_with_the_adapter_of_transformers_own_mixin():
    base, inputs = build("dinov2-classifier"), make_inputs("dinov2-classifier")
    base.add_adapter(RegisterConfig(num_registers=2), "regs")
    perturb_registers(base)
    plain = export_native(base)
    assert not hasattr(plain, "peft_config")
    assert_identical(run(plain, inputs), run(base, inputs))


def test_lora_is_refused_until_it_is_merged():
    base, inputs = build("dinov2"), make_inputs("dinov2")
    base.add_adapter(RegisterConfig(num_registers=2), "regs")
    perturb_registers(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)).eval()
    with pytest.raises(ValueError, match=r"other adapters.*merge_and_unload"):
        export_native(model)
    merged = model.merge_and_unload()
    assert_identical(outputs(export_native(merged), inputs, prefix=1, count=2), run(merged, inputs))


def test_a_tower_that_is_resized_is_exact_at_the_size_that_is_given():
    """DINOv2 resizes its position embeddings without antialiasing, DINOv2 with registers with it."""
    model, inputs = adapted("dinov2"), make_inputs("dinov2", size=2 * IMAGE)
    expected = run(model, inputs)
    plain = export_native(model, image_size=2 * IMAGE)
    assert plain.config.image_size == 2 * IMAGE
    assert plain.embeddings.position_embeddings.shape[1] == 1 + 4 * PATCHES
    assert_identical(outputs(plain, inputs, prefix=1, count=2), expected)
    assert differs(outputs(export_native(model), inputs, prefix=1, count=2), expected)


def _upernet(**options):
    backbone = tf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=IMAGE,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        **options,
    )
    config = tf.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, num_labels=LABELS)
    return tf.UperNetForSemanticSegmentation(config)


_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _dual_encoder():
    text = tf.BertConfig(**_TEXT)
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(build("dinov2").config, text, projection_dim=16)
    return tf.VisionTextDualEncoderModel(config)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (_upernet, "dinov2"),
        (_dual_encoder, "dual-encoder"),
        pytest.param(
            lambda: build("sapiens2-segmentation"),
            "sapiens2-segmentation",
            marks=pytest.mark.skipif("sapiens2-segmentation" not in CASES, reason="transformers without Sapiens 2"),
        ),
    ],
    ids=["upernet", "dual-encoder", "sapiens2"],
)
def test_a_tower_inside_a_larger_model(make, inputs, tmp_path):
    model, inputs = add_registers(make().eval(), 2).eval(), make_inputs(inputs)
    perturb_registers(model)
    expected = run(model, inputs)
    plain = export_native(model, example_inputs=inputs)
    assert type(plain) is type(model.get_base_model())
    plain.save_pretrained(tmp_path)
    for exported in (plain, type(plain).from_pretrained(tmp_path).eval()):
        results = run(exported, inputs)
        # The dual encoder returns its tower's whole sequence too.
        results["vision_model_output.last_hidden_state"] = expected.get("vision_model_output.last_hidden_state")
        assert all(torch.equal(results[key], value) for key, value in expected.items())


def _captioner():
    decoder = tf.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(build("dinov2").config, decoder)
    return tf.VisionEncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("make", "inputs", "tower"),
    [
        (lambda: build("depth"), "depth", "backbone"),  # the neck takes everything behind CLS for patches
        (_captioner, "captioner", "encoder"),  # the decoder attends to all tokens
    ],
    ids=["depth", "captioner"],
)
def test_a_model_that_would_read_native_registers_is_refused_and_its_tower_is_not(make, inputs, tower):
    model = add_registers(make().eval(), 2).eval()
    perturb_registers(model)
    base = model.get_base_model()
    with pytest.raises(UnsupportedModelError, match=rf"(?s){type(base).__name__}.*export_onnx.*--format"):
        export_native(model, example_inputs=make_inputs(inputs))
    plain = export_native(getattr(base, tower))
    assert type(plain).__name__.startswith("Dinov2WithRegisters")
    assert plain.config.num_register_tokens == 2


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_without_a_native_class_names_the_other_exports(name):
    model = adapted(name)
    before = Snapshot(model, make_inputs(name))
    with pytest.raises(UnsupportedModelError, match=r"no class with native registers.*export_onnx.*--format"):
        export_native(model)
    before.check()


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _inactive(model):
    find_register_layer(model).set_adapter([])


def _on_meta(model):
    model.get_base_model().layernorm.to("meta")


def _wrapped(model):
    model.base_model.model = torch.nn.ModuleDict({"encoder": model.get_base_model()})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_disabled, "are disabled"),
        (_inactive, "not active"),
        (_on_meta, r"'layernorm\.\w+', are not at hand"),
        (_wrapped, r"ModuleDict around the Dinov2Model.*export_native\(model\.encoder\)"),
    ],
)
def test_what_cannot_be_exported_says_why(break_it, message):
    model = adapted("dinov2")
    break_it(model)
    with pytest.raises(ValueError, match=message):
        export_native(model)


@pytest.mark.parametrize("export", [export_native, lambda model: export_program(model, "unused.pt2")])
def test_a_model_without_registers_is_refused(export):
    with pytest.raises(ValueError, match=r"Dinov2Model has none.*add_registers"):
        export(build("dinov2"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"insert_layer": 1}, "insert_layer"),
        ({"deep": True}, "deep"),
        ({"key_value": True}, "key_value"),
        ({"gate": -2.0}, "gate"),
    ],
)
def test_registers_that_are_no_tokens_behind_the_embeddings_are_refused(options, named):
    with pytest.raises(ValueError, match=rf"these have {named}.*export_onnx.*--format"):
        export_native(adapted("dinov2", **options))


def test_an_export_that_is_not_equal_is_not_handed_out():
    model, inputs = adapted("dinov2"), make_inputs("dinov2")
    plain = export_native(model)
    check_equal(Subject.of(model), plain, inputs)
    perturb(plain.embeddings, scale=0.01)
    with pytest.raises(UnsupportedModelError, match=r"last_hidden_state.*differs by"):
        check_equal(Subject.of(model), plain, inputs)


# Without this package


@pytest.mark.slow
def test_a_stranger_loads_a_native_model(tmp_path):
    model, inputs = adapted("dinov2-classifier", modules_to_save=["classifier"]), make_inputs("dinov2-classifier")
    save_native(export_native(model), tmp_path / "plain")
    torch.save({"x": inputs["pixel_values"], "logits": run(model, inputs)["logits"]}, tmp_path / "expected.pt")
    assert sorted(file.name for file in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    run_script("stranger_loads_native", cwd=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("export", [export_program, export_onnx, save_native], ids=lambda export: export.__name__)
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_earlier_export(export, tmp_path):
    import resource  # not on Windows

    given = adapted("dinov2")
    given, name = (export_native(given), "") if export is save_native else (given, "model")
    export(given, tmp_path / "plain" / name)
    before = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write fails in the middle, as on a full disk
    try:
        with pytest.raises(OSError, match="plain") as caught:
            export(given, tmp_path / "plain" / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        signal.signal(signal.SIGXFSZ, usual)
    assert ".register_adapter" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()} == before


@pytest.mark.parametrize("name", ["dinov2", "timm-vit"])
def test_a_native_model_stands_in_its_folder_without_weights_of_an_earlier_one(name, tmp_path):
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.safetensors"):
        (tmp_path / stale).write_text("{}")
    model = build("dinov2") if name == "dinov2" else timm.create_model("vit_tiny_patch16_224", reg_tokens=1)
    save_native(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "mine.safetensors", "model.safetensors"}


PROGRAMS = ("clip", "dinov2-registers", "depth")


def _batch(inputs, size):
    return {key: torch.cat([value] * size)[:size] for key, value in inputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_the_same_numbers_for_any_batch(name, tmp_path):
    model, inputs = adapted(name), make_inputs(name)
    before = Snapshot(model, inputs)
    names = export_program(model, tmp_path / "model.pt2", inputs)
    before.check()
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 2, 5):
        expected = tensors(model(**_batch(inputs, size)))
        results = program(**_batch(inputs, size))
        assert tuple(results) == tuple(expected) == names
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, atol=1e-5, rtol=1e-5)
    assert differs(tensors(build(name)(**inputs)), tensors(model(**inputs)))


@pytest.mark.slow
def test_an_onnx_file_gives_the_same_numbers_for_any_batch(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = adapted("clip"), make_inputs("clip")
    names = export_onnx(model, tmp_path / "model.onnx", inputs)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == list(inputs)
    for size in (1, 2, 5):
        batch = _batch(inputs, size)
        expected = tensors(model(**batch))
        arrays = session.run(None, {key: value.numpy() for key, value in batch.items()})
        assert tuple(node.name for node in session.get_outputs()) == tuple(expected) == names
        for value, tensor in zip(arrays, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_graph_never_lies_beside_the_weights_of_another_export(monkeypatch, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    model, inputs, path = adapted("vit"), make_inputs("vit"), tmp_path / "model.onnx"
    export_onnx(model, path)
    assert (tmp_path / "model.onnx.data").is_file()
    moved = Path.replace

    def stopped_before_the_second(file: Path, place: Path) -> Path:
        monkeypatch.setattr(Path, "replace", stop)
        return moved(file, place)

    def stop(*_):
        raise KeyboardInterrupt

    perturb_registers(model)
    monkeypatch.setattr(Path, "replace", stopped_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, path)
    assert not path.exists()
    monkeypatch.setattr(Path, "replace", moved)
    names = export_onnx(model, path)
    values = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {key: value.numpy() for key, value in inputs.items()}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    expected = tensors(model(**inputs))[names[0]]
    torch.testing.assert_close(torch.from_numpy(values[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_program_takes_lora_beside_the_registers(tmp_path):
    base, inputs = build("dinov2"), make_inputs("dinov2")
    base.add_adapter(RegisterConfig(num_registers=2), "regs")
    perturb_registers(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)).eval()
    export_program(model, tmp_path / "model.pt2")
    results = torch.export.load(tmp_path / "model.pt2").module()(**inputs)
    torch.testing.assert_close(results, tensors(model(**inputs)), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_stranger_runs_a_program_without_transformers(tmp_path):
    model, inputs = adapted("vit-classifier"), make_inputs("vit-classifier")
    export_program(model, tmp_path / "model.pt2")
    torch.save({"x": inputs["pixel_values"], "logits": run(model, inputs)["logits"]}, tmp_path / "expected.pt")
    done = run_module(SCRIPTS / "stranger_runs_program.py", cwd=tmp_path, hub={})
    assert done.returncode == 0, done.stderr


def test_onnx_without_its_packages_names_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingExtraError, match=r"onnxscript.*register-adapter\[onnx\]"):
        export_onnx(adapted("vit"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_could_not_be_written_leaves_the_earlier_one(monkeypatch, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"earlier")

    def full(program, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="no space"):
        export_program(adapted("vit"), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


# The command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and its adapter on disk, inputs, and what the two compute."""
    folder = tmp_path_factory.mktemp("saved")
    build("dinov2-classifier").save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    base = tf.Dinov2ForImageClassification.from_pretrained(folder / "base")
    model = add_registers(base, 2, modules_to_save=["classifier"]).eval()
    perturb_registers(model)
    model.save_pretrained(folder / "adapter")
    model.save_pretrained(folder / "other")
    inputs = make_inputs("dinov2-classifier")
    return folder, inputs["pixel_values"], run(model, inputs)["logits"]


def _load_native(out):
    model = tf.AutoModelForImageClassification.from_pretrained(out).eval()
    return lambda x: model(x).logits


def _load_onnx(out):
    session = pytest.importorskip("onnxruntime").InferenceSession(out / "model.onnx")
    return lambda x: torch.from_numpy(session.run(["logits"], {"pixel_values": x.numpy()})[0])


def _load_program(out):
    program = torch.export.load(out / "model.pt2").module()
    return lambda x: program(pixel_values=x)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "load", "tolerance"),
    [("native", _load_native, 0), ("onnx", _load_onnx, 1e-4), ("program", _load_program, 1e-5)],
)
def test_the_command(form, load, tolerance, saved, tmp_path):
    folder, pixels, logits = saved
    given = (folder / "adapter", "--base", folder / "base", "--out", tmp_path / "out", "--format", form)
    said = run_here("export", *map(str, given))
    assert str(tmp_path / "out") in said.replace("\n", "")
    assert (load(tmp_path / "out")(pixels) - logits).abs().max() <= tolerance
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"form": "tflite"}, ValueError, "there are native, onnx, program"),
        ({"adapter": "{saved}/none"}, HubAccessError, "neither a folder"),
        ({"base": "{saved}/none"}, HubAccessError, "none"),
        ({"out": "{saved}/adapter"}, ValueError, "holds the adapter or its base"),
        ({"out": "{saved}/other"}, ValueError, "holds an adapter, which would be loaded in its place"),
        ({"out": "{saved}/base/config.json"}, ValueError, "is a file"),
        ({"base": ""}, ValueError, "base= is empty"),
        ({"form": "program", "image_size": 1}, ValueError, "image_size=1 is smaller than one patch"),
        ({"form": "onnx", "image_size": 10**6}, ValueError, "image_size=1000000 is too large"),
    ],
)
def test_a_saved_adapter_and_wrong_arguments(arguments, kind, message, saved, tmp_path):
    given = {"adapter": "{saved}/adapter", "out": "{tmp}/out", **arguments}
    before = sorted(saved[0].rglob("*"))
    with pytest.raises(kind, match=message):
        export_saved(
            **{
                key: value.format(saved=saved[0], tmp=tmp_path) if isinstance(value, str) else value
                for key, value in given.items()
            }
        )
    assert sorted(saved[0].rglob("*")) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_is_written_where_the_processor_cannot_be_fetched(saved, tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(saved_module, "cached_file", lost)
    with pytest.raises(ValueError, match="the image processor in"):
        export_saved(str(saved[0] / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument_ends_in_one_clear_line(saved, tmp_path, monkeypatch):
    said = call(monkeypatch, "export", str(saved[0] / "adapter"), "--out", str(tmp_path), "--format", "tflite")
    assert said == "error: unknown format 'tflite'; there are native, onnx, program"


@pytest.mark.parametrize("form", ["native", "onnx", "program"])
def test_a_folder_of_several_adapters_is_refused_with_the_call_for_the_format(form, tmp_path):
    (tmp_path / "adapters.json").write_text('{"adapters": ["registers", "lora"]}')
    with pytest.raises(AdapterFileError, match=rf"register_adapter\.export\.export_{form}\(model"):
        export_saved(tmp_path, tmp_path / "out", form)
