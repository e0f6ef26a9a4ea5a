"""DeepSpeed: its config goes by what the run says; ZeRO-2 and ZeRO-3 on two processes learn what DDP learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_two_processes
from safetensors.torch import load_file
from training_helpers import write_planted

from register_adapter.training import TrainArguments
from register_adapter.training.setup import tell_deepspeed


def accelerator(**config: Any) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config)), gradient_accumulation_steps=1
    )


@pytest.mark.parametrize("said", [{}, {"gradient_accumulation_steps": 1, "gradient_clipping": "auto"}])
@pytest.mark.parametrize(("norm", "clipping"), [(0.5, 0.5), (0, 0.0), (None, 0.0)])
def test_its_config_goes_by_the_run(said: dict[str, Any], norm: float | None, clipping: float) -> None:
    told = accelerator(**said)
    tell_deepspeed(told, TrainArguments(gradient_accumulation_steps=2, max_grad_norm=norm))
    config = told.state.deepspeed_plugin.deepspeed_config
    assert config == {"gradient_accumulation_steps": 2, "gradient_clipping": clipping}
    assert told.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4, and the run says gradient_accumulation"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, and the run says max_grad_norm=1.0"),
    ],
)
def test_a_config_that_says_something_else_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tell_deepspeed(accelerator(**said), TrainArguments(gradient_accumulation_steps=2))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (make test-deepspeed)")
    return write_planted(tmp_path_factory.mktemp("case"), 8, places=("cat", "dog"))


def learn(case: Path, out: Path, more: tuple[str, ...], stage: int | None) -> dict[str, torch.Tensor]:
    """What two processes save after three steps, by DDP or by a stage of ZeRO."""
    images = str(case / "images")
    words = [
        "--model-name-or-path",
        str(case / "model"),
        "--train-dir",
        images,
        "--validation-dir",
        images,
        "--use-cpu",
    ]
    words += [
        "--quiet",
        "--max-train-steps",
        "3",
        "--per-device-train-batch-size",
        "2",
        "--learning-rate",
        "0.01",
        *more,
    ]
    zero = {} if stage is None else {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    for process in run_two_processes("register_adapter.train", *words, "--output-dir", str(out), more=zero):
        assert process.returncode == 0, process.stderr[-4000:]
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--objective", "distillation", "--max-grad-norm", "0.01"),
        ("--objective", "smooth", "--train", "registers+lora", "--gradient-accumulation-steps", "2"),
        ("--objective", "norm", "--preserve", "1.0"),
        ("--objective", "refine"),
        ("--objective", "classification"),
    ],
    ids=lambda more: more[1],
)
def test_zero_learns_what_ddp_learns(case: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    wanted = learn(case, tmp_path / "ddp", more, None)
    for stage in (2, 3):
        learned = learn(case, tmp_path / f"zero{stage}", more, stage)
        assert learned.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(learned[name], value, rtol=0, atol=1e-4, msg=f"{name}, stage {stage}")
