"""Two processes: one's fault ends both, named, and their average of what is trained is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_script, run_two_processes
from safetensors.torch import load_file
from training_cases import flags, results_of, start, write_case
from training_helpers import ROOT, write_vit

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "scripts" / "train_with_a_fault.py"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = write_case(tmp_path_factory.mktemp("case"))
    write_vit(case / "vit", ["a", "b"], dropout=0.0)
    return case


def test_a_fault_of_one_process_ends_both(case: Path, tmp_path: Path) -> None:
    words = flags(case, tmp_path / "out", "--per-device-train-batch-size", "1", "--checkpointing-steps", "50")
    ended = run_two_processes(SCRIPT, *words)
    assert all(process.returncode == 1 for process in ended)
    # Item 7 is the second of the dogs, whose folder comes behind six cats.
    errors = [line for process in ended for line in process.stderr.splitlines()]
    (line,) = (line for line in errors if line.startswith("ERROR: the loss is nan at step"))
    assert f"on {case / 'train' / 'dog' / '1.png'}; the step was not taken" in line
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert (str(kept[-1]) if kept else "nothing is saved") in line
    for checkpoint in kept:
        values = load_file(checkpoint / "adapter_model.safetensors").values()
        assert all(bool(value.isfinite().all()) for value in values)


def test_the_average_of_two_processes_is_that_of_one(case: Path, tmp_path: Path) -> None:
    common = ["--ema-decay", "0.6", "--max-train-steps", "6", "--learning-rate", "0.01", "--eval-steps", "3"]
    common += ["--max-train-samples", "8"]  # two whole batches
    start(flags(case, tmp_path / "alone", *common, "--per-device-train-batch-size", "4"))
    more = [*common, "--per-device-train-batch-size", "2"]
    for process in run_two_processes("register_adapter.train", *flags(case, tmp_path / "shared", *more)):
        assert process.returncode == 0, process.stderr
    shared, alone = results_of(tmp_path / "shared"), results_of(tmp_path / "alone")
    assert shared["hardware"]["num_processes"] == 2
    for ours, theirs in zip(shared["evaluations"], alone["evaluations"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    theirs = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "shared" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)


def test_shards_are_averaged_as_whole_weights_are(tmp_path: Path) -> None:
    run_script("average_of_shards", tmp_path / "store")
