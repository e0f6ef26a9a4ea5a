"""Runs in which more than registers moves: resumed bit for bit, the best kept, loaded again, and their flags."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from families import build
from helpers import run
from processes import run_module
from safetensors.torch import load_file
from training_cases import RUN, flags, results_of, start, stopped, write_case
from training_helpers import write_planted
from transformers import ViTForImageClassification

from register_adapter import ComposedPeftModel, PositionConfig, RegisterConfig, compose, load_adapters
from register_adapter.training.setup import shard_by_block

pytestmark = pytest.mark.slow

LABEL_FREE = ("--objective", "distillation", "--num-views", "2")
SHORT = ("--max-train-steps", "3", "--per-device-train-batch-size", "4", "--learning-rate", "0.02", "--quiet")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every adapter's tensors, by their place."""
    files = folder.glob("*/adapter_model.safetensors")
    return {
        f"{path.parent.name}/{key}": value
        for path in files
        if not path.parent.name.startswith("checkpoint")
        for key, value in load_file(path).items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("train", "parts", "objective"),
    [
        ("registers+gates+lora", {"registers", "gates", "lora"}, LABEL_FREE),
        ("lora", {"lora"}, LABEL_FREE),
        ("registers+positions+norms+patch_embedding", {"registers", "positions", "copies"}, LABEL_FREE),
        ("registers+lora+last_blocks=1", {"registers", "lora", "copies", "head"}, ()),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_adapters(
    train: str, parts: set[str], objective: tuple[str, ...], case: Path, tmp_path: Path
) -> None:
    given = (*objective, *SHORT, "--train", train)
    start(flags(case, tmp_path / "whole", *given, "--checkpointing-steps", "1"))
    assert set(results_of(tmp_path / "whole")["trained"]) == parts
    resume = ("--resume-from-checkpoint", str(tmp_path / "whole" / "checkpoint-2"))
    start(flags(case, tmp_path / "again", *given, *resume))
    whole, early = weights(tmp_path / "whole"), weights(tmp_path / "whole" / "checkpoint-1")
    assert same(weights(tmp_path / "again"), whole)
    assert not same(early, whole)
    # Another thing that moves is another run.
    other = (*objective, *SHORT, "--train", f"{train}+norms" if "norms" not in train else "registers")
    assert stopped(flags(case, tmp_path / "other", *other, *resume)) == 1


def test_the_result_is_loaded_as_one_and_trained_further(case: Path, tmp_path: Path) -> None:
    start(flags(case, tmp_path / "out", *SHORT, "--train", "registers+lora+positions", "--lora-r", "2"))
    results = results_of(tmp_path / "out")
    assert results["trained"]["registers"] == 4 * 32
    assert results["trained"]["lora"] % 2 == 0
    assert results["trained"]["positions"] % 32 == 0
    assert {"eval_accuracy", "eval_registers_off_accuracy"} <= set(results["metrics"])
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"| Trained: lora | {results['trained']['lora']:,} parameters |" in card
    assert "load_adapters(base, " in card
    assert "| eval_accuracy |" in card

    base = ViTForImageClassification.from_pretrained(
        case / "vit", num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}
    )
    model = load_adapters(base.eval(), tmp_path / "out")
    assert isinstance(model, ComposedPeftModel)
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    logits = run(model, pixels)["logits"]
    model.save_pretrained(tmp_path / "copy")
    assert same(weights(tmp_path / "copy"), weights(tmp_path / "out"))

    more = flags(case, tmp_path / "more", *SHORT, "--adapter-name-or-path", str(tmp_path / "out"))
    start(more)
    assert set(results_of(tmp_path / "more")["trained"]) == set(results["trained"])
    assert not same(weights(tmp_path / "more"), weights(tmp_path / "out"))
    further = load_adapters(ViTForImageClassification.from_pretrained(case / "vit").eval(), tmp_path / "more")
    assert not torch.equal(run(further, pixels)["logits"], logits)


def test_the_best_of_all_parts_is_kept(case: Path, tmp_path: Path) -> None:
    selecting = ("--eval-steps", "2", "--load-best-model-at-end", "--greater-is-better", "true")
    given = (*RUN, *selecting, "--train", "registers+lora", "--checkpointing-steps", "2")
    start(flags(case, tmp_path / "out", *given))
    best = results_of(tmp_path / "out")["best"]["step"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "out" / f"checkpoint-{best}"))
    resume = ("--resume-from-checkpoint", str(tmp_path / "out" / "checkpoint-6"))
    start(flags(case, tmp_path / "again", *given, *resume))
    assert same(weights(tmp_path / "again"), weights(tmp_path / "out"))


def test_registers_are_fitted_before_lora_joins_them(tmp_path: Path) -> None:
    write_planted(tmp_path, 64)
    data = ("--model-name-or-path", str(tmp_path / "model"), "--train-dir", str(tmp_path / "images"))
    words = ["--objective", "distillation", "--num-views", "1", "--init", "test_time", "--train"]
    words += ["registers+lora", "--num-registers", "1", "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    start([*words, "--per-device-train-batch-size", "8", "--max-train-steps", "1", *data])
    keys = weights(tmp_path / "out")
    assert any(key.endswith("neuron_units") or "units" in key for key in keys)
    given = ["audit", "planted", str(tmp_path / "images"), "--adapter", str(tmp_path / "out")]
    audited = run_module("register_adapter", *given, "--out", tmp_path / "report", "--json")
    assert audited.returncode == 0, audited.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train", "register"), "cannot train 'register'; name any of registers, gates, lora"),
        (("--train", "lora", "--deep"), "--train lora moves nothing that --deep speaks of"),
        (("--train", "registers", "--lora-r", "4"), "--train registers moves nothing that --lora-r speaks of"),
        (("--train", "registers+lora", "--lora-r", "0"), "--lora-r and --lora-alpha must be at least 1"),
        (("--train", "last_blocks=9"), "last_blocks=9 of 2 blocks"),
    ],
)
def test_flags_that_contradict_what_moves_are_refused(
    words: tuple[str, ...], message: str, case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(flags(case, tmp_path / "out", *SHORT, *words)) in (1, 2)
    assert message in capsys.readouterr().err


def test_positions_are_not_sharded() -> None:
    """FSDP reads parameters as attributes, and would get the sum of the position embeddings and their offsets."""
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["ViTLayer"])
    sharding: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    registers = {"registers": RegisterConfig(num_registers=2)}
    shard_by_block(sharding, compose(build("vit"), registers))
    with pytest.raises(ValueError, match="position embeddings cannot be trained under FSDP"):
        shard_by_block(sharding, compose(build("vit"), {**registers, "positions": PositionConfig()}))
