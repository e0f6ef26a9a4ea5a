"""Blocks that are compiled or checkpointed: the same adapter as without, and no trace of it on the model afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from training_cases import flags, start, stopped, write_case

from register_adapter import find_tower
from register_adapter.testbed import load_planted_vit
from register_adapter.training import TrainArguments
from register_adapter.training.block_modes import check_modes, compiled_blocks
from register_adapter.training.moving import Moving, put_on

#: Traces what inductor would compile, and computes it as the eager model does.
BACKEND = ("--torch-compile-backend", "eager")
SHORT = ("--max-train-steps", "2", "--per-device-train-batch-size", "4", "--learning-rate", "0.02", "--quiet")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(case: Path, tmp_path: Path) -> None:
    given = (*SHORT, "--train", "registers+gates+lora", "--objective", "distillation", "--num-views", "2")
    start(flags(case, tmp_path / "eager", *given))
    start(flags(case, tmp_path / "compiled", *given, *BACKEND))
    files = [path.relative_to(tmp_path / "eager") for path in (tmp_path / "eager").rglob("adapter_model.safetensors")]
    assert {str(file.parent) for file in files} == {".", "lora", "registers"}
    for file in files:
        eager, compiled = load_file(tmp_path / "eager" / file), load_file(tmp_path / "compiled" / file)
        assert eager.keys() == compiled.keys()
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4, msg=f"{file} {name}")


@pytest.mark.slow
def test_blocks_are_compiled_while_it_lasts_and_plain_afterwards() -> None:
    model = put_on(load_planted_vit().model, Moving(registers=True, lora=True))
    blocks = find_tower(model).part("blocks")
    pixels, calls = torch.rand(1, 3, 80, 80), []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls.append(len(inputs))
        return graph

    torch._dynamo.register_backend(count, "counting")
    with compiled_blocks(model, "counting"), torch.no_grad():
        model(pixel_values=pixels)
    assert calls
    assert not any("forward" in block.__dict__ for block in blocks)
    made = len(calls)
    with torch.no_grad():
        model(pixel_values=pixels)
    assert len(calls) == made


def test_an_unknown_backend_is_refused(case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stopped(flags(case, tmp_path / "out", "--torch-compile-backend", "none")) == 2
    assert "torch_compile_backend must be one of" in capfd.readouterr().err


@pytest.mark.parametrize("train", ["registers", "registers+gates+lora"])
def test_a_checkpointed_run_learns_the_same_and_computes_blocks_again(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    again = []
    original = transformers.modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        again.append(kwargs.get("use_reentrant"))
        return original(*args, **kwargs)

    given = (*SHORT, "--train", train, "--objective", "distillation", "--num-views", "2")
    start(flags(case, tmp_path / "plain", *given))
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    start(flags(case, tmp_path / "checkpointed", *given, "--gradient-checkpointing"))
    assert again
    assert set(again) == {False}
    for path in (tmp_path / "plain").rglob("adapter_model.safetensors"):
        plain, other = load_file(path), load_file(tmp_path / "checkpointed" / path.relative_to(tmp_path / "plain"))
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=f"{path} {name}")


def test_a_model_without_checkpointing_is_refused() -> None:
    model = put_on(load_planted_vit().model, Moving(registers=True))
    for module in model.modules():
        module.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="has no gradient checkpointing"):
        check_modes(model, TrainArguments(gradient_checkpointing=True))
