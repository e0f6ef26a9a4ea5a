"""Registers that enter in every way, under what people run models with: graphs, shards, offloading, quantisers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from crossings import crossings
from execution_cases import BITS, SHARDED, WAYS, check_bitsandbytes, gradients, registered, trained_values
from families import TOWERS, build, make_inputs
from helpers import assert_identical, differs, run
from peft import PeftModel
from processes import SCRIPTS, run_script, run_two_processes
from safetensors import SafetensorError
from safetensors.torch import load_file

from register_adapter import RegisterConfig, add_registers, export_onnx, find_tower
from register_adapter.errors import AdapterFileError
from register_adapter.tuner.hooks.attention import grow_block_mask
from register_adapter.tuner.hooks.tokens import grow_mask

NAMES = [name for name in ("vit", "clip-vision", "dinov2", "dinov3", "siglip2-vision", "beit") if name in TOWERS]
OUTPUT = "last_hidden_state"
every_name = pytest.mark.parametrize("name", NAMES)
every_way = pytest.mark.parametrize("way", WAYS)
#: Where the way and the model do not meet in the code under test: every way on a ViT, three on every other model.
ways_in_turn = pytest.mark.parametrize(("name", "way"), crossings(NAMES, WAYS, whole=("vit",), each=3))
#: The same where a case takes seconds: every way on one model, and every model with one way.
each_way_once = pytest.mark.parametrize(("name", "way"), crossings(NAMES, WAYS))


def ways_in_turn_by(option: str, values: Iterable[Any], names: list[str] = NAMES) -> pytest.MarkDecorator:
    """Every way with every value of an option on a ViT, four of them on every other model."""
    cases = crossings(names, WAYS, values, whole=("vit",), each=4)
    return pytest.mark.parametrize(("name", "way", option), cases)


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        equal = torch.allclose(actual[key], value, rtol=tolerance, atol=tolerance)
        assert equal, f"{key} differs, relative error {error(actual[key], value):.1e}"


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all values together, relative."""
    return float((actual.float() - expected).norm() / expected.norm())


@contextmanager
def as_far_as_the_base(alone: Callable[[], Any]) -> Iterator[None]:
    """Skips a test that fails inside where ``alone``, the same on the base without any adapter, fails as well."""
    try:
        yield
    except Exception as error:
        try:
            alone()
        except Exception as own:
            pytest.skip(f"the base alone cannot do it with these versions: {type(own).__name__} {str(own)[:80]}")
        raise error


# Compiled


