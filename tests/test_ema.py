"""An average of what is trained: what it is, that it is evaluated and saved, and that a run goes on with it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGE, build
from safetensors.torch import load_file, save_file
from training_cases import RUN, STEPS, flags, results_of, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter import add_registers
from register_adapter.training import AverageWeights, Callback, ClassificationObjective, TrainArguments, train
from register_adapter.training.interruption import Interrupted, Interruption

DECAY = ("--ema-decay", "0.7")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def whole(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the average, and a checkpoint and an evaluation in its middle."""
    out = tmp_path_factory.mktemp("whole") / "out"
    start(flags(case, out, *RUN, *DECAY, "--checkpointing-steps", "3", "--eval-steps", "2"))
    return out


class Record(Callback):
    """Keeps the weights after every step, and those that are evaluated."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def on_step_begin(self, model: Any, progress: float) -> None:
        if not self.weights:
            self.on_step_end(model)

    def on_step_end(self, model: Any) -> None:
        self.weights.append(trained(model))

    def on_evaluate_begin(self, model: Any) -> None:
        self.evaluated.append(trained(model))


def seeded() -> Any:
    torch.manual_seed(0)
    return add_registers(build("vit-classifier"), 2)


def trained(model: Any) -> torch.Tensor:
    (tokens,) = (value for value in model.parameters() if value.requires_grad)
    return tokens.detach().clone()  # type: ignore[no-any-return]


def items() -> list[dict[str, Any]]:
    pixels = torch.randn(8, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": index % 3, "index": index} for index, image in enumerate(pixels)]


def test_it_is_the_average_that_is_evaluated_and_left_in_the_model() -> None:
    model, record = seeded(), Record()
    args = TrainArguments(max_train_steps=4, quiet=True, use_cpu=True, eval_steps=3, gradient_accumulation_steps=2)
    average = AverageWeights(0.25)
    train(model, ClassificationObjective(), items(), args, items()[:2], callbacks=[average, record])
    first, *steps = record.weights
    expected, averages = first, []
    for number, weights in enumerate(steps, 1):
        decay = min(0.25, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weights
        averages.append(expected)
    torch.testing.assert_close(record.evaluated[0], averages[0])  # at the end of the first epoch
    torch.testing.assert_close(trained(model), averages[-1])
    assert not torch.equal(averages[-1], steps[-1])
    # Training went on from the weights themselves.
    plain, again = seeded(), Record()
    train(plain, ClassificationObjective(), items(), args, items()[:2], callbacks=[again])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(steps, again.weights[1:], strict=True))


@pytest.mark.slow
def test_the_run_goes_on_bit_for_bit(case: Path, whole: Path, tmp_path: Path) -> None:
    options = [*RUN, *DECAY, "--checkpointing-steps", "3", "--eval-steps", "2"]
    checkpoint = ["--resume-from-checkpoint", str(whole / "checkpoint-3")]
    start(flags(case, tmp_path / "again", *options, *checkpoint))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(whole)
    assert results_of(tmp_path / "again")["evaluations"] == results_of(whole)["evaluations"]
    assert results_of(whole)["objective"]["ema_decay"] == 0.7
    # What is saved is not what training goes on from.
    last = load_file(whole / "checkpoint-6" / "adapter_model.safetensors")
    state = torch.load(whole / "checkpoint-6" / "train_state.pt", weights_only=True)["callbacks"][0]
    assert state["steps"] == 6
    name = next(name for name in last if name.endswith("tokens.weight"))
    own = next(value for key, value in state["average"].items() if "tokens" in key)
    assert own.shape == last[name].shape
    assert not torch.equal(own, last[name])


@pytest.mark.slow
def test_the_best_evaluation_is_of_an_average(case: Path, whole: Path, tmp_path: Path) -> None:
    options = [*RUN, *DECAY, "--eval-steps", "2", "--load-best-model-at-end"]
    results = start(flags(case, tmp_path, *options))
    assert results["evaluations"] == results_of(whole)["evaluations"]
    best = min(results["evaluations"], key=lambda evaluation: evaluation["loss"])
    assert results["metrics"]["eval_loss"] == best["loss"]
    if best["step"] == STEPS:
        assert adapter_bytes(tmp_path) == adapter_bytes(whole)


class Stopping(ClassificationObjective):
    """Gets a signal in one of its evaluations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def evaluate(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGTERM)
        return super().evaluate(model, batch)


