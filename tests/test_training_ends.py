"""How a run ends: with the best adapter, early, with a summary, or because of a signal, and then it goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_signalled
from safetensors.torch import load_file, save_file
from training_cases import RUN, STEPS, flags, results_of, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter import HubAccessError
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit
from register_adapter.training import ClassificationObjective, TrainArguments, checkpoints, saving, train, wrap
from register_adapter.training.checkpoints import TrainState
from register_adapter.training.interruption import Interrupted, Interruption
from register_adapter.training.last_words import summarise
from register_adapter.training.selection import Selection

pytestmark = pytest.mark.slow

#: Evaluated at steps 2, 3, 4, 6 and 8. What is called best here is the largest loss, so that it comes early.
SELECTING = (*RUN, "--eval-steps", "3", "--load-best-model-at-end", "--early-stopping-patience", "9")
SELECTING += ("--greater-is-better", "true")


@pytest.fixture(autouse=True)
def _listens(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A shell's background processes ignore Ctrl-C, and a run leaves what is ignored alone."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # set by the TrainingArguments of transformers 4
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def whole(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("whole")
    start(flags(case, out, *SELECTING, "--checkpointing-steps", "1"))
    return out


def before(monkeypatch: pytest.MonkeyPatch, method: str, call: int, action: Callable[[], Any]) -> None:
    """Do something in one of an objective's calls."""
    calls, unchanged = [], getattr(ClassificationObjective, method)

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            action()
        return unchanged(*args, **kwargs)

    monkeypatch.setattr(ClassificationObjective, method, patched)


# Evaluations on the way


def test_a_run_is_evaluated_every_few_steps_and_after_each_epoch(whole: Path) -> None:
    results = results_of(whole)
    assert [evaluation["step"] for evaluation in results["evaluations"]] == [2, 3, 4, 6, 8]
    assert set(results["evaluations"][0]) == {"step", "loss", "accuracy"}
    best = max(results["evaluations"], key=lambda evaluation: evaluation["loss"])
    assert best["step"] < 4
    assert results["best"] == {"step": best["step"], "metric": "eval_loss", "value": best["loss"]}
    assert results["metrics"]["eval_loss"] == best["loss"]


