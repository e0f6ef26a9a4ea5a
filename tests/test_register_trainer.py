"""transformers' own Trainer: an objective without labels, as a process, resumed, with the best adapter at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer
from peft import AutoPeftModel
from PIL import Image
from processes import run_module, run_script, run_two_processes
from safetensors.torch import load_file
from training_helpers import ROOT, adapter_bytes, write_vit
from transformers import TrainingArguments

from register_adapter import RegisterConfig, add_registers
from register_adapter.testbed import load_vit
from register_adapter.training import (
    ClassificationObjective,
    DistillationObjective,
    NormObjective,
    Objective,
    PreservationObjective,
    WeightedTerms,
)
from register_adapter.training.register_trainer import RegisterTrainer

SCRIPT = ROOT / "examples" / "transformers_trainer.py"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without dropout, and a heap of images."""
    folder = tmp_path_factory.mktemp("case")
    write_vit(folder / "vit", ["a", "b"], dropout=0.0)
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(noise.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / "images" / f"{index}.png")
    return folder


def items(count: int = 10) -> list[dict[str, Any]]:
    pixels = torch.randn(count, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "index": index, "labels": index % 3} for index, image in enumerate(pixels)]


def trainer(folder: Path, objective: Objective | None = None, **options: Any) -> RegisterTrainer:
    torch.manual_seed(0)
    terms = [(DistillationObjective(num_views=2), 1.0), (PreservationObjective(), 0.5)]
    objective = objective or WeightedTerms(terms)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    args = TrainingArguments(str(folder), max_steps=1, **options)
    return RegisterTrainer(add_registers(load_vit(), 2), args, objective, items(), items(3))


def test_metrics_are_means_over_the_whole_set(tmp_path: Path) -> None:
    ours = trainer(tmp_path, None, per_device_eval_batch_size=2)
    metrics = ours.evaluate()
    batch = ours.trained_on.collate(items(3))
    values = ours.trained_on.evaluate(ours.model.eval(), batch)
    assert {f"eval_{name}" for name in values} <= set(metrics)
    for name, value in values.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.mean().item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}])
def test_metrics_are_the_same_batch_by_batch(options: dict[str, Any], tmp_path: Path) -> None:
    ours = trainer(tmp_path, None, per_device_eval_batch_size=2, **options)
    wanted = trainer(tmp_path, None, per_device_eval_batch_size=2).evaluate()
    for _ in range(2):  # an evaluation leaves nothing to the next
        metrics = ours.evaluate()
        for name in ("eval_loss", "eval_distillation", "eval_preserve"):
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-4)


def test_a_search_for_hyperparameters_makes_models_that_the_objective_is_made_ready_for(tmp_path: Path) -> None:
    ready = []

    class Watched(DistillationObjective):
        def prepare(self, model: torch.nn.Module, images: Any) -> None:
            ready.append((model, len(images)))
            super().prepare(model, images)

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    make = {"model_init": lambda: add_registers(load_vit(), 2)}
    ours = RegisterTrainer(None, args, Watched(num_views=2), items(), items(3), **make)
    for _trial in range(2):
        ours.objective = None  # as every backend of the search does before a trial
        ours.train()
        assert ready[-1] == (ours.model, 10)
    assert np.isfinite(ours.evaluate()["eval_loss"])


@pytest.mark.parametrize("objective", [DistillationObjective(num_views=2), PreservationObjective(), NormObjective()])
def test_a_model_whose_adapters_have_no_switch_is_refused_by_name(objective: Objective, tmp_path: Path) -> None:
    base = load_vit()
    base.add_adapter(RegisterConfig(num_registers=2))
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    with pytest.raises(TypeError, match=r"disable_adapter\(\).*found ViTForImageClassification"):
        RegisterTrainer(base, args, objective, items()).train()


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
def test_two_batches_of_a_step_are_one(labelled: bool, tmp_path: Path) -> None:
    """With gradient accumulation the loss is a mean, whatever the model's forward accepts."""

    def gradient(size: int, accumulation: int) -> torch.Tensor:
        options: dict[str, Any] = {
            "learning_rate": 1.0,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
        }
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run = trainer(tmp_path, ClassificationObjective() if labelled else None, **options)
        (registers,) = (value for value in run.model.parameters() if value.requires_grad)
        before = registers.detach().clone()
        run.train()
        return before - registers.detach()

    whole, halves = gradient(8, 1), gradient(4, 2)
    assert whole.norm() > 0
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_the_example_trains_goes_on_and_saves_the_best(case: Path, tmp_path: Path) -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 60
    words = [SCRIPT, case / "vit", case / "images", tmp_path / "out", "--steps", "6", "--every", "2"]
    done = run_module(*words)
    assert done.returncode == 0, done.stderr
    assert "eval_distillation" in done.stdout
    whole = adapter_bytes(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert adapter_bytes(best) == whole
    model = AutoPeftModel.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state).all()
    # Killed behind its second checkpoint, and started again.
    again = tmp_path / "again"
    again.mkdir()
    for step in (2, 4):
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", again / f"checkpoint-{step}")
    done = run_module(*words[:3], again, *words[4:])
    assert done.returncode == 0, done.stderr
    if transformers.__version__.startswith("4."):
        return  # its Trainer goes on in the order of the first epoch, with every model
    last = "checkpoint-6"
    assert adapter_bytes(again / last) == adapter_bytes(tmp_path / "out" / last)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    script = ROOT / "tests" / "scripts" / "train_with_trainer.py"
    run_script(script.stem, tmp_path / "one", 4)
    for process in run_two_processes(script, tmp_path / "two", 2):
        assert process.returncode == 0, process.stderr
    alone, shared = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, value in shared.items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-5)
    metrics = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert metrics[1]["eval_distillation"] == pytest.approx(metrics[0]["eval_distillation"], rel=1e-4)


@pytest.mark.slow
def test_the_trainer_pushes_the_adapter(tmp_path: Path) -> None:
    token, out = "hf_TrainersTokenAsDfGh", tmp_path / "out"
    with HubServer({token: "author"}) as server:
        hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        hub |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        script = ROOT / "tests" / "scripts" / "train_with_trainer.py"
        done = run_module(script, out, 4, "push", hub=hub)
        assert done.returncode == 0, done.stderr
        commit = server.repos["author/by-trainer"].at("main")
    assert commit is not None
    assert commit.files["adapter_model.safetensors"].data == adapter_bytes(out)
    assert "library_name: peft" in commit.files["README.md"].data.decode()