# The first call asks for the names of metrics, two are an evaluation; the sixth is of the model without registers.
@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_ended_in_an_evaluation_goes_on_from_its_own_weights(at: int, best: bool, tmp_path: Path) -> None:
    def run(objective: Any, out: str, **options: Any) -> torch.Tensor:
        model = seeded()
        args = TrainArguments(
            str(tmp_path / out), quiet=True, use_cpu=True, ema_decay=0.5, max_train_steps=2, eval_steps=1, **options
        )
        args.per_device_eval_batch_size, args.load_best_model_at_end = 4, best
        with Interruption() as interruption:
            train(model, objective, items(), args, items(), interruption=interruption)
        return trained(model)

    plain = run(ClassificationObjective(), "plain")
    with pytest.raises(Interrupted):
        run(Stopping(at), "out")
    assert torch.equal(run(ClassificationObjective(), "out", resume_from_checkpoint="latest"), plain)


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "1.5"])
def test_a_decay_that_makes_no_sense_is_refused(
    value: str, case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stopped(flags(case, tmp_path / "out", f"--ema-decay={value}")) == 2
    assert "ema_decay must be" in capfd.readouterr().err


def test_another_decay_is_another_run(case: Path, whole: Path, tmp_path: Path, capfd: Any) -> None:
    words = [*RUN, "--checkpointing-steps", "3", "--eval-steps", "2", "--resume-from-checkpoint"]
    for decay in ((), ("--ema-decay", "0.8")):
        assert stopped(flags(case, tmp_path / "out", *words, str(whole / "checkpoint-3"), *decay)) == 1
        assert "written by a run with other settings (objective:" in capfd.readouterr().err
    assert json.loads((whole / "results.json").read_text())["global_step"] == STEPS


# What is saved as the best


class Statistics(Callback):
    """Keeps the running mean of the head's BatchNorm as it is evaluated, by step."""

    def __init__(self) -> None:
        self.means: list[torch.Tensor] = []

    def on_evaluate_begin(self, model: Any) -> None:
        self.means.append(
            next(value for key, value in model.named_buffers() if key.endswith("default.0.running_mean")).clone()
        )


def test_the_best_head_has_the_running_statistics_that_it_was_measured_with(tmp_path: Path) -> None:
    """They are no parameters, and later steps move them too."""
    best = []
    for greater in (False, True):  # the smallest or the largest loss comes before the last step
        torch.manual_seed(0)
        base: Any = build("vit-classifier")
        base.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(base.config.hidden_size), base.classifier)
        model, record = add_registers(base, 2, modules_to_save=["classifier"]), Statistics()
        args = TrainArguments(str(tmp_path / str(greater)), quiet=True, use_cpu=True, max_train_steps=5, eval_steps=1)
        args.load_best_model_at_end, args.greater_is_better = True, greater
        best.append(train(model, ClassificationObjective(), items(), args, items(), callbacks=[record])["best"]["step"])
        kept = next(value for key, value in model.named_buffers() if key.endswith("default.0.running_mean"))
        assert torch.equal(kept, record.means[best[-1] - 1])
        assert all(not torch.equal(kept, mean) for step, mean in enumerate(record.means[:5], 1) if step != best[-1])
    assert min(best) < 5


class Earliest(ClassificationObjective):
    """One whose best model, by its metric ``early``, is the first that is evaluated."""

    calls = 0

    def evaluate(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        metrics = super().evaluate(model, batch)
        return metrics | {"early": torch.full_like(metrics["loss"], -self.calls)}


class ByEpoch(torch.utils.data.Dataset[Any]):
    """Other pictures in every epoch, as with augmentation."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(items())

    def __getitem__(self, index: int) -> Any:
        item = items()[index]
        return item | {"pixel_values": item["pixel_values"].roll(self.epoch, 0)}


def test_evaluations_of_the_training_set_leave_its_epoch_alone() -> None:
    """Each begins with the first epoch, and the batches that came after it were of the first epoch too."""
    found = []
    for same in (True, False):
        data, model = ByEpoch(), seeded()
        args = TrainArguments(max_train_steps=8, quiet=True, use_cpu=True, eval_steps=1, per_device_train_batch_size=2)
        found.append((train(model, ClassificationObjective(), data, args, data if same else ByEpoch()), model))
    (first, own), (second, other) = found
    assert first["evaluations"] == second["evaluations"]
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


def test_a_best_head_without_its_statistics_is_measured_as_it_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints of earlier versions lack them."""

    def model() -> Any:
        torch.manual_seed(0)
        base: Any = build("vit-classifier")
        base.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(base.config.hidden_size), base.classifier)
        return add_registers(base, 2, modules_to_save=["classifier"])

    args = TrainArguments(str(tmp_path), quiet=True, use_cpu=True, max_train_steps=4, eval_steps=1)
    args.load_best_model_at_end, args.greater_is_better, args.checkpointing_steps = True, True, 3
    args.metric_for_best_model = "early"
    assert train(model(), Earliest(), items(), args, items())["best"]["step"] == 1
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    weights = load_file(checkpoint / "best_model.safetensors")
    kept = {name: value for name, value in weights.items() if ".running_" not in name}
    save_file(kept, checkpoint / "best_model.safetensors")
    state = json.loads((checkpoint / "train_state.json").read_text())
    (checkpoint / "train_state.json").write_text(json.dumps(state | {"files": {}}))
    args.resume_from_checkpoint = "latest"
    trained, objective = model(), Earliest()
    objective.calls = 100
    results = train(trained, objective, items(), args, items())
    assert results["best"]["step"] == 1
    assert "running_mean" in caplog.text
    batch = ClassificationObjective().collate([items()[index] for index in range(len(items()))])
    with torch.no_grad():
        loss = ClassificationObjective().evaluate(trained.eval(), batch)["loss"].mean().item()
    assert results["metrics"]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert results["evaluations"][0]["loss"] != pytest.approx(loss, abs=1e-3)
