"""The training loop: what is trained and saved, exact resumption after SIGKILL, two processes, flags, tracking."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from hub_server import HubServer
from huggingface_hub import HfApi
from peft import AutoPeftModel
from processes import launched_as, run_killed, run_module, run_two_processes
from safetensors.torch import load_file
from training_helpers import ROOT, adapter_bytes, write_photographs, write_vit
from transformers import AutoImageProcessor, ViTForImageClassification

from register_adapter import add_registers
from register_adapter.data import ProcessedDataset
from register_adapter.testbed import LABELS, SceneDataset, load_image_processor
from register_adapter.training import (
    OBJECTIVES,
    ClassificationObjective,
    TrainArguments,
    checkpoints,
    load_base,
    train,
    wrap,
)
from register_adapter.training.checkpoints import CheckpointError, read_state
from register_adapter.training.launch import main

pytestmark = pytest.mark.slow

CLASSES = ["cat", "coffee", "flower"]
TOKENS = "base_model.model.vit.registers.register_adapter_tokens.weight"


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("model") / "vit", ["a", "b"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    return write_photographs(folder, "--size", "48", "--crops", "10", "--classes", *CLASSES)


def flags(vit: Path, photos: Path, out: Path, *more: str) -> list[str]:
    command = ["--model_name_or_path", str(vit), "--output_dir", str(out), "--use_cpu", "--train_dir"]
    return [*command, str(photos / "train"), "--validation_dir", str(photos / "validation"), *more]


def read_results(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


# What is trained and saved


@pytest.fixture(scope="module")
def trained(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where registers and a new head were trained, and the results. The base on disk stays what it was."""
    before = {file.name: file.read_bytes() for file in vit.iterdir()}
    out = tmp_path_factory.mktemp("trained")
    results = main(flags(vit, photos, out, "--max_train_steps", "6", "--seed", "3"))
    assert {file.name: file.read_bytes() for file in vit.iterdir()} == before
    return out, results


def test_the_results_say_what_was_trained(trained: tuple[Path, dict[str, Any]]) -> None:
    out, results = trained
    assert read_results(out) == json.loads(json.dumps(results))
    assert results["global_step"] == 6
    assert results["trainable_parameters"] == 4 * 32 + 3 * 32 + 3
    assert results["train_samples"] == 30
    assert results["eval_samples"] == 6
    assert results["metrics"]["eval_accuracy"] in [index / 6 for index in range(7)]
    assert results["images_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__


def test_registers_and_a_new_head_are_saved_with_a_card(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    saved = load_file(out / "adapter_model.safetensors")
    assert sorted(tuple(tensor.shape) for tensor in saved.values()) == [(3,), (3, 32), (4, 32)]
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 32
    card = (out / "README.md").read_text()
    assert "eval_accuracy" in card
    assert "train" in card


def test_what_was_trained_is_taken_off_the_base(trained: tuple[Path, dict[str, Any]], vit: Path) -> None:
    model = AutoPeftModel.from_pretrained(trained[0]).eval()
    x = torch.rand(2, 3, 32, 32)
    base = ViTForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        assert model(pixel_values=x).logits.shape == (2, 3)
        with model.disable_adapter():
            assert torch.equal(model(pixel_values=x).logits, base(pixel_values=x).logits)


def test_evaluation_is_that_of_the_saved_adapter(vit: Path, photos: Path, tmp_path: Path) -> None:
    from register_adapter.data import read_image_folder

    results = main(flags(vit, photos, tmp_path, "--max_train_steps", "4", "--per_device_eval_batch_size", "4"))
    model = AutoPeftModel.from_pretrained(tmp_path).eval()
    data = ProcessedDataset(read_image_folder(photos / "validation"), AutoImageProcessor.from_pretrained(vit))
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=data[index]["pixel_values"][None]).logits for index in range(6)])
    labels = torch.tensor([data[index]["labels"] for index in range(6)])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert results["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["metrics"]["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_a_frozen_head_is_kept_and_labels_are_found_by_name(photos: Path, tmp_path: Path) -> None:
    vit = write_vit(tmp_path / "vit", ["dog", "flower", "cat", "coffee"])
    results = main(flags(vit, photos, tmp_path / "out", "--max_train_steps", "2", "--freeze_head"))
    assert results["trainable_parameters"] == 4 * 32
    assert list(load_file(tmp_path / "out" / "adapter_model.safetensors")) == [TOKENS]
    objective = ClassificationObjective(CLASSES, freeze_head=True)
    wrap(ViTForImageClassification.from_pretrained(vit), objective)
    items = [{"pixel_values": torch.zeros(3, 4, 4), "labels": label} for label in (0, 1, 2)]
    assert objective.collate(items)["labels"].tolist() == [2, 3, 1]


def test_a_function_that_processes_images_costs_no_result(tmp_path: Path) -> None:
    """A torchvision transform, say, which has no file to be saved in."""
    vit = write_vit(tmp_path / "vit", list(LABELS))
    scenes = SceneDataset(8, size=32, split=None)
    args = TrainArguments(output_dir=str(tmp_path / "out"), max_train_steps=1, use_cpu=True, quiet=True)
    model = add_registers(ViTForImageClassification.from_pretrained(vit))
    objective = ClassificationObjective(freeze_head=True)
    processor = AutoImageProcessor.from_pretrained(vit)
    process = functools.partial(processor, return_tensors="pt")
    train(model, objective, scenes, args, image_processor=lambda image: process(image).pixel_values[0])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "results.json"} <= written
    assert "preprocessor_config.json" not in written