def test_evaluations_on_the_way_do_not_change_what_is_learned(case: Path, whole: Path, tmp_path: Path) -> None:
    start(flags(case, tmp_path, *RUN, "--checkpointing-steps", "epoch"))
    names = [f"checkpoint-{step}/adapter_model.safetensors" for step in (2, STEPS)]
    assert [(tmp_path / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """The losses of the evaluations to come, with the registers on; the last one stays."""
    given = iter(losses)
    state = {"loss": losses[-1]}

    def evaluate(self: Any, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        state["loss"] = next(given, state["loss"])
        return {"loss": torch.full((len(batch["labels"]),), state["loss"])}

    monkeypatch.setattr(ClassificationObjective, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("more", "steps", "best"),
    [
        (("--eval-steps", "3", "--early-stopping-patience", "1"), 6, 4),
        (("--eval-steps", "3", "--early-stopping-patience", "3"), 8, 4),
        (("--eval-steps", "3", "--early-stopping-patience", "1", "--greater-is-better", "true"), 3, 2),
        (("--eval-steps", "epoch"), 8, 6),
    ],
)
def test_the_best_adapter_is_saved_and_a_run_stops_when_it_gets_no_better(
    more: tuple[str, ...], steps: int, best: int, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first is the look at the names of the metrics.
    script_losses(monkeypatch, [9.0, 0.5, 0.4, 0.2, 0.3, float("nan")])
    results = start(flags(case, tmp_path, *RUN, "--load-best-model-at-end", "--checkpointing-steps", "1", *more))
    assert (results["global_step"], results["best"]["step"]) == (steps, best)
    assert results["stopped_early"] == (steps < STEPS)
    # A loss that is not a number is no JSON.
    read = json.loads((tmp_path / "results.json").read_text("utf-8"), parse_constant=pytest.fail)
    losses = [None if math.isnan(entry["loss"]) else entry["loss"] for entry in results["evaluations"]]
    assert [entry["loss"] for entry in read["evaluations"]] == losses
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors").items():
        assert torch.equal(saved[name], value)
    assert any(
        not torch.equal(saved[name], value)
        for name, value in load_file(tmp_path / f"checkpoint-{steps}" / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize("step", [3, STEPS])
def test_a_killed_run_has_the_same_best_adapter(step: int, case: Path, whole: Path, tmp_path: Path) -> None:
    (whole / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{step}")
    try:
        start(flags(case, tmp_path, *SELECTING, "--resume-from-checkpoint", "latest"))
    finally:
        (tmp_path / f"checkpoint-{step}").rename(whole / f"checkpoint-{step}")
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    for key in ("best", "evaluations", "stopped_early", "global_step"):
        assert results_of(tmp_path)[key] == results_of(whole)[key]


@pytest.mark.parametrize("change", ["gone", "of another model", "misshapen", "not finite"])
def test_a_best_adapter_that_does_not_fit_is_refused_before_the_first_step(
    change: str, case: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a checkpoint of an earlier version, without checksums; at the end all would have been for nothing."""
    checkpoint, out = tmp_path / "checkpoint-4", tmp_path / "out"
    shutil.copytree(whole / checkpoint.name, checkpoint)
    state = json.loads((checkpoint / "train_state.json").read_text("utf-8"))
    (checkpoint / "train_state.json").write_text(json.dumps(state | {"files": {}}), "utf-8")
    best = load_file(checkpoint / "best_model.safetensors")
    (checkpoint / "best_model.safetensors").unlink()
    if change != "gone":
        name, value = next(iter(best.items()))
        values = {"misshapen": torch.zeros(1), "not finite": torch.full_like(value, torch.nan)}
        changed = best | {name: values[change]} if change in values else {"x": torch.zeros(1)}
        save_file(changed, checkpoint / "best_model.safetensors")
    assert stopped(flags(case, out, *SELECTING, "--resume-from-checkpoint", str(checkpoint))) == 1
    assert "best_model.safetensors" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval-steps", "2"), "eval_steps: 3, now 2"),
        (("--metric-for-best-model", "accuracy"), "metric_for_best_model: 'loss', now 'accuracy'"),
        (("--insert-layer", "1"), "insert_layer: None, now 1"),
        (("--augmentation", "flip"), "augmentation: None, now 'flip'"),
    ],
)
def test_a_run_goes_on_with_the_same_settings_only(
    more: tuple[str, ...], message: str, case: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ("--resume-from-checkpoint", str(whole / "checkpoint-2"))
    assert stopped(flags(case, tmp_path, *SELECTING, *resume, *more)) == 1
    assert message in capsys.readouterr().err


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ClassificationObjective, "loss", lambda *_: pytest.fail("has begun"))
    assert stopped(flags(case, tmp_path, *SELECTING, "--metric-for-best-model", "f1")) == 1
    assert "metric_for_best_model must be one of accuracy, loss, got 'f1'" in capsys.readouterr().err


def evaluated(*losses: float, patience: int | None = None, **options: Any) -> Selection:
    selection = Selection(TrainArguments(early_stopping_patience=patience, **options), TrainState())
    for step, loss in enumerate(losses, 1):
        selection.state.global_step = step
        selection.add({"loss": loss, "accuracy": loss})
    return selection


@pytest.mark.parametrize(
    ("losses", "options", "best", "exhausted"),
    [
        ((), {"patience": 1}, None, False),
        ((2.0, 1.0, 1.0), {"patience": 1}, 2, True),  # an equal one is none better
        ((2.0, float("nan"), float("inf")), {"patience": 2}, 1, True),
        ((float("nan"), 3.0), {"patience": 1}, 2, False),
        ((1.0, 2.0), {"patience": 1, "metric_for_best_model": "eval_accuracy"}, 2, False),
        ((1.0, 2.0, 3.0), {}, 1, False),
    ],
)
def test_what_is_best(losses: tuple[float, ...], options: dict[str, Any], best: int | None, exhausted: bool) -> None:
    selection = evaluated(*losses, **options)
    assert (selection.best or {}).get("step") == best
    assert selection.is_exhausted == exhausted


@pytest.mark.parametrize("step", [6, 7, STEPS])
def test_a_run_tells_the_same_wherever_it_was_resumed(case: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """Logged at steps 3, 6 and 8: the second goes on from between two, the last has nothing left to do."""
    checkpoint = str(whole / f"checkpoint-{step}")
    results = start(flags(case, tmp_path, *SELECTING, "--resume-from-checkpoint", checkpoint))
    assert results["metrics"] == results_of(whole)["metrics"]
    assert "train_loss" in results["metrics"]


# The summary


def test_a_run_says_what_came_of_it(
    case: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(whole / "checkpoint-5")
    results = start(flags(case, tmp_path, *SELECTING, "--resume-from-checkpoint", checkpoint))
    said, metrics = capsys.readouterr().out, results["metrics"]
    assert f"trained for 8 steps, resumed from {checkpoint}" in said
    on, off = metrics["eval_accuracy"], metrics["eval_registers_off_accuracy"]
    assert f"accuracy on 7 held-out images: {on:.1%} (registers off, the same head: {off:.1%})" in said
    assert f"saved is step {results['best']['step']}, with eval_loss" in said
    assert str(tmp_path) in said
    assert len(said.splitlines()) <= 6
    kept = {**results, "arguments": {**results["arguments"], "load_best_model_at_end": False}}
    for step, word in ((8, "saved is step 8, with eval_loss"), (5, "saved is the last step; best was step 5, with")):
        assert word in summarise({**kept, "best": {**results["best"], "step": step}}, "out")
    with_lora = {**results, "trained": {**results["trained"], "lora": 8}}
    assert "(registers off, all else the same: " in summarise(with_lora, "out")
    short = flags(case, tmp_path, "--max-train-steps", "1", "--overwrite-output-dir")
    start([*short, "--quiet"])
    assert capsys.readouterr().out == ""
    results = start([*short, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(results))


# Signals

ENDINGS = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}


def go_on(said: str) -> list[str]:
    """The arguments of the command that a stopped run names in its only line."""
    (line,) = [line for line in said.splitlines() if line.startswith("ERROR")]
    command = line.rpartition("with: ")[2]
    assert command.startswith("python -m register_adapter.train ")
    return shlex.split(command)[3:]


@pytest.mark.parametrize(
    ("name", "method", "call", "step"),
    [
        pytest.param("Ctrl-C", "loss", 8, 5, id="in a step"),
        pytest.param("SIGTERM", "evaluate", 4, 3, id="in an evaluation"),
        pytest.param("Ctrl-C", "evaluate", 12, STEPS, id="at the end, with the best adapter, without registers"),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on_to_the_same_adapter(
    name: str,
    method: str,
    call: int,
    step: int,
    case: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    number, code = ENDINGS[name]
    handlers = [signal.getsignal(number) for number, _ in ENDINGS.values()]
    with monkeypatch.context() as patch:
        before(patch, method, call, lambda: signal.raise_signal(number))
        # Two batches, so that an evaluation goes on after the signal.
        assert stopped(flags(case, tmp_path, *SELECTING, "--per-device-eval-batch-size", "4")) == code
    assert handlers == [signal.getsignal(number) for number, _ in ENDINGS.values()]
    said = capsys.readouterr()
    assert f"interrupted by {name} at step {step} of {STEPS}; {tmp_path}/checkpoint-{step} is complete" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (tmp_path / "results.json").exists()
    assert [path.name for path in checkpoints.find_all(tmp_path)] == [f"checkpoint-{step}"]
    words = go_on(said.err)
    assert words[-2:] == ["--resume-from-checkpoint", "latest"]
    start(words)
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert [e["step"] for e in results_of(tmp_path)["evaluations"]] == [2, 3, 4, 6, 8]


def test_before_the_first_step_there_is_nothing_to_go_on_from(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before(monkeypatch, "check_base", 1, lambda: signal.raise_signal(signal.SIGTERM))
    argv = flags(case, tmp_path, *RUN)
    assert stopped(argv) == 143
    said = capsys.readouterr().err
    assert "no checkpoint is there; start again with" in said
    assert go_on(said) == argv


def test_a_run_stopped_in_its_upload_says_that_it_is_trained_and_how_it_is_uploaded(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("launch.check_push", "trainer.check_push", "saving._open_repository"):
        monkeypatch.setattr(f"register_adapter.training.{place}", lambda *_: None)
    monkeypatch.setattr("register_adapter.training.trainer.push_run", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert stopped(flags(case, tmp_path, *RUN, "--push-to-hub", "--hub-model-id", "me/it")) == 143
    said = capsys.readouterr().err
    assert f"the adapter is trained and saved in {tmp_path}; it is uploaded by: hf upload me/it {tmp_path} ." in said
    assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize("what", ["registers", "registers+lora"])
def test_a_run_whose_upload_fails_says_that_it_is_trained_and_how_it_is_uploaded(
    what: str, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise HubAccessError("'me/it' cannot be reached; check the connection.")

    for place in ("launch.check_push", "trainer.check_push", "saving._open_repository"):
        monkeypatch.setattr(f"register_adapter.training.{place}", lambda *_: None)
    monkeypatch.setattr("register_adapter.training.saving.upload", fail)
    monkeypatch.setattr("register_adapter.tuner.peft_model.upload", fail)
    argv = flags(case, tmp_path, *RUN, "--train", what, "--quiet", "--push-to-hub", "--hub-model-id", "me/it")
    assert stopped(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'me/it' cannot be reached; check the connection; the adapter is trained and saved in" in said
    assert f"{tmp_path}; it is uploaded by: hf upload me/it {tmp_path} ." in said


def test_a_run_that_was_resumed_and_stopped_at_once_names_its_checkpoint(
    case: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before(monkeypatch, "check_base", 1, lambda: signal.raise_signal(signal.SIGINT))
    checkpoint = str(whole / "checkpoint-3")
    argv = flags(case, tmp_path, *SELECTING, f"--resume_from_checkpoint={checkpoint}", "--overwrite-output-dir")
    assert stopped(argv) == 130
    words = go_on(capsys.readouterr().err)
    assert words == [*flags(case, tmp_path, *SELECTING), "--resume-from-checkpoint", checkpoint]


def test_a_second_ctrl_c_does_not_wait(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before(monkeypatch, "loss", 6, twice)
    assert stopped(flags(case, tmp_path, *RUN, "--checkpointing-steps", "1")) == 130
    assert [path.name for path in checkpoints.find_all(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert go_on(capsys.readouterr().err)[-1] == "latest"


def test_an_ignored_signal_stays_ignored() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_a_terminal_interrupts_the_loaders_workers_too(case: Path, tmp_path: Path) -> None:
    more = ["--max-train-steps", "100000", "--dataloader-num-workers", "1", "--checkpointing-steps", "2"]
    given = flags(case, tmp_path, *more, "--checkpoints-total-limit", "1")
    run = run_signalled(signal.SIGINT, tmp_path / "checkpoint-2", "register_adapter.train", *given)
    said = run.stderr
    assert run.returncode == 130, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    (checkpoint,) = checkpoints.find_all(tmp_path)
    assert f"{checkpoint} is complete; go on with: python -m register_adapter.train" in last


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_disk_too_full_for_the_results_has_what_was_trained(
    earlier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the results of an earlier run, which another adapter has."""

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run(out: Path, steps: int = 2) -> None:
        objective = ClassificationObjective()
        torch.manual_seed(0)
        model = wrap(load_vit(), objective, num_registers=4)
        args = TrainArguments(output_dir=str(out), max_train_steps=steps, use_cpu=True, seed=7, quiet=True)
        args.overwrite_output_dir = True
        train(model, objective, SceneDataset(16, seed=1), args, image_processor=load_image_processor())

    run(tmp_path / "whole")
    for _ in range(earlier):
        run(tmp_path / "full", steps=1)
        assert adapter_bytes(tmp_path / "full") != adapter_bytes(tmp_path / "whole")
    monkeypatch.setattr(saving, "strict_json", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left .*is saved in .*without results\.json"):
        run(tmp_path / "full")
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "full").iterdir()} == names
    assert adapter_bytes(tmp_path / "full") == adapter_bytes(tmp_path / "whole")
    assert "| Training images | 16 |" in (tmp_path / "full" / "README.md").read_text()
