"""The base's zero-shot distribution over prompts is kept: what is computed, from files, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pairs import KINDS, make_tokenizer, write_pairs
from training_cases import results_of, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter.data.texts import TextTokenizer, read_prompts
from register_adapter.training import PreservationObjective, load_base, wrap
from register_adapter.training.objectives.terms import WeightedTerms, target_key

PROMPTS = [["a red circle"], ["a photo of the blue square"], ["green ring"]]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, images, and prompts in files."""
    folder = write_pairs(tmp_path_factory.mktemp("prompts"), 12)
    (folder / "images" / "metadata.jsonl").unlink()
    (folder / "prompts.txt").write_text("\n".join(group[0] for group in PROMPTS) + "\n\n")
    (folder / "prompts.json").write_text(json.dumps({"red": ["a red circle", "red"], "blue": "blue square"}))
    return folder


def prepared(folder: Path, kind: str, prompts: Any = PROMPTS) -> tuple[Any, PreservationObjective, dict[str, Any]]:
    objective = PreservationObjective(prompts)
    torch.manual_seed(0)
    model = wrap(load_base(objective, str(folder / kind)), objective, num_registers=2, init_std=2.0)
    pixels = torch.randn(4, 3, 32, 32)
    items = [{"pixel_values": image, "index": index} for index, image in enumerate(pixels)]
    objective.prepare(model, items)
    return model.eval(), objective, objective.collate(items)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_it_is_the_divergence_of_the_models_own_zero_shot_answers(kind: str, folder: Path) -> None:
    model, objective, batch = prepared(folder, kind)
    words = TextTokenizer(make_tokenizer(), 8)([group[0] for group in PROMPTS])
    with torch.no_grad():
        now = model(pixel_values=batch["pixel_values"], **words).logits_per_image.log_softmax(1)
        with model.disable_adapter():
            before = model(pixel_values=batch["pixel_values"], **words).logits_per_image.log_softmax(1)
    values = objective.evaluate(model, batch)
    expected = (before.exp() * (before - now)).sum(1)
    torch.testing.assert_close(values["preserve"], expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(values["zero_shot_agreement"], (now.argmax(1) == before.argmax(1)).float())
    assert (values["preserve"] > 1e-6).all()
    with model.disable_adapter():
        assert objective.evaluate(model, batch)["preserve"].abs().max() < 1e-6
    loss, _ = objective.loss(model.train(), batch)
    loss.backward()
    assert [tuple(value.shape) for value in model.parameters() if value.grad is not None] == [(2, 32)]


def test_the_texts_of_a_class_have_one_mean(folder: Path) -> None:
    _, several, _ = prepared(folder, "clip", [["a red circle", "green ring"], ["blue"]])
    _, single, _ = prepared(folder, "clip", [["a red circle"], ["green ring"]])
    mean = single._embedded.mean(0)
    torch.testing.assert_close(several._embedded[0], mean / mean.norm())
    with pytest.raises(ValueError, match="at least two classes, found 1"):
        PreservationObjective([["a"]])


def test_targets_that_were_stored_give_the_same(folder: Path) -> None:
    model, objective, batch = prepared(folder, "clip")
    stored = WeightedTerms([(objective, 1.0)]).targets(model, batch)
    assert list(stored) == [target_key("preserve", "summary")]
    fresh, again = (objective.loss(model, {**batch, **more})[0] for more in ({}, stored))
    assert torch.equal(fresh, again)


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    words = [
        "--model-name-or-path",
        str(folder / "clip"),
        "--train-dir",
        str(folder / "images"),
        "--quiet",
        "--use-cpu",
    ]
    return [*words, "--output-dir", str(out), "--max-train-steps", "2", "--num-registers", "2", *more]


@pytest.mark.parametrize("file", ["prompts.txt", "prompts.json"])
@pytest.mark.parametrize(
    "objective", [("preserve",), ("distillation", "--num-views", "2", "--preserve", "2")], ids=lambda words: words[0]
)
@pytest.mark.slow
def test_the_command_keeps_it_and_goes_on(file: str, objective: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    words = ["--objective", *objective, "--preserve-prompts", str(folder / file), "--checkpointing-steps", "1"]
    start(flags(folder, tmp_path / "out", *words, "--target-store", str(tmp_path / "targets")))
    results = results_of(tmp_path / "out")
    assert {"eval_preserve", "eval_zero_shot_agreement"} <= set(results["metrics"])
    assert results["objective"]["terms"][-1]["classes"] == (3 if file.endswith("txt") else 2)
    checkpoint = ["--resume-from-checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    store = ["--target-store", str(tmp_path / "targets")]
    start(flags(folder, tmp_path / "again", *words, *checkpoint, *store))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")


def test_other_prompts_are_another_run(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--objective", "preserve", "--checkpointing-steps", "1", "--preserve-prompts"]
    start(flags(folder, tmp_path / "out", *words, str(folder / "prompts.txt")))
    checkpoint = ["--resume-from-checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    assert stopped(flags(folder, tmp_path / "again", *words, str(folder / "prompts.json"), *checkpoint)) == 1
    assert "written by a run with other settings (objective:" in capfd.readouterr().err


BAD = {
    "short.txt": ("a cat\n", "at least two classes, found 1"),
    "empty.json": ("[]", "at least two classes, found 0"),
    "number.json": ("3", "must be a list of prompts, or a mapping"),
    "mixed.json": ('["a", 3]', "must be a list of prompts, or a mapping"),
    "blank.json": ('{"a": ["x"], "b": []}', "must be a list of prompts, or a mapping"),
    "broken.json": ("[", "is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_holds_no_prompts_is_refused(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_models_without_texts_and_files_that_are_not_there_are_refused(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = write_case(tmp_path / "case")
    words = ["--objective", "preserve", "--preserve-prompts"]
    vit = ["--model-name-or-path", str(case / "vit")]
    assert stopped(flags(folder, tmp_path / "out", *words, str(folder / "prompts.txt"), *vit)) == 1
    assert "does not embed images and texts side by side" in capfd.readouterr().err
    assert stopped(flags(folder, tmp_path / "out", *words, str(folder / "gone.txt"))) == 1
    assert "gone.txt" in capfd.readouterr().err
    assert stopped(flags(folder, tmp_path / "out", "--objective", "norm", "--preserve-prompts", "x")) == 2
    assert "unrecognised arguments: --preserve-prompts" in capfd.readouterr().err
