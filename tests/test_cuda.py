"""On a GPU: the numbers of the CPU, under checkpointing, autocast, compiled, trained, fitted and audited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from execution_cases import WAYS, gradients, registered
from families import CASES, FAMILIES, build, make_inputs
from peft import PeftModel

from register_adapter import audit, capture, fit_test_time_registers
from register_adapter.evaluation.discovery import discover
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit
from register_adapter.training import DistillationObjective, TrainArguments, train, wrap

DEVICE = "cuda"
#: Families that give a ``last_hidden_state`` with a gradient.
PLAIN = [name for name in FAMILIES if CASES[name].output == "last_hidden_state" and not CASES[name].no_gradient]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and make test-gpu")


@pytest.fixture(autouse=True)
def exact() -> Any:
    """Products in float32 without TF32, so that both devices can be compared, and no graph of another test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    precision, torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)


def on_gpu(values: Any) -> Any:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_the_cpu(name: str, way: str) -> None:
    model, inputs = registered(name, way), make_inputs(name)
    expected = gradients(model, inputs)
    got = gradients(model.to(DEVICE), on_gpu(inputs))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key].cpu(), value, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "inside capture"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-vision"])
def test_checkpointing_changes_no_gradient(name: str, way: str, reentrant: bool, recorded: bool) -> None:
    # On a GPU the backward pass, and what it computes again, runs in a thread of its own.
    model, inputs = registered(name, way).to(DEVICE), on_gpu(make_inputs(name))
    expected = gradients(model, inputs)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if recorded:
        with capture(model, attentions=False):
            got = gradients(model, inputs)
    else:
        got = gradients(model, inputs)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_autocast_keeps_the_shape_and_is_near(way: str, dtype: torch.dtype) -> None:
    model, inputs = registered("vit", way).to(DEVICE), on_gpu(make_inputs("vit"))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        with torch.autocast(DEVICE, dtype):
            got = model(**inputs).last_hidden_state
    assert got.shape == expected.shape
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("way", ["default", "deep", "neurons"])
def test_compiled(way: str) -> None:
    model, inputs = registered("vit", way).to(DEVICE), on_gpu(make_inputs("vit"))
    expected = gradients(model, inputs)
    model.zero_grad()
    got = gradients(torch.compile(model, fullgraph=True), inputs)
    for key, value in expected.items():
        torch.testing.assert_close(got[key.replace("_orig_mod.", "")], value, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loop_trains_and_what_it_saves_loads_on_a_cpu(tmp_path: Path, precision: str, checkpointing: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    aim = DistillationObjective(num_views=2)
    model = wrap(load_planted_vit().model, aim, num_registers=4)
    pixels = load_image_processor()([scene["image"] for scene in SceneDataset(32)], return_tensors="pt")["pixel_values"]
    items = [{"pixel_values": value, "index": index} for index, value in enumerate(pixels)]
    arguments = TrainArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_train_steps=6,
        learning_rate=1e-2,
        mixed_precision=precision,
        gradient_checkpointing=checkpointing,
        quiet=True,
    )
    train(model, aim, items, arguments)
    assert next(model.parameters()).device.type == DEVICE
    loaded = PeftModel.from_pretrained(load_planted_vit().model, tmp_path).eval()
    model.eval()
    with torch.no_grad():
        expected = model(pixels[:8].to(DEVICE)).logits.cpu()
        torch.testing.assert_close(loaded(pixels[:8]).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_fit_and_an_audit_say_what_they_say_on_a_cpu() -> None:
    pixels = load_image_processor()([scene["image"] for scene in SceneDataset(64)], return_tensors="pt")["pixel_values"]
    batches = list(pixels.split(16))
    reports, fits = [], []
    for device in ("cpu", DEVICE):
        model = load_planted_vit().model.to(device)
        reports.append(audit(model, batches, progress=False))
        fitted = fit_test_time_registers(model, batches, num_registers=1, progress=False)
        fits.append(fitted.peft_config["default"].register_neurons)
    assert reports[0].verdict == reports[1].verdict == "present"
    assert fits[0] == fits[1]


def test_boxes_are_those_of_the_cpu() -> None:
    model, pixels = build("dinov2"), make_inputs("dinov2")["pixel_values"][:1]
    (expected,) = discover(model, pixels)
    (got,) = discover(model.to(DEVICE), pixels.to(DEVICE))
    assert expected.box == got.box