def test_registers_alone_learn_in_process_on_scenes(tmp_path: Path) -> None:
    vit = write_vit(tmp_path / "vit", list(LABELS), dropout=0.0, std=0.2)
    base = ViTForImageClassification.from_pretrained(vit)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    scenes = SceneDataset(8, size=32, split=None)
    model = add_registers(base)
    knobs = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, "use_cpu": True}
    objective = ClassificationObjective(freeze_head=True)
    losses = [
        train(model, objective, scenes, TrainArguments(max_train_steps=steps, **knobs), scenes)["metrics"]["eval_loss"]
        for steps in (1, 30)
    ]
    assert losses[1] < losses[0] - 0.1
    assert not model.training
    for name, tensor in base.state_dict().items():
        assert "registers" in name or torch.equal(tensor, weights[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit"]


def test_registers_are_exempt_from_weight_decay(vit: Path, photos: Path, tmp_path: Path) -> None:
    decay = ["--max_train_steps", "3", "--lr_scheduler_type", "constant", "--learning_rate", "1e-3"]
    main(flags(vit, photos, tmp_path, *decay, "--weight_decay", "1000"))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    # Learning rate times decay is 1: a decayed matrix is wiped out in each step, up to the step itself.
    assert saved["base_model.model.classifier.weight"].abs().max() <= 1.1e-3
    assert saved[TOKENS].std() > 0.015


def test_mixed_precision_keeps_the_adapter_in_float32(vit: Path, photos: Path, tmp_path: Path) -> None:
    results = main(flags(vit, photos, tmp_path, "--max_train_steps", "2", "--mixed_precision", "bf16"))
    assert results["hardware"]["mixed_precision"] == "bf16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


# Checkpoints

#: Dropout, shuffling, accumulation over an epoch that does not divide, and reading in workers.
RUN = ["--num_train_epochs", "8", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3"]
RUN += ["--learning_rate", "0.01", "--lr_scheduler_type", "cosine", "--num_warmup_steps", "3", "--logging_steps", "4"]
STEPS = 8 * 3  # 30 images are 8 batches, 3 optimiser steps, the last of 2 batches


@pytest.fixture(scope="module")
def uninterrupted(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert main(flags(vit, photos, out, *RUN))["global_step"] == STEPS
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def newest(out: Path) -> int:
    saved = checkpoints.find_all(out)
    return int(saved[-1].name.rpartition("-")[2]) if saved else 0


def kill_three_times(command: list[str], out: Path) -> int:
    """Trains until SIGKILL at a step and a moment drawn at random, three times; returns the last step killed at."""
    seed = random.SystemRandom().randrange(10**6)
    logging.getLogger(__name__).warning("seed of the kills: %d", seed)  # shown by pytest if the test fails
    rng = random.Random(seed)
    step = 0
    for _ in range(3):
        step = rng.randint(max(step, newest(out)) + 1, max(step, newest(out)) + 5)
        given = (out / f"checkpoint-{step}", "register_adapter.train", *command)
        run_killed(*given, delay=rng.uniform(0, 0.05))
        assert newest(out) >= step
    return step


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("workers", "limit"), [(0, None), (2, 1)])
def test_killed_again_and_again_and_resumed_bit_for_bit(
    vit: Path, photos: Path, uninterrupted: Path, tmp_path: Path, workers: int, limit: int | None
) -> None:
    more = [*RUN, "--checkpointing_steps", "1", "--dataloader_num_workers", str(workers)]
    more += ["--resume_from_checkpoint", "latest"]
    more += ["--checkpoints_total_limit", str(limit)] if limit else []
    step = kill_three_times(flags(vit, photos, tmp_path, *more), tmp_path)
    assert not (tmp_path / "results.json").exists()
    for left in tmp_path.glob(".register_adapter.*"):  # a young one without its lock could be a living process's
        os.utime(left, (0, 0))
    results = main(flags(vit, photos, tmp_path, *more))
    assert results["resumed_from_step"] >= step
    assert results["global_step"] == STEPS
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted)
    assert results["metrics"] == read_results(uninterrupted)["metrics"]
    assert len(checkpoints.find_all(tmp_path)) == (limit or STEPS)
    assert not list(tmp_path.glob(".register_adapter.*")), "half-written checkpoints were left behind"


def test_killed_and_resumed_as_a_user_would(
    vit: Path, photos: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = flags(vit, photos, tmp_path, *RUN, "--checkpointing_steps", "1")
    run_killed(tmp_path / "checkpoint-7", "register_adapter.train", *given)
    main([*given, "--resume_from_checkpoint", "latest"])
    assert "images/s" in capfd.readouterr().err
    assert read_results(tmp_path)["resumed_from_step"] >= 7
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted)


def test_a_checkpoint_at_an_epochs_end_and_by_path(
    vit: Path, photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    main(flags(vit, photos, tmp_path / "a", *RUN, "--checkpointing_steps", "epoch"))
    saved = checkpoints.find_all(tmp_path / "a")
    assert [path.name for path in saved] == [f"checkpoint-{step}" for step in range(3, STEPS + 1, 3)]
    AcceleratorState._reset_state(reset_partial_state=True)
    more = [*RUN, "--resume_from_checkpoint", str(saved[2])]
    assert main(flags(vit, photos, tmp_path / "b", *more))["resumed_from_step"] == 9
    assert adapter_bytes(tmp_path / "b") == adapter_bytes(uninterrupted)


@pytest.fixture(scope="module")
def checkpoint(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpointed")
    main(flags(vit, photos, out, "--max_train_steps", "2", "--checkpointing_steps", "2"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return out / "checkpoint-2"


def copy_run(checkpoint: Path, target: Path) -> Path:
    (target / checkpoint.name).mkdir(parents=True)
    for file in checkpoint.iterdir():
        (target / checkpoint.name / file.name).write_bytes(file.read_bytes())
    return target / checkpoint.name


def test_a_checkpoint_holds_no_base(vit: Path, checkpoint: Path) -> None:
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size < 40_000 < (vit / "model.safetensors").stat().st_size
    assert not [
        key for key in load_file(checkpoint / "adapter_model.safetensors") if "encoder" in key or "layer" in key
    ]
    tensors = torch.load(checkpoint / "train_state.pt", weights_only=True)
    assert len(tensors["optimizer"]["state"]) == 3


def test_a_checkpoint_that_fails_leaves_the_last_one(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def fail_second(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_second)
    with pytest.raises(SystemExit):
        main(flags(vit, photos, tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "1"))
    latest = checkpoints.find("latest", tmp_path)
    assert latest is not None
    assert latest.name == "checkpoint-1"
    assert {file.name for file in latest.iterdir()} >= {"train_state.pt", "adapter_model.safetensors"}


def test_latest_without_a_checkpoint_starts_anew(
    vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-9").mkdir()  # without train_state.json it is none
    results = main(flags(vit, photos, tmp_path, "--max_train_steps", "1", "--resume_from_checkpoint", "latest"))
    assert results["resumed_from_step"] is None
    assert results["global_step"] == 1


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def test_a_checkpoint_is_never_unpickled(
    vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = copy_run(checkpoint, tmp_path / "run")
    torch.save({"optimizer": _Payload()}, copied / "train_state.pt")
    refused(flags(vit, photos, tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest"), 1)
    assert not (tmp_path / "unpickled").exists()


def test_a_damaged_checkpoint_is_refused(
    vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    for file in ("train_state.pt", "train_state.json", "adapter_model.safetensors"):
        copied = copy_run(checkpoint, tmp_path / file)
        whole = (copied / file).read_bytes()
        (copied / file).write_bytes(whole[: len(whole) // 2])
        refused(flags(vit, photos, tmp_path / file, *more), 1)
        assert file in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("global_step", value) for value in (float("nan"), 10**30, -3, 1.5, "a")),
        *(("epoch", value) for value in (-1, True)),
        *(("step", value) for value in (-5, None)),
        *(("settings", value) for value in (None, [])),
        *(("evaluations", value) for value in (5, [1], [{}])),
    ],
)
def test_numbers_that_no_run_has_are_refused(name: str, value: Any, checkpoint: Path, tmp_path: Path) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    state = json.loads((copied / "train_state.json").read_text())
    read_state(copied, state["settings"])
    (copied / "train_state.json").write_text(json.dumps({**state, name: value}))
    with pytest.raises(CheckpointError, match=r"train_state\.json is damaged: .*Start anew in another output_dir"):
        read_state(copied, state["settings"])


def test_changed_tensors_of_a_checkpoint_are_damaged(checkpoint: Path, tmp_path: Path) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    settings = json.loads((copied / "train_state.json").read_text())["settings"]
    tensors = torch.load(copied / "train_state.pt", weights_only=True)
    torch.save({**tensors, "optimizer": {**tensors["optimizer"], "state": {}}}, copied / "train_state.pt")
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-0")
    with pytest.raises(
        CheckpointError, match=r"train_state\.pt is not the file .*another checkpoint: \['checkpoint-0'\]"
    ):
        read_state(copied, settings)


@pytest.mark.parametrize(
    "changed", [{"epoch": 10**9}, {"step": 7}, {"evaluations": [{"step": 1}]}], ids=["epoch", "step", "evaluations"]
)
def test_changed_numbers_of_a_checkpoint_are_damaged(changed: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    state = json.loads((copied / "train_state.json").read_text())
    (copied / "train_state.json").write_text(json.dumps({**state, **changed}))
    with pytest.raises(CheckpointError, match=r"train_state\.json is not the file that the run wrote"):
        read_state(copied, state["settings"])


@pytest.mark.parametrize("files", [True, False], ids=["checksums", "older"])
def test_a_checkpoint_of_several_adapters_without_its_list_is_refused(
    files: bool, vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It went on with fresh adapters, in silence."""
    more = ["--train", "registers+lora", "--max_train_steps", "2", "--checkpointing_steps", "1"]
    main(flags(vit, photos, tmp_path, *more))
    state = json.loads((tmp_path / "checkpoint-1" / "train_state.json").read_text())
    assert {"adapters.json", "lora/adapter_config.json"} < set(state["files"])
    (tmp_path / "checkpoint-1" / "adapters.json").unlink()
    if not files:
        del state["files"]
        (tmp_path / "checkpoint-1" / "train_state.json").write_text(json.dumps(state))
    refused(flags(vit, photos, tmp_path, *more, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")), 1)
    assert "adapters.json" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["random", "shape", "complex", "nan"])
def test_states_that_do_not_fit_are_refused_before_the_first_step(
    wrong: str, vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    tensors = torch.load(copied / "train_state.pt", weights_only=True)
    changes: dict[str, Any] = {"shape": lambda x: x[:1], "complex": lambda x: x * 1j, "nan": lambda x: x * math.nan}
    if wrong == "random":
        tensors["random"][0]["torch"] = tensors["random"][0]["torch"][:10]
    else:
        moments = tensors["optimizer"]["state"][0]
        moments.update({name: changes[wrong](x) for name, x in moments.items() if x.dim()})
    torch.save(tensors, copied / "train_state.pt")
    state = json.loads((copied / "train_state.json").read_text())
    del state["files"]  # as older releases wrote it
    (copied / "train_state.json").write_text(json.dumps(state))
    refused(flags(vit, photos, tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest"), 1)
    assert "train_state.pt cannot be loaded" in capsys.readouterr().err


def _group(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors["optimizer"]["param_groups"][0].update(change)


def _means(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors["callbacks"][-1]["processes"][0]["sums"].update(change)


STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no moments": lambda tensors: tensors["optimizer"]["state"][0].clear(),
    "a moment for all": lambda tensors: tensors["optimizer"]["state"][0].update(exp_avg=torch.ones(())),
    "steps below 0": lambda tensors: tensors["optimizer"]["state"][0].update(step=torch.tensor(-5.0)),
    "squares below 0": lambda tensors: tensors["optimizer"]["state"][0]["exp_avg_sq"].fill_(-1),
    "betas": _group(betas=5),
    "eps": _group(eps="x"),
    "lr": _group(lr=None),
    "initial_lr": _group(initial_lr=math.nan),
    "weight_decay": _group(weight_decay=[0.1]),
    "capturable": _group(capturable=3.5),
    "no lr": lambda tensors: tensors["optimizer"]["param_groups"][0].pop("lr"),
    "last_epoch": lambda tensors: tensors["scheduler"].update(last_epoch="1"),
    "base_lrs": lambda tensors: tensors["scheduler"].update(base_lrs=[]),
    "sums of a shape": _means(loss=torch.zeros(7, 7)),
    "sums not finite": _means(loss=torch.tensor(math.nan)),
}


@pytest.mark.parametrize("wrong", STATES)
def test_what_goes_on_in_no_step_is_refused_before_the_first(
    wrong: str, vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    tensors = torch.load(copied / "train_state.pt", weights_only=True)
    STATES[wrong](tensors)
    torch.save(tensors, copied / "train_state.pt")
    state = json.loads((copied / "train_state.json").read_text())
    (copied / "train_state.json").write_text(json.dumps(state | {"files": {}}))  # as older releases wrote it
    before = listing(tmp_path / "run")
    refused(flags(vit, photos, tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest"), 1)
    assert "train_state.pt cannot be loaded" in capsys.readouterr().err
    assert listing(tmp_path / "run") == before


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "evaluations",
    [
        5,
        [{}],
        [{"step": "x", "loss": 1.0}],
        [{"step": None, "loss": 1.0}],
        [{"step": 1, "loss": None}],
        [{"step": 1, "loss": [1]}],
        [{"step": 1}],
    ],
    ids=str,
)
def test_evaluations_that_are_none_are_refused(
    evaluations: Any, vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_run(checkpoint, tmp_path / "run")
    state = json.loads((copied / "train_state.json").read_text())
    (copied / "train_state.json").write_text(json.dumps(state | {"files": {}, "evaluations": evaluations}))
    refused(flags(vit, photos, tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "latest"), 1)
    assert re.search("evaluations? (must|of)", capsys.readouterr().err)


def test_other_settings_are_refused_on_resumption(
    vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(copy_run(checkpoint, tmp_path / "run"))
    more = ["--max_train_steps", "2", "--resume_from_checkpoint", run, "--seed", "1", "--learning_rate", "0.5"]
    refused(flags(vit, photos, tmp_path / "new", *more), 1)
    message = capsys.readouterr().err
    assert "learning_rate: 0.001, now 0.5" in message
    assert "seed: 0, now 1" in message
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoints.find(str(tmp_path), tmp_path / "run")


def test_a_run_of_another_length_is_told_and_is_the_length_from_then_on(
    vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(checkpoint, tmp_path)  # of two steps
    told = []
    for steps in (4, 4, 3):
        more = ["--max_train_steps", str(steps), "--checkpointing_steps", "3", "--resume_from_checkpoint", "latest"]
        main(flags(vit, photos, tmp_path, *more))
        told += [line for line in capsys.readouterr().err.splitlines() if "another length" in line]
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [line.partition("(")[2].partition(")")[0] for line in told] == [
        "max_train_steps: 2, now 4",
        "max_train_steps: 4, now 3",
    ]


def test_checkpoints_of_an_earlier_run_are_never_mixed_with_new_ones(
    vit: Path, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_run(checkpoint, tmp_path)
    refused(flags(vit, photos, tmp_path, "--max_train_steps", "1"), 2)
    assert "holds checkpoints of an earlier run (checkpoint-2)" in capsys.readouterr().err
    assert copied.exists()
    main(flags(vit, photos, tmp_path, "--max_train_steps", "1", "--overwrite_output_dir"))
    assert not copied.exists()


def test_checkpoints_of_other_programs_are_not_replaced(
    vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped run of transformers' Trainer has nothing else in its folder; the first of ours took its place."""
    theirs = tmp_path / "checkpoint-1"
    theirs.mkdir()
    (theirs / "trainer_state.json").write_text("{}")
    more = ["--max_train_steps", "1", "--checkpointing_steps", "1"]
    refused(flags(vit, photos, tmp_path, *more), 2)
    assert "holds checkpoint-1, which another program wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint-1", "trainer_state.json"]
    main(flags(vit, photos, tmp_path, *more, "--overwrite_output_dir"))
    assert (theirs / "train_state.json").is_file()


# Two processes


def test_accelerate_launches_what_the_tests_run_two_processes_with(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, pathlib\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK']).write_text(json.dumps(dict(os.environ)))\n"
    )
    launch = ["--main_process_port", "0", "--config_file", ROOT / "examples" / "configs" / "cpu.yaml"]
    done = run_module("accelerate.commands.launch", *launch, script)
    assert done.returncode == 0, done.stderr
    for rank, ours in enumerate(launched_as(29500)):
        theirs = json.loads((tmp_path / str(rank)).read_text())
        del ours["MASTER_PORT"]  # is drawn
        assert ours.items() <= theirs.items()


def test_processes_that_see_other_images_are_told_so(vit: Path, photos: Path, tmp_path: Path) -> None:
    here, there = shutil.copytree(photos, tmp_path / "0"), shutil.copytree(photos, tmp_path / "1")
    next(path for path in sorted(there.rglob("*")) if path.is_file()).unlink()
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom register_adapter.training.launch import main\n"
        f"main([word.replace({str(here)!r}, {str(tmp_path)!r} + '/' + os.environ['RANK']) for word in sys.argv[1:]])\n"
    )
    main_one, other = run_two_processes(script, *flags(vit, here, tmp_path / "out", "--max_train_steps", "1"))
    assert (main_one.returncode, other.returncode) == (1, 1)
    assert re.search(r"ERROR: process 1 has train_samples \d+, the main one \d+", main_one.stderr)


def test_the_process_that_is_left_says_how_to_go_on(vit: Path, photos: Path, tmp_path: Path) -> None:
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\nfrom register_adapter.training import loop\n"
        "from register_adapter.training.launch import main\n"
        "inherited = loop.Loop.save_checkpoint\n"
        "def save_checkpoint(self):\n"
        "    inherited(self)\n"
        "    if os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.Loop.save_checkpoint = save_checkpoint\nmain(sys.argv[1:])\n"
    )
    run = flags(vit, photos, out, "--max_train_steps", "4", "--checkpointing_steps", "1")
    left, killed = run_two_processes(script, *run)
    assert (left.returncode, killed.returncode) == (1, -9)
    assert "Traceback" not in left.stderr
    assert re.search(
        r"ERROR: another process of this run has ended.*gloo.*; \S+/checkpoint-1 is complete; go on", left.stderr
    )
    assert "--resume-from-checkpoint latest" in left.stderr


def test_two_processes_train_and_save_what_one_does(photos: Path, tmp_path: Path) -> None:
    vit = write_vit(tmp_path / "vit", ["a", "b"], dropout=0.0)
    common = ["--num_train_epochs", "2", "--seed", "5", "--learning_rate", "0.01"]
    main(flags(vit, photos, tmp_path / "one", *common, "--per_device_train_batch_size", "10"))
    more = [*common, "--per_device_train_batch_size", "5", "--checkpointing_steps", "2"]
    for process in run_two_processes(ROOT / "tests" / "two_processes.py", *flags(vit, photos, tmp_path / "two", *more)):
        assert process.returncode == 0, process.stderr
    alone, shared = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert shared["hardware"]["num_processes"] == 2
    assert shared["global_step"] == alone["global_step"] == 6
    # Both replicas hold the same weights, and those were saved.
    replicas = [load_file(tmp_path / "two" / f"replica-{rank}.safetensors") for rank in (0, 1)]
    saved = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert torch.equal(replicas[0]["registers"], replicas[1]["registers"])
    assert torch.equal(replicas[0]["registers"], saved[TOKENS])
    # Two processes with batches of 5 see what one sees with batches of 10.
    for key, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-4, rtol=1e-3)
    # Six images on two processes: each counts once.
    assert shared["eval_samples"] == 6
    assert shared["metrics"]["eval_loss"] == pytest.approx(alone["metrics"]["eval_loss"], abs=1e-4)
    assert AutoPeftModel.from_pretrained(tmp_path / "two") is not None
    assert len(torch.load(tmp_path / "two" / "checkpoint-6" / "train_state.pt", weights_only=True)["random"]) == 2


# Flags


def refused(command: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == code


WRONG = [
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
    (["--learning_rate", "nan"], "learning_rate must be a finite number of at least 0, got nan"),
    (["--learning_rate", "fast"], "invalid float value"),
    (["--max_train_steps", "-1"], "max_train_steps must be at least 1, got -1"),
    (["--checkpointing_steps", "often"], "checkpointing_steps must be a number of steps or 'epoch', got 'often'"),
    (["--checkpointing_steps", "0"], "checkpointing_steps must be at least 1, got 0"),
    (["--checkpoints_total_limit", "0"], "checkpoints_total_limit must be at least 1, got 0"),
    (["--lr_scheduler_type", "spiral"], "lr_scheduler_type must be one of linear"),
    (["--mixed_precision", "int4"], "invalid choice: 'int4'"),
    (["--num_registers", "0"], "num_registers must be at least 1, got 0"),
    (["--objective", "wishing"], "invalid choice: 'wishing'"),
    (["--push_to_hub"], "push_to_hub needs hub_model_id"),
    (["--dataset_name", "beans"], "give either --dataset-name or --train-dir, found both"),
    (["--train_val_split", "1.5"], "--train-val-split must lie between 0 and 1, got 1.5"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_wrong_flags(
    wrong: list[str], message: str, vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(flags(vit, photos, tmp_path / "out", *wrong), 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_token_on_the_command_line_is_not_repeated(
    vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        refused(flags(vit, photos, tmp_path, *words), 2)
        shown = capsys.readouterr()
        assert "--hub_token" in shown.err
        assert "hf_secret" not in shown.err + shown.out


def test_wrong_paths_and_heads(vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        f"{tmp_path / 'none' / 'train'} is not a folder": (vit, tmp_path / "none", []),
        "there is no such folder": (tmp_path / "nothing", photos, []),
        "such names are OpenCLIP's": ("local-dir:models/open_clip", photos, []),
        "lacks 3 of the data set's classes": (vit, photos, ["--freeze_head"]),
        "has no head 'fc'": (vit, photos, ["--head", "fc"]),
        "report_to must be one of": (vit, photos, ["--with_tracking", "--report_to", "paper"]),
        "is not a checkpoint": (vit, photos, ["--resume_from_checkpoint", str(photos)]),
    }
    for message, (model, data, more) in cases.items():
        refused(flags(model, data, tmp_path / "out", "--max_train_steps", "1", *more), 1)
        assert message in capsys.readouterr().err
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_frozen_head_that_the_checkpoint_lacks_is_refused(vit: Path, tmp_path: Path) -> None:
    ViTForImageClassification.from_pretrained(vit).vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no fitting weights for \['classifier.bias', 'classifier.weight'\]"):
        load_base(ClassificationObjective(freeze_head=True), str(tmp_path))
    assert load_base(ClassificationObjective(CLASSES), str(tmp_path)).classifier.out_features == 3


def test_what_train_refuses(vit: Path) -> None:
    objective, args = ClassificationObjective(), TrainArguments(max_train_steps=1, use_cpu=True)
    model = add_registers(ViTForImageClassification.from_pretrained(vit))
    scenes = SceneDataset(2, size=32, split=None)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        train(model, objective, SceneDataset(0, split=None), args)
    with pytest.raises(ValueError, match="must have the key 'image' or 'pixel_values', found"):
        train(model, objective, [{"text": "x"}], args)
    pair = scenes[0]["image"], scenes[0]["label"]  # an item of a torchvision ImageFolder
    for items in ([pair], ProcessedDataset([pair], load_image_processor())):
        with pytest.raises(ValueError, match=r"items of train_dataset must be .*tuple of Image, int"):
            train(model, objective, items, args)
    for images in (None, "photos", iter(scenes)):
        with pytest.raises(ValueError, match="train_dataset must be a data set with len"):
            train(model, objective, images, args)
    with pytest.raises(ValueError, match="need a number 'label'"):
        train(
            model, objective, [{"image": scenes[0]["image"], "labels": 0}], args, image_processor=load_image_processor()
        )
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        train(model, objective, scenes, args)
    assert OBJECTIVES["classification"] is ClassificationObjective


def test_a_loss_that_explodes_stops_the_run_and_saves_nothing(vit: Path, photos: Path, tmp_path: Path) -> None:
    class Exploding(ClassificationObjective):
        def loss(self, model: Any, batch: Any) -> Any:
            loss, metrics = super().loss(model, batch)
            return loss * float("inf"), metrics

    model = add_registers(ViTForImageClassification.from_pretrained(vit))
    args = TrainArguments(output_dir=str(tmp_path), max_train_steps=1, use_cpu=True)
    with pytest.raises(FloatingPointError, match="the loss is inf at step 1"):
        train(model, Exploding(), [{"pixel_values": torch.rand(3, 32, 32), "labels": 0}], args)
    assert not list(tmp_path.iterdir())


# Tracking and the example


def test_tensorboard_gets_the_losses(vit: Path, photos: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ["--max_train_steps", "4", "--logging_steps", "2", "--with_tracking", "--report_to", "tensorboard"]
    results = main(flags(vit, photos, tmp_path, *more))
    (file,) = (tmp_path / "register_adapter").glob("events.*")
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4]
    assert events.Scalars("train_loss")[-1].value == pytest.approx(results["metrics"]["train_loss"])
    assert events.Scalars("eval_accuracy")[0].value == pytest.approx(results["metrics"]["eval_accuracy"])


@pytest.mark.parametrize("several", [False, True])
def test_push_to_hub_uploads_all_keeps_the_readme_and_shows_no_token(
    vit: Path, photos: Path, tmp_path: Path, several: bool
) -> None:
    token = "hf_TrainersTokenQwErTy"
    more = ["--max_train_steps", "1", "--push_to_hub", "--hub_model_id", "author/regs"]
    more += ["--train", "registers+lora"] if several else []
    with HubServer({token: "author"}) as server:
        server.seed("author/regs", {"README.md": b"My own words.\n"})
        hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token, "HF_DEBUG": "1"}
        hub |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        done = run_module("register_adapter.train", *flags(vit, photos, tmp_path / "out", *more), hub=hub)
        assert done.returncode == 0, done.stderr
        commit = server.repos["author/regs"].at("main")
    assert commit is not None
    manifest = "adapters.json" if several else "adapter_config.json"
    assert set(commit.files) >= {"adapter_model.safetensors", manifest, "preprocessor_config.json"}
    assert commit.files["adapter_model.safetensors"].data == adapter_bytes(tmp_path / "out")
    card = commit.files["README.md"].data.decode()
    assert "eval_accuracy" in card
    assert "My own words." in card
    assert '"author/regs"' in card
    written = [path.read_text("utf-8") for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")]
    assert not [text for text in (done.stdout, done.stderr, *written) if token in text]


@pytest.mark.parametrize(
    ("name", "offline", "token", "status", "message"),
    [
        ("author/regs", True, "hf_Author", 2, "'author/regs' cannot be pushed to: HF_HUB_OFFLINE is set"),
        ("author/regs", False, None, 2, "'author/regs' cannot be pushed to without a token"),
        ("author/a/b", False, "hf_Author", 2, "'author/a/b' is no name of a repository"),
        ("author/regs", False, "hf_Other", 1, "the token may not do this with 'author/regs' (403)"),
        ("author/there", False, "hf_Other", 1, "the token may not do this with 'author/there' (403)"),
        ("author/regs", False, "hf_Expired", 1, "refused the token for 'author/regs'"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_training(
    name: str,
    offline: bool,
    token: str | None,
    status: int,
    message: str,
    vit: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if name == "author/there" and "write" not in inspect.signature(HfApi.auth_check).parameters:
        pytest.skip("this version of huggingface_hub does not tell whether a repository can be written to")
    monkeypatch.setattr("register_adapter.training.loop.Loop.fit", lambda loop: pytest.fail("trained"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # older ones keep a session that was opened offline
        huggingface_hub.utils.reset_sessions()
    for module in ("register_adapter.training.saving", "register_adapter.utils.hub", "huggingface_hub.utils._headers"):
        monkeypatch.setattr(f"{module}.get_token", lambda: token)
    with HubServer({"hf_Author": "author", "hf_Other": "other"}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        there = server.seed("author/there", {})
        with pytest.raises(SystemExit) as stop:
            main(flags(vit, photos, tmp_path, "--push_to_hub", "--hub_model_id", name))
    assert stop.value.code == status
    assert message in capfd.readouterr().err
    assert list(server.repos.values()) == [there]
    assert len(there.commits) == 1
    assert not (tmp_path / "results.json").exists()


def test_the_example_runs_as_a_user_would_run_it(vit: Path, photos: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "train_classifier.py"
    assert len(script.read_text().splitlines()) <= 60
    out = tmp_path / "out"
    done = run_module(script, vit, photos / "train", out, "--steps", "2")
    assert done.returncode == 0, done.stderr
    accuracy = read_results(out)["metrics"]["eval_accuracy"]
    assert f"accuracy on 5 held-out images: {accuracy:.3f}" in done.stdout