@pytest.fixture
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: torch.nn.Module, backend: str = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.slow
@each_way_once
@pytest.mark.usefixtures("_no_graphs")
def test_the_whole_model_is_one_graph(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)
    with as_far_as_the_base(lambda: run(compiled(build(name)), inputs)):
        outputs = run(compiled(model), inputs)
    close(outputs, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_graphs")
def test_a_graph_can_return_hidden_states_after_an_eager_pass() -> None:
    """Without the eager pass transformers' recorders fail to compile, on a plain model too."""
    model, inputs = registered("vit", "insert_layer"), make_inputs("vit")
    expected = run(model, inputs, output_hidden_states=True)
    close(run(compiled(model), inputs, output_hidden_states=True), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_graphs")
def test_a_compiled_model_follows_the_active_adapter() -> None:
    model, inputs = registered("vit", "default"), make_inputs("vit")
    model.add_adapter("other", RegisterConfig(num_registers=5, init_std=1.0, **WAYS["deep"], **WAYS["gate"]))
    graph = compiled(model.eval())
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        close(run(graph, inputs), run(model, inputs))
        with model.disable_adapter():
            close(run(graph, inputs), run(build("vit"), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["deep", "gate", "key_value", "neurons"])
@pytest.mark.usefixtures("_no_graphs")
def test_a_compiled_training_step_has_the_eager_gradients(way: str) -> None:
    model, inputs = registered("vit", way).train(), make_inputs("vit")
    expected = gradients(model, inputs)
    model.zero_grad()
    compiled(model, "aot_eager")(**inputs).last_hidden_state.square().mean().backward()
    grads = {name.rpartition("register_adapter_tokens.")[2]: value.grad for name, value in model.named_parameters()}
    close({name: grads[name] for name in expected}, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_graphs")
def test_inductor_trains() -> None:
    name = "dinov2"
    model, inputs = registered(name, "default").train(), make_inputs(name)
    expected = gradients(model, inputs)
    graph = compiled(model, "inductor")
    with as_far_as_the_base(lambda: run(compiled(build(name)), inputs)):
        grads = gradients(graph, inputs)
    close(grads, expected)
    close(run(graph.eval(), inputs), run(model, inputs))


# Exported


def batch_of(inputs: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    return {key: torch.cat([value] * size)[:size] for key, value in inputs.items()}


@pytest.mark.slow
@each_way_once
def test_an_exported_program_takes_any_batch(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    free = name != "siglip2-vision"  # its position embeddings are resized image by image, with or without registers
    shapes = {key: {0: torch.export.Dim("batch", min=1, max=64)} for key in inputs} if free else None

    def exported(base: torch.nn.Module) -> Any:
        return torch.export.export(base, (), inputs, dynamic_shapes=shapes, strict=False).module()

    with as_far_as_the_base(lambda: exported(build(name))):
        program = exported(model.get_base_model())
    for size in (1, 2, 5) if free else (2,):
        close(run(program, batch_of(inputs, size)), run(model, batch_of(inputs, size)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [("beit", "key_value"), ("vit", "neurons")])
def test_onnx_gives_the_same_numbers_for_any_batch(name: str, way: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="runs ONNX files")
    model, inputs = registered(name, way), make_inputs(name)
    names = export_onnx(model, tmp_path / "model.onnx", inputs)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (2, 3):
        batch = batch_of(inputs, size)
        values = session.run(None, {key: value.numpy() for key, value in batch.items()})
        close(dict(zip(names, map(torch.from_numpy, values), strict=True)), run(model, batch), 1e-4)


# Checkpointed


CHECKPOINTING = {"reentrant": {"use_reentrant": True}, "not-reentrant": {"use_reentrant": False}, "default": None}


@ways_in_turn_by("kind", CHECKPOINTING)
def test_gradient_checkpointing_changes_no_gradient(name: str, way: str, kind: str) -> None:
    model, inputs = registered(name, way).train(), make_inputs(name)
    expected = gradients(model, inputs)
    model.get_base_model().gradient_checkpointing_enable(CHECKPOINTING[kind])
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    close(gradients(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_only_reentrant_checkpointing_makes_the_embeddings_require_a_gradient(reentrant: bool) -> None:
    model, inputs = registered("vit", "key_value").train(), make_inputs("vit")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = []
    block = find_tower(model).part("blocks")[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model.requires_grad_(False)
    model(**inputs)
    assert seen == [reentrant, False, False]


# Two processes


def _two_processes(file: Path, *kinds: str) -> dict[str, torch.Tensor]:
    script = Path(__file__).with_name("two_processes_gradients.py")
    for process in run_two_processes(script, file, *kinds):
        assert process.returncode == 0, process.stderr[-4000:]
    return load_file(file)


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return _two_processes(tmp_path_factory.mktemp("torch") / "gradients.safetensors", "ddp", "fsdp1", "fsdp2")


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The first time on a machine DeepSpeed compiles an extension, which takes minutes and a C++ compiler."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return _two_processes(tmp_path_factory.mktemp("deepspeed") / "gradients.safetensors", "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "zero3"])
@pytest.mark.parametrize(("name", "way"), SHARDED)
def test_two_processes_give_the_gradients_of_one(
    name: str, way: str, kind: str, request: pytest.FixtureRequest
) -> None:
    sharded = request.getfixturevalue("by_deepspeed" if kind == "zero3" else "by_torch")
    model = registered(name, way).train()
    before, grads = trained_values(model), gradients(model, make_inputs(name))
    # Older FSDP2 sums over gloo instead of taking the mean, a plain layer's gradients too.
    times = float(sharded["plain layer"]) if kind == "fsdp2" else 1.0
    assert times in (1.0, 2.0)
    for key, value in grads.items():
        grad = times * value
        assert grad.abs().max() > 0
        torch.testing.assert_close(sharded[f"{kind} {name} {way} grad {key}"], grad, rtol=1e-4, atol=1e-7)
        stepped = before[key] - 0.1 * grad
        torch.testing.assert_close(sharded[f"{kind} {name} {way} step {key}"], stepped, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_trainer_saves_resumes_and_finds_the_best_as_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_script("train_sharded", one, 4)
    for process in run_two_processes(SCRIPTS / "train_sharded.py", two, 2):
        if "no available devices found" in process.stderr:
            pytest.skip("this accelerate has FSDP on GPUs alone")
        assert process.returncode == 0, process.stderr[-4000:]
        assert "parameters DTensor\n" in process.stdout
    for adapter in ("registers", "lora"):
        name = f"{adapter}/adapter_model.safetensors"
        best, last = (load_file(two / place / name) for place in ("best", "checkpoint-4"))
        assert_identical(best, load_file(two / "checkpoint-3" / name))
        assert any(not torch.equal(best[key], value) for key, value in last.items())
        for key, value in load_file(one / "best" / name).items():
            torch.testing.assert_close(best[key], value, rtol=1e-4, atol=1e-5)
        configs = [json.loads((folder / "best" / adapter / "adapter_config.json").read_text()) for folder in (one, two)]
        for config in configs:
            config.pop("weights_sha256", None)
            config["target_modules"] = sorted(config.get("target_modules") or [])
        assert configs[0] == configs[1]


# Offloaded

# SigLIP 2 reads its position embedding past the module: it cannot be offloaded without registers either.
OFFLOADED = [name for name in NAMES if name != "siglip2-vision"]


def offload(model: torch.nn.Module, kind: str, folder: Path) -> None:
    cpu = torch.device("cpu")
    if kind == "cpu":
        accelerate.cpu_offload(model, cpu)
    else:
        accelerate.disk_offload(model, folder, cpu)


@ways_in_turn_by("kind", ["cpu", "disk"], OFFLOADED)
def test_offloaded_registers_come_back_for_the_forward_pass(name: str, way: str, kind: str, tmp_path: Path) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)
    offload(model, kind, tmp_path)
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert_identical(run(model, inputs), expected)
    with model.disable_adapter():
        assert_identical(run(model, inputs), run(build(name), inputs))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@every_way
def test_a_model_can_be_dispatched_with_its_registers_anywhere(way: str, place: str, tmp_path: Path) -> None:
    model, inputs = registered("vit", way), make_inputs("vit")
    expected = run(model, inputs)
    base = model.get_base_model()
    blocks = ("layers", "encoder")  # newer and older transformers
    places = {name: "disk" if name in blocks else "cpu" for name, _ in base.named_children()} | {"registers": place}
    accelerate.dispatch_model(base, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert base.registers.tokens("default").weight.is_meta == (place == "disk")
    assert_identical(run(model, inputs), expected)


@ways_in_turn_by("device_map", ["cpu", "auto"])
def test_an_adapter_loads_into_a_base_with_a_device_map(name: str, way: str, device_map: str, tmp_path: Path) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    plain = build(name)
    plain.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loader = tf.AutoModel if type(plain.config) in tf.AutoModel._model_mapping else type(plain)
    attention = plain.config._attn_implementation  # BEIT's in transformers 4 is chosen once and for all
    base = loader.from_pretrained(tmp_path / "base", device_map=device_map, attn_implementation=attention)
    assert_identical(run(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), inputs), run(model, inputs))


@every_way
def test_registers_join_a_base_on_disk(way: str, tmp_path: Path) -> None:
    """PEFT cannot load any adapter into such a base, LoRA no more than registers; new ones can be added."""
    build("vit").save_pretrained(tmp_path / "base")
    try:
        base = tf.AutoModel.from_pretrained(
            tmp_path / "base", device_map={"": "disk"}, offload_folder=tmp_path / "disk", attn_implementation="sdpa"
        )
    except SafetensorError:  # transformers 4 knows no such place for a whole model
        base = build("vit")
        accelerate.disk_offload(base, tmp_path / "disk", torch.device("cpu"))
    assert {value.device.type for value in base.parameters()} == {"meta"}
    inputs = make_inputs("vit")
    assert_identical(run(registered("vit", way, base), inputs), run(registered("vit", way), inputs))


# Number formats and layouts


#: Half precisions -> how far outputs may be, relative to all values together.
LIMITS = {"bfloat16": 0.02, "float16": 0.003}


@ways_in_turn_by("precision", LIMITS)
def test_half_weights(name: str, way: str, precision: str) -> None:
    dtype, limit = getattr(torch, precision), LIMITS[precision]
    expected = run(registered(name, way), make_inputs(name))[OUTPUT]
    model = registered(name, way, build(name, dtype=dtype))
    inputs = make_inputs(name, dtype=dtype)
    whole = registered(name, way).to(dtype)
    for output in (run(model, inputs)[OUTPUT], run(whole, inputs)[OUTPUT]):
        assert output.dtype == dtype
        assert error(output, expected) < limit
    for value in gradients(model.train(), inputs).values():
        assert value.dtype == torch.float32  # PEFT keeps what is trained in float32
        assert torch.isfinite(value).all()
        assert value.abs().sum() > 0


@ways_in_turn_by("precision", LIMITS)
def test_autocast_trains_float32_registers(name: str, way: str, precision: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)[OUTPUT]
    with torch.autocast("cpu", dtype=getattr(torch, precision)):
        assert error(run(model, inputs)[OUTPUT], expected) < 0.02
        for value in gradients(model.train(), inputs).values():
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()
            assert value.abs().sum() > 0


@every_way
@pytest.mark.parametrize("name", [name for name in NAMES if make_inputs(name)["pixel_values"].ndim == 4])
def test_channels_last(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)
    model = model.to(memory_format=torch.channels_last)
    inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
    close(run(model, inputs), expected)


# Quantised

INT8 = {"weights": "Int8WeightOnlyConfig", "dynamic": "Int8DynamicActivationInt8WeightConfig"}


def quantised(model: torch.nn.Module, kind: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights")
    quantization.quantize_(model, getattr(quantization, INT8[kind])())
    return model


@ways_in_turn_by("kind", INT8)
def test_int8_before_or_after_the_registers_is_the_same(name: str, way: str, kind: str, tmp_path: Path) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)[OUTPUT]
    model.save_pretrained(tmp_path / "float")
    base = quantised(build(name), kind)
    before = run(base, inputs)
    loaded = PeftModel.from_pretrained(base, tmp_path / "float", is_trainable=True).eval()
    outputs = run(loaded, inputs)
    assert 0 < error(outputs[OUTPUT], expected) < 0.02
    quantised(model.get_base_model(), kind)
    assert_identical(run(model, inputs), outputs)
    with loaded.disable_adapter():
        assert_identical(run(loaded, inputs), before)
    loaded.save_pretrained(tmp_path / "int8")  # and back to the float base
    again = PeftModel.from_pretrained(build(name), tmp_path / "int8").eval()
    assert_identical(run(again, inputs), run(registered(name, way), inputs))


@pytest.mark.parametrize("kind", INT8)
def test_an_int8_head_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = add_registers(build("vit-classifier"), modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    base = quantised(build("vit-classifier"), kind)
    with pytest.raises(AdapterFileError, match=r"the model's classifier\.weight is of a quantised module"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="names 'classifier', whose 'weight' is of a quantised module"):
        add_registers(base, modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"'default' is not saved.*classifier\S+weight is of a quantised module"):
        quantised(model, kind).save_pretrained(tmp_path)


@ways_in_turn
def test_registers_train_on_int8_weights(name: str, way: str) -> None:
    inputs = make_inputs(name)
    expected = gradients(registered(name, way).train(), inputs)
    grads = gradients(registered(name, way, quantised(build(name), "weights")).train(), inputs)
    for key, value in expected.items():
        assert 0 < error(grads[key], value) < 0.1


@pytest.mark.parametrize("kind", BITS)
@every_way
def test_bitsandbytes(way: str, kind: str, tmp_path: Path) -> None:
    check_bitsandbytes(way, BITS[kind], "cpu", tmp_path)


# Attention implementations


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    """Flex attention as written: compiling it for a CPU takes tens of seconds."""
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("this torch cannot be told to leave flex attention uncompiled")
    with torch.compiler.set_stance("force_eager"):
        yield


FLEX = ["vit", "clip-vision", "dinov2", "dinov2-registers", "dinov3", "siglip-vision"]


@every_way
@pytest.mark.parametrize("name", [name for name in FLEX if name in TOWERS])
@pytest.mark.usefixtures("_uncompiled")
def test_flex_attention(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = run(model, inputs)
    model.get_base_model().set_attn_implementation("flex_attention")
    if way == "gate":
        with pytest.raises(ValueError, match=r"'flex_attention' takes no additive mask.*set_attn_implementation"):
            run(model, inputs)
    else:
        close(run(model, inputs), expected)
    with model.disable_adapter():
        close(run(model, inputs), run(build(name), inputs))


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_room_in_a_block_mask_is_room_in_a_dense_one(start: int) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="block masks")
    seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = flex.create_block_mask(lambda b, h, q, k: seen[b, h, q, k], 2, 1, 9, 9, "cpu")

    def dense(grown: Any) -> torch.Tensor:
        return flex.create_mask(grown.mask_mod, 2, 1, *grown.seq_lengths, "cpu")

    assert torch.equal(dense(mask), seen)
    assert torch.equal(dense(grow_block_mask(mask, start, 3)), grow_mask(seen, start, 3))
    keys = torch.cat([seen, seen.new_ones(2, 1, 9, 3)], dim=-1)
    assert torch.equal(dense(grow_block_mask(mask, 9, 3, rows=False)), keys)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_way
@pytest.mark.skipif("siglip2-vision" not in TOWERS, reason="transformers without SigLIP 2")
def test_padding_patches_stay_out_of_the_others(way: str, attention: str) -> None:
    """SigLIP 2 brings its mask to the encoder, where registers join."""
    model, inputs = registered("siglip2-vision", way, build("siglip2-vision", attention)), make_inputs("siglip2-vision")
    inputs["spatial_shapes"] = torch.tensor([[3, 4], [4, 4]])
    inputs["pixel_attention_mask"][0, 12:] = 0
    expected = run(model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 12:] += 100.0
    outputs = run(model, inputs)
    assert torch.equal(outputs[OUTPUT][0, :12], expected[OUTPUT][0, :12])
    assert torch.equal(outputs["pooler_output"], expected["pooler_output"])
    assert differs({"": outputs[OUTPUT][0, 12:]}, {"": expected[OUTPUT][0, 12:]})
