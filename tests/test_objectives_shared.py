"""Two processes with half the batch learn what one learns, whatever the objective."""

from __future__ import annotations

import pytest
import torch
from processes import run_script, run_two_processes
from safetensors.torch import load_file
from training_helpers import ROOT

SCRIPT = ROOT / "tests" / "scripts" / "train_every_objective.py"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """In one process, and in two."""
    folder = tmp_path_factory.mktemp("learned")
    run_script(SCRIPT.stem, folder / "one.safetensors")
    for process in run_two_processes(SCRIPT, folder / "two.safetensors"):
        assert process.returncode == 0, process.stderr
    return [load_file(folder / f"{name}.safetensors") for name in ("one", "two")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distillation", "refine", "smooth", "norm", "preserve"])
def test_two_processes_learn_what_one_learns(name: str, learned: list[dict[str, torch.Tensor]]) -> None:
    alone, shared = (values[name] for values in learned)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_objectives_learn_different_things(learned: list[dict[str, torch.Tensor]]) -> None:
    values = list(learned[0].values())
    assert all(
        first.shape != second.shape or not torch.allclose(first, second)
        for n, first in enumerate(values)
        for second in values[:n]
    )
