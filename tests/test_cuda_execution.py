"""On a GPU: graphs, attention kernels, threads, offloading, quantised weights, the command line under Accelerate."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from execution_cases import BITS, WAYS, check_bitsandbytes, gradients, registered
from families import FAMILIES, IMAGE, PATCH, TOWERS, build, make_inputs
from helpers import run
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_cuda import DEVICE, exact, on_gpu
from test_execution import as_far_as_the_base
from test_threads import agree
from torch.nn.attention import SDPBackend, sdpa_kernel

from register_adapter import RegisterConfig, add_registers, capture, compose, find_register_layer, get_features
from register_adapter.testbed import SceneDataset, load_planted_vit

__all__ = ["exact"]  # a fixture

OUTPUT = "last_hidden_state"
NAMES = [name for name in ("vit", "clip-vision", "dinov2", "dinov3", "siglip2-vision", "beit") if name in TOWERS]
EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and make test-gpu")
every_way = pytest.mark.parametrize("way", WAYS)


def near(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    actual, expected = (value.detach().float().cpu() for value in (actual, expected))
    away, whole = float((actual - expected).norm()), float(expected.norm())
    assert away <= limit * whole, f"relative error {away / whole:.1e}"


# The numbers of a CPU, in every family


@every_way
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_the_cpu(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected, plain = run(model, inputs), run(build(name), inputs)
    model.to(DEVICE)
    got = run(model, on_gpu(inputs))
    with model.disable_adapter():
        alone = run(model, on_gpu(inputs))
    for actual, wanted in ((got, expected), (alone, plain)):
        assert actual.keys() == wanted.keys()
        for key, value in wanted.items():
            near(actual[key], value)


@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "features_only", "open_clip", "hub"])
def test_other_stacks(name: str) -> None:
    stacks = pytest.importorskip("stacks_cases")
    model = add_registers(stacks.build_stack(name), 3, init_std=1.0, deep=True).eval()
    with torch.no_grad():
        expected = model(stacks.images())
        got = model.to(DEVICE)(stacks.images().to(DEVICE))
    pairs = zip(expected, got, strict=True) if isinstance(expected, list | tuple) else [(expected, got)]
    for wanted, value in pairs:
        near(value, wanted)


# Graphs


@every_way
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_and_cuda_graphs(way: str, mode: str) -> None:
    """The second mode replays CUDA graphs: what a pass keeps must not live in their memory."""
    model, inputs = registered("dinov2", way).to(DEVICE), on_gpu(make_inputs("dinov2"))
    other = {key: value + 1 if value.is_floating_point() else value for key, value in inputs.items()}
    graph = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for given in [inputs, other] * 3:
            near(graph(**given)[OUTPUT].clone(), model(**given)[OUTPUT])
        with model.disable_adapter():
            for given in [inputs, other] * 3:
                near(graph(**given)[OUTPUT].clone(), model(**given)[OUTPUT])
        near(graph(**inputs)[OUTPUT].clone(), model(**inputs)[OUTPUT])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_steps_in_graphs(mode: str) -> None:
    states = []
    for compiled in (False, True):
        model, inputs = registered("vit", "default").to(DEVICE).train(), on_gpu(make_inputs("vit"))
        step = torch.compile(model, mode=mode) if compiled else model
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            step(**inputs)[OUTPUT].square().mean().backward()
            optimizer.step()
        states.append(get_peft_model_state_dict(model))
    for key, value in states[0].items():
        near(states[1][key], value, 1e-2)


@every_way
def test_a_captured_cuda_graph_replays_registers(way: str) -> None:
    model, inputs = registered("vit", way).to(DEVICE), on_gpu(make_inputs("vit"))
    other = {key: value + 1 for key, value in inputs.items()}
    with torch.no_grad():
        expected = model(**other)[OUTPUT].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**inputs)[OUTPUT]
        for key, value in inputs.items():
            value.copy_(other[key])
        graph.replay()
    near(output, expected, 1e-5)


@every_way
def test_exported(way: str) -> None:
    model, inputs = registered("vit", way).to(DEVICE), on_gpu(make_inputs("vit"))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=8)}}
    program = torch.export.export(model.get_base_model(), (), inputs, dynamic_shapes=shapes, strict=False)
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    near(program.module()(pixel_values=pixels)[OUTPUT], run(model, {"pixel_values": pixels})[OUTPUT])


# Attention kernels

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@every_way
@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_sdpa(name: str, way: str, kernel: str, dtype: torch.dtype) -> None:
    """Masks that registers make must suit what a kernel takes; one that takes no mask at all says so itself."""
    model = registered(name, way, build(name, "sdpa")).to(DEVICE)
    inputs = on_gpu(make_inputs(name))
    expected = run(model, inputs)[OUTPUT]
    half = model.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    try:
        with sdpa_kernel(KERNELS[kernel]):
            got = run(half, inputs)[OUTPUT]
            half.train()
            grads = gradients(half, inputs)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip("this kernel takes no such mask or shape")
    near(got, expected, 0.05)
    assert all(torch.isfinite(value).all() for value in grads.values())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "gate"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_flex_attention(way: str, compiled: bool) -> None:
    """Its kernels take heads of 16 numbers or more, which the other tests' models do not have."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = tf.ViTModel(tf.ViTConfig(**shape, image_size=IMAGE, patch_size=PATCH)).eval()
    model, inputs = registered("vit", way, copy.deepcopy(base)).to(DEVICE), on_gpu(make_inputs("vit"))
    expected = run(model, inputs)[OUTPUT]
    for of in (base.to(DEVICE), model.get_base_model()):
        of.set_attn_implementation("flex_attention")

    def forward(of: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return (torch.compile(of) if compiled else of)(**inputs)[OUTPUT]  # type: ignore[no-any-return]

    with as_far_as_the_base(lambda: forward(base)):
        near(forward(model), expected, 1e-3)


# Threads and streams


@every_way
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_threads_with_streams_of_their_own(name: str, way: str) -> None:
    model, inputs = registered(name, way).to(DEVICE), on_gpu(make_inputs(name))
    model.add_adapter("other", RegisterConfig(num_registers=5, init_std=1.0))
    model.eval()

    def on_stream(call: Callable[[], Any]) -> Callable[[], Any]:
        def streamed() -> Any:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                value = call()
            stream.synchronize()
            return value

        return streamed

    def disabled() -> Any:
        with model.disable_adapter():
            return model(**inputs)[OUTPUT]

    def plain() -> Any:
        return model(**inputs)[OUTPUT]

    def features() -> Any:
        return list(get_features(model, inputs["pixel_values"], progress=False).values.values())

    agree(on_stream(plain), on_stream(disabled), on_stream(features))


def test_gradients_of_two_threads() -> None:
    """The backward pass of every thread is in the device's one thread of autograd."""
    model, inputs = registered("vit", "deep").to(DEVICE).train(), on_gpu(make_inputs("vit"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [value for value in model.parameters() if value.requires_grad]

    def step() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(model(**inputs)[OUTPUT].square().mean(), parameters)

    def disabled() -> Any:
        with torch.enable_grad(), model.disable_adapter():
            pixels = inputs["pixel_values"].clone().requires_grad_()
            return torch.autograd.grad(model(pixel_values=pixels)[OUTPUT].square().mean(), pixels)

    agree(step, disabled)


@every_way
def test_data_parallel(way: str) -> None:
    model, inputs = registered("vit", way).to(DEVICE), on_gpu(make_inputs("vit"))
    expected = run(model, inputs)[OUTPUT]
    with torch.no_grad():
        near(torch.nn.DataParallel(model)(**inputs)[OUTPUT], expected)
        (replica,) = torch.nn.parallel.replicate(model, [0])
        near(replica(**inputs)[OUTPUT], expected)


# Places


@every_way
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded(way: str, kind: str, tmp_path: Path) -> None:
    model, inputs = registered("vit", way), make_inputs("vit")
    expected, plain = run(model, inputs)[OUTPUT], run(build("vit"), inputs)[OUTPUT]
    if kind == "cpu":
        accelerate.cpu_offload(model, torch.device(DEVICE))
    else:
        accelerate.disk_offload(model, tmp_path / "disk", torch.device(DEVICE))
    for given in (inputs, on_gpu(inputs)):
        near(run(model, given)[OUTPUT], expected)
    with model.disable_adapter():
        near(run(model, inputs)[OUTPUT], plain)
    model.save_pretrained(tmp_path / "saved")
    near(run(PeftModel.from_pretrained(build("vit"), tmp_path / "saved").eval(), inputs)[OUTPUT], expected)


@every_way
@pytest.mark.parametrize("blocks", [0, "cpu"])
def test_device_map(way: str, blocks: int | str, tmp_path: Path) -> None:
    """Whole on the GPU, and with the blocks left on the CPU, from where they come for each pass."""
    model, inputs = registered("vit", way), make_inputs("vit")
    plain = build("vit")
    plain.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    places = {name: blocks if name in ("layers", "encoder") else 0 for name, _ in plain.named_children()}
    attention = plain.config._attn_implementation

    def placed() -> Any:
        return tf.AutoModel.from_pretrained(tmp_path / "base", device_map=places, attn_implementation=attention)

    expected = run(model, inputs)[OUTPUT]
    near(run(PeftModel.from_pretrained(placed(), tmp_path / "adapter").eval(), on_gpu(inputs))[OUTPUT], expected)
    near(run(registered("vit", way, placed()), on_gpu(inputs))[OUTPUT], expected)


@every_way
def test_what_joins_a_model_on_the_gpu_is_there(way: str, tmp_path: Path) -> None:
    model, inputs = registered("vit", way), make_inputs("vit")
    expected = run(model, inputs)[OUTPUT]
    model.save_pretrained(tmp_path)
    base = build("vit").to(DEVICE)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    loaded.add_adapter("second", RegisterConfig(num_registers=2, **WAYS[way]))
    loaded.load_adapter(tmp_path, "third")
    assert {value.device.type for value in loaded.parameters()} == {DEVICE}
    loaded.set_adapter("third")
    near(run(loaded.eval(), on_gpu(inputs))[OUTPUT], expected)
    layer = find_register_layer(loaded)
    assert layer is not None
    near(run(loaded.to("cpu"), inputs)[OUTPUT], expected)
    near(run(loaded.to(DEVICE), on_gpu(inputs))[OUTPUT], expected)
    near(run(loaded.unload(), on_gpu(inputs))[OUTPUT], run(build("vit"), inputs)[OUTPUT])


@every_way
def test_a_pickled_model_comes_back_on_either_device(way: str, tmp_path: Path) -> None:
    model, inputs = registered("vit", way), make_inputs("vit")
    expected = run(model, inputs)[OUTPUT]
    torch.save(model.to(DEVICE), tmp_path / "model.pt")
    near(run(torch.load(tmp_path / "model.pt", weights_only=False), on_gpu(inputs))[OUTPUT], expected)
    near(run(torch.load(tmp_path / "model.pt", weights_only=False, map_location="cpu"), inputs)[OUTPUT], expected)
    near(run(copy.deepcopy(model), on_gpu(inputs))[OUTPUT], expected)


def test_lora_beside_registers() -> None:
    lora = LoraConfig(target_modules=["q_proj", "query"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = compose(build("dinov2"), {"registers": RegisterConfig(num_registers=3, init_std=1.0), "lora": lora}).eval()
    inputs = make_inputs("dinov2")
    expected = run(model, inputs)[OUTPUT]
    near(run(model.to(DEVICE), on_gpu(inputs))[OUTPUT], expected)


def test_no_memory_stays_behind() -> None:
    """Passes, captures and adapters that went leave nothing allocated."""
    model, inputs = build("vit").to(DEVICE), on_gpu(make_inputs("vit"))

    def round_trip() -> None:
        wrapped = add_registers(model, 4, deep=True)
        wrapped(**inputs)[OUTPUT].sum().backward()
        with capture(wrapped), torch.no_grad():
            wrapped(**inputs)
        wrapped.unload()

    round_trip()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        round_trip()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


# Quantised


@pytest.mark.parametrize("kind", BITS)
@every_way
def test_bitsandbytes(way: str, kind: str, tmp_path: Path) -> None:
    compute = {"bnb_4bit_compute_dtype": torch.bfloat16} if kind == "nf4" else {}
    check_bitsandbytes(way, BITS[kind] | compute, DEVICE, tmp_path)


# Processes


def launched(*arguments: str) -> str:
    """What ``accelerate launch`` of the training command prints, which ends well."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four steps of a new head and registers, on a folder of classes."""
    folder = tmp_path_factory.mktemp("classes")
    for index, scene in enumerate(SceneDataset(32)):
        (folder / str(index % 2)).mkdir(exist_ok=True)
        scene["image"].save(folder / str(index % 2) / f"{index}.png")
    flags = ["--model-name-or-path", "planted", "--train-dir", str(folder), "--num-registers", "2", "--seed", "0"]
    return ["-m", "register_adapter.train", *flags, "--max-train-steps", "4", "--checkpointing-steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["one_gpu.yaml", "ddp.yaml", "fsdp2.yaml"])
def test_the_shipped_configurations_train_with_one_process(config: str, run_flags: list[str], tmp_path: Path) -> None:
    """NCCL with a world of one: what several GPUs run, as far as one GPU can."""
    launch = ["--config_file", str(EXAMPLES / "configs" / config), "--num_processes", "1"]
    launched(*launch, *run_flags, "--output-dir", str(tmp_path))
    loaded = PeftModel.from_pretrained(load_planted_vit().model, tmp_path).eval()
    assert find_register_layer(loaded) is not None
    assert torch.isfinite(run(loaded, {"pixel_values": torch.randn(2, 3, 80, 80)})["logits"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(precision: str, run_flags: list[str], tmp_path: Path) -> None:
    launch = ["--num_processes", "1", "--mixed_precision", precision, *run_flags, "--output-dir"]
    launched(*launch, str(tmp_path / "whole"))
    middle = str(tmp_path / "whole" / "checkpoint-2")
    launched(*launch, str(tmp_path / "resumed"), "--resume-from-checkpoint", middle)
    expected, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        near(got[key], value, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["audit", "fit", "features", "eval", "probe"])
def test_commands_run_there(command: str, run_flags: list[str], tmp_path: Path) -> None:
    folder = run_flags[run_flags.index("--train-dir") + 1]
    words = {
        "audit": ["audit", "planted", folder, "--out", str(tmp_path / "out")],
        "fit": ["fit", "planted", folder, "--out", str(tmp_path / "out")],
        "features": ["features", "planted", folder, "--out", str(tmp_path / "out.safetensors")],
        "eval": ["eval", "knn", "planted", folder, "--out", str(tmp_path / "out")],
        "probe": ["probe", "planted", folder, "--out", str(tmp_path / "out")],
    }[command]
    done = subprocess.run([sys.executable, "-m", "register_adapter", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
