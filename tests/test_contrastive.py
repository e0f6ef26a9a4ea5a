"""Pairs of images and texts: the loss of the base's own family, from folders and data sets, on several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from families import build, make_inputs
from pairs import KINDS, make_tokenizer, write_captions, write_pair, write_pairs
from peft import AutoPeftModel
from processes import run_two_processes
from safetensors.torch import load_file
from training_cases import results_of, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter import add_registers
from register_adapter.data import ProcessedDataset
from register_adapter.data.folders import read_captioned_folder
from register_adapter.data.texts import TextTokenizer
from register_adapter.training import (
    ContrastiveObjective,
    DistillationObjective,
    TrainArguments,
    WeightedTerms,
    load_base,
    train,
    wrap,
)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def batch_of(objective: ContrastiveObjective, count: int = 4) -> dict[str, torch.Tensor]:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = ["a photo of a red square", "blue circle", "photo", "the green triangle"]
    items = [{"pixel_values": image, "index": i, "text": texts[i]} for i, image in enumerate(pixels)]
    return objective.collate(items)


# The loss


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_the_models_own_family(kind: str, folder: Path) -> None:
    objective = ContrastiveObjective()
    model = wrap(load_base(objective, str(folder / kind)), objective, num_registers=2)
    objective.prepare(model, None)
    batch = batch_of(objective)
    loss, logged = objective.loss(model.eval(), batch)
    names = ("pixel_values", "input_ids", "attention_mask")
    output = model(**{name: batch[name] for name in names if name in batch}, return_loss=True)
    torch.testing.assert_close(loss, output.loss)
    torch.testing.assert_close(logged["contrastive"], loss.detach())
    means = {name: values.mean() for name, values in objective.evaluate(model, batch).items()}
    torch.testing.assert_close(means["loss"], loss)
    nearest = output.logits_per_image.argmax(1) == torch.arange(4)
    assert means["accuracy"] == nearest.float().mean()
    model.zero_grad()
    loss.backward()
    assert [tuple(value.shape) for value in model.parameters() if value.grad is not None] == [(2, 32)]


@pytest.mark.parametrize("family", ["altclip", "chinese-clip", "metaclip2", "aimv2", "clip"])
def test_other_families_have_the_loss_of_clip(family: str) -> None:
    model = add_registers(build(family), 2).eval()
    inputs = make_inputs(family)
    objective = ContrastiveObjective(TextTokenizer(make_tokenizer(), 8))
    loss, _ = objective.loss(model, inputs)
    logits = model(**inputs).logits_per_image
    labels = torch.arange(len(logits))
    expected = [torch.nn.functional.cross_entropy(rows, labels) for rows in (logits, logits.T)]
    torch.testing.assert_close(loss, sum(expected) / 2)


def test_terms_share_one_pass_with_the_texts(folder: Path) -> None:
    terms = WeightedTerms([(DistillationObjective(num_views=1), 1.0), (ContrastiveObjective(), 0.5)])
    model = wrap(load_base(terms, str(folder / "clip")), terms, num_registers=2)
    terms.prepare(model, None)
    contrastive = terms.terms[1][0]
    assert isinstance(contrastive, ContrastiveObjective)
    total, logged = terms.loss(model, batch_of(contrastive))
    torch.testing.assert_close(total.detach(), logged["distillation"] + 0.5 * logged["contrastive"])


# Data


def flags(folder: Path, kind: str, out: Path, *more: str, data: tuple[str, ...] = ()) -> list[str]:
    data = data or ("--train-dir", str(folder / "images"))
    words = ["--objective", "contrastive", "--model-name-or-path", str(folder / kind), "--output-dir", str(out)]
    return [*words, *data, "--use-cpu", "--quiet", "--num-registers", "2", *more]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["folder", "data set"])
def test_the_command_trains_on_pairs_and_goes_on(kind: str, source: str, folder: Path, tmp_path: Path) -> None:
    data = ("--dataset-name", str(folder / "images")) if source == "data set" else ()
    steps = ("--max-train-steps", "3", "--checkpointing-steps", "2", "--per-device-train-batch-size", "4")
    start(flags(folder, kind, tmp_path / "out", *steps, data=data))
    results = results_of(tmp_path / "out")
    assert results["objective"]["name"] == "contrastive"
    assert {"eval_loss", "eval_accuracy", "eval_registers_off_loss"} <= set(results["metrics"])
    assert results["train_samples"] + results["eval_samples"] == 16
    assert "the same head" not in (tmp_path / "out" / "README.md").read_text()  # these models have none
    again = [*steps, "--resume-from-checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    start(flags(folder, kind, tmp_path / "again", *again, data=data))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")
    model = AutoPeftModel.from_pretrained(tmp_path / "out")
    assert type(model.get_base_model()).__name__.lower().startswith(kind)


def test_every_evaluation_has_the_same_texts(folder: Path, tmp_path: Path) -> None:
    """Nothing moves, and a gate keeps off the registers: with or without them, at any step, figures are the same."""
    images = write_captions(tmp_path / "images", 8)
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    several = [{**line, "text": [line["text"], "a red circle"]} for line in lines]
    (images / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in several))
    words = flags(folder, "clip", tmp_path / "out", "--gate", "-16", data=("--train-dir", str(images)))
    words += ["--validation-dir", str(images), "--max-train-steps", "3", "--eval-steps", "1", "--learning-rate", "1e-9"]
    start([*words, "--per-device-train-batch-size", "4"])
    results = results_of(tmp_path / "out")
    losses = [evaluation["loss"] for evaluation in results["evaluations"]]
    assert [results["metrics"]["eval_registers_off_loss"], *losses] == pytest.approx([losses[0]] * 4, abs=1e-3)


def test_the_text_column_is_named_and_can_be_added_to_others(folder: Path, tmp_path: Path) -> None:
    write_captions(tmp_path / "images", 8, column="caption")
    words = ["--objective", "distillation", "--num-views", "2", "--contrastive", "0.1", "--text-column-name", "caption"]
    words += ["--train-dir", str(tmp_path / "images"), "--max-train-steps", "1", "--use-cpu", "--quiet"]
    start([*words, "--model-name-or-path", str(folder / "clip"), "--output-dir", str(tmp_path / "out")])
    assert {"eval_distillation", "eval_contrastive", "eval_accuracy"} <= set(results_of(tmp_path / "out")["metrics"])


def test_of_several_texts_each_epoch_has_another_one(tmp_path: Path) -> None:
    write_captions(tmp_path, 1) if not tmp_path.exists() else None
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": ["a cat", "an animal"]}))
    (listed,) = read_captioned_folder(tmp_path)
    data = ProcessedDataset([{**listed, "image": torch.zeros(0)}], None)  # type: ignore[arg-type]
    texts = []
    for epoch in range(3):
        data.set_epoch(epoch)
        texts.append(data._text_of(listed)["text"])
    assert texts == ["a cat", "an animal", "a cat"]


def test_python_items_with_images_and_texts_are_enough(folder: Path) -> None:
    objective = ContrastiveObjective()
    model = wrap(load_base(objective, str(folder / "siglip")), objective, num_registers=2)
    data = read_captioned_folder(folder / "images")
    results = train(model, objective, data, TrainArguments(max_train_steps=1, quiet=True, use_cpu=True), data)
    assert "eval_accuracy" in results["metrics"]


# Refused


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "has no metadata.jsonl with a line such as"),
        ("", "metadata.jsonl is empty"),
        ("{", "line 1 is not JSON"),
        ('{"file_name": "0.png"}', "must have the keys 'file_name' and 'text', found ['file_name']"),
        ('\n{"file_name": "0.png", "text": " "}', "line 2: 'text' must be a text or a list of texts, found ' '"),
        ('{"file_name": "0.png", "text": []}', "'text' must be a text or a list of texts, found []"),
        ('{"file_name": "0.png", "text": "a"}\n{"file_name": "gone.png", "text": "b"}', "gone.png"),
    ],
)
def test_a_folder_without_texts_is_refused(
    lines: str | None, message: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_captions(tmp_path / "images", 2)
    (images / "metadata.jsonl").unlink()
    if lines is not None:
        (images / "metadata.jsonl").write_text(lines)
    data = ("--train-dir", str(images), "--strict")
    assert stopped(flags(folder, "clip", tmp_path / "out", data=data)) == 1
    assert message in capfd.readouterr().err


def test_models_without_texts_are_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = write_case(tmp_path / "case")
    words = flags(folder, "clip", tmp_path / "out", "--model-name-or-path", str(case / "vit"))
    assert stopped(words) == 1
    assert "(ViTConfig) does not embed images and texts side by side" in capfd.readouterr().err
    bare = write_pair(tmp_path / "bare", "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert stopped(flags(folder, "clip", tmp_path / "out", "--model-name-or-path", str(bare))) == 1
    assert f"no tokenizer could be read in {str(bare)!r}" in capfd.readouterr().err


def test_items_without_a_text_are_named(folder: Path) -> None:
    objective = ContrastiveObjective(TextTokenizer(make_tokenizer(), 8))
    items: list[dict[str, Any]] = [{"pixel_values": torch.zeros(3, 32, 32), "index": 3, "text": None}]
    with pytest.raises(ValueError, match=r"item 3 has no text \(found None\)"):
        objective.collate(items)
    del items[0]["text"]
    with pytest.raises(ValueError, match="'contrastive' needs items with 'text', found"):
        objective.collate(items)


# Several processes


@pytest.mark.slow
def test_two_processes_see_each_others_pairs(folder: Path, tmp_path: Path) -> None:
    """Two batches of 4 are one of 8, to the rounding of 20 steps; embeddings are gathered before either loss."""
    kind = KINDS[0]
    images = write_captions(tmp_path / "images", 24)
    data = ("--train-dir", str(images), "--validation-dir", str(folder / "images"))
    common = ("--max-train-steps", "20", "--learning-rate", "0.01", "--seed", "3")
    start(flags(folder, kind, tmp_path / "alone", *common, "--per-device-train-batch-size", "8", data=data))
    shared = flags(folder, kind, tmp_path / "shared", *common, "--per-device-train-batch-size", "4", data=data)
    for process in run_two_processes("register_adapter.train", *shared):
        assert process.returncode == 0, process.stderr
    assert results_of(tmp_path / "shared")["hardware"]["num_processes"] == 2
    (ours,), (theirs,) = (
        load_file(tmp_path / name / "adapter_model.safetensors").values() for name in ("alone", "shared")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
