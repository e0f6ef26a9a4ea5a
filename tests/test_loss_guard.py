"""A loss or a gradient that is not finite ends a run before it is learned from, and what was learned before is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGE, build
from peft import AutoPeftModel
from safetensors.torch import load_file
from training_cases import flags, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter import add_registers
from register_adapter.training import ClassificationObjective, TrainArguments, train


class Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


class Failing(ClassificationObjective):
    """Fails in the batch that has one item."""

    def __init__(self, item: int, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.item, self.how = item, how

    def loss(self, model: Any, batch: Any) -> Any:
        loss, metrics = super().loss(model, batch)
        return self.how(loss) if self.item in batch["index"].tolist() else loss, metrics


FAULTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda loss: loss * math.nan, "the loss is nan"),
    "infinite": (lambda loss: loss - math.inf, "the loss is -inf"),
    "gradient": (Poisoned.apply, "the gradient is not finite"),
}


def items(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, IMAGE, IMAGE, generator=generator)
    return [{"pixel_values": image, "labels": 0, "index": index} for index, image in enumerate(pixels)]


def run(data: Any, objective: Any, out: Path | None = None, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    model = add_registers(build("vit-classifier"), 2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    options = {"max_train_steps": 8, "per_device_train_batch_size": 2, "quiet": True, "use_cpu": True, **options}
    train(model, objective, data, TrainArguments(None if out is None else str(out), **options))
    return model


@pytest.mark.parametrize("clipping", [1.0, None])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_step_is_named_and_not_taken(fault: str, clipping: float | None, tmp_path: Path) -> None:
    how, message = FAULTS[fault]
    with pytest.raises(FloatingPointError, match=rf"{message} at step \d, on item \d+; item \d+; the step") as error:
        run(items(), Failing(5, how), tmp_path / "out", max_grad_norm=clipping)
    assert "item 5" in str(error.value)
    (checkpoint,) = (tmp_path / "out").iterdir()
    assert f"{checkpoint} holds what was learned before it" in str(error.value)
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "adapter_model.safetensors").values())
    # It is the adapter of a run that ends before that step.
    last = int(checkpoint.name.rpartition("-")[2])
    whole = {"max_grad_norm": clipping, "checkpointing_steps": last}
    with pytest.raises(FloatingPointError):
        run(items(), Failing(5, how), tmp_path / "again", **whole)
    assert adapter_bytes(tmp_path / "again" / checkpoint.name) == adapter_bytes(checkpoint)


def test_of_several_batches_of_a_step_that_with_the_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 1, on item \d+; item \d+; .* nothing is saved"
    ):
        run(items(), Failing(5, FAULTS["nan"][0]), tmp_path, gradient_accumulation_steps=8)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_not_finite_is_named_alone() -> None:
    data = items()
    data[9]["pixel_values"][0, 3, 3] = math.inf
    with pytest.raises(FloatingPointError, match=r"on item 9 \(its pixel_values not finite\); the step"):
        run(data, ClassificationObjective())


def test_items_without_numbers_are_not_named() -> None:
    data = [{name: value for name, value in item.items() if name != "index"} for item in items(4)]
    data[1]["pixel_values"][:] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d; the step was not taken"):
        run(data, ClassificationObjective())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_goes_on_once_the_fault_is_mended(dropout: float, tmp_path: Path) -> None:
    options = {"max_train_steps": 8, "gradient_accumulation_steps": 2, "dropout": dropout}
    plain = run(items(), Failing(99, FAULTS["nan"][0]), tmp_path / "plain", **options)
    with pytest.raises(FloatingPointError):
        run(items(), Failing(5, FAULTS["nan"][0]), tmp_path / "out", **options)
    resumed = run(items(), Failing(99, FAULTS["nan"][0]), tmp_path / "out", **options, resume_from_checkpoint="latest")
    parameters = zip(plain.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(value, other) for value, other in parameters)


def test_the_command_names_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case, out = write_case(tmp_path / "case"), tmp_path / "out"
    loss = ClassificationObjective.loss

    def failing(self: Any, model: Any, batch: Any) -> Any:
        value, metrics = loss(self, model, batch)
        return value * (math.nan if 0 in batch["index"].tolist() else 1.0), metrics

    monkeypatch.setattr(ClassificationObjective, "loss", failing)
    words = ["--per-device-train-batch-size", "4", "--learning-rate", "0.01", "--checkpointing-steps", "1"]
    assert stopped(flags(case, out, *words)) == 1
    said = capfd.readouterr().err
    assert "ERROR: the loss is nan at step" in said
    assert f"{case / 'train' / 'cat' / '0.png'}" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    kept = sorted(out.glob("checkpoint-*"))
    if kept:
        assert AutoPeftModel.from_pretrained(kept[-1]) is not None
    results = start(flags(case, out, *words, "--resume-from-checkpoint", "latest"))
    assert results["global_step"] == 9
