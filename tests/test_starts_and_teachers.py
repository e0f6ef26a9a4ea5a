"""Where registers start (outlier patches, no effect at all), and a teacher that is an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import flatten, run
from torch.nn import functional as F
from training_cases import results_of, start
from training_helpers import adapter_bytes, write_planted

from register_adapter import NoArtifactsError, add_registers, capture, find_register_layer, fit_test_time_registers
from register_adapter.data.datasets import ProcessedDataset
from register_adapter.neurons import start_from_outliers
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.training import DistillationObjective, TrainArguments, train, wrap
from register_adapter.training.objectives.terms import Teacher
from register_adapter.training.objectives.tokens import read_tokens


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    scenes = ProcessedDataset(SceneDataset(32, seed=11), load_image_processor())
    return [{"pixel_values": scenes[index]["pixel_values"], "index": index} for index in range(len(scenes))]


@pytest.fixture(scope="module")
def batches(items: list[dict[str, Any]]) -> list[torch.Tensor]:
    pixels = torch.stack([item["pixel_values"] for item in items])
    return list(torch.split(pixels, 16))


# Outliers


@pytest.mark.parametrize(("block", "deep", "how"), [(0, False, "samples"), (5, False, "mean"), (2, True, "samples")])
@pytest.mark.slow
def test_registers_start_as_what_outlier_patches_are_where_they_enter(
    how: Any, block: int, deep: bool, batches: list[torch.Tensor]
) -> None:
    planting = load_planted_vit()
    begin = start_from_outliers(planting.model, batches, 3, how=how, insert_layer=block, deep=deep)
    model = add_registers(planting.model, **begin.options)
    layer = find_register_layer(model)
    assert layer is not None
    begin.fill(layer.tokens("default"))
    values = layer.tokens("default").weight.detach()
    assert values.shape == ((6, 3, 128) if deep else (3, 128))
    assert len({tuple(row.tolist()) for row in values.reshape(-1, 128)}) == values.numel() // 128

    clean = load_planted_vit()
    hits = torch.cat([clean.hits(batch) for batch in batches])
    traces = []
    for batch in batches:
        with capture(clean.model, attentions=False) as trace, torch.no_grad():
            clean.model(pixel_values=batch)
        traces.append(trace.patches(block))
    own = torch.cat(traces)[hits]
    first = values[0] if deep else values
    if how == "samples":
        assert all((own - row).abs().amax(1).min() < 1e-5 for row in first)
    else:
        assert F.cosine_similarity(first, own.mean(0, keepdim=True)).min() > 0.99


@pytest.mark.slow
def test_a_start_at_outliers_says_what_it_needs(batches: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="needs images, on which the base's outlier patches are looked up"):
        add_registers(load_vit(), init="outliers")
    with pytest.raises(NoArtifactsError, match="use another init"):
        start_from_outliers(load_vit(), batches)
    with pytest.raises(ValueError, match="how must be mean or samples, got 'median'"):
        start_from_outliers(load_planted_vit().model, batches, how="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for tokens"):
        start_from_outliers(load_planted_vit().model, batches, key_value=True)
    with pytest.raises(ValueError, match="a block of the model, 0 to 7, got 8"):
        start_from_outliers(load_planted_vit().model, batches, insert_layer=8)


@pytest.mark.slow
def test_the_command_starts_at_outliers_and_repeats(tmp_path: Path) -> None:
    write_planted(tmp_path, 64)
    given = ["--objective", "smooth", "--init", "outliers", "--insert-layer", "4", "--max-train-steps", "1"]
    given += ["--model-name-or-path", str(tmp_path / "model"), "--train-dir", str(tmp_path / "images"), "--use-cpu"]
    for name in ("first", "second"):
        start([*given, "--quiet", "--output-dir", str(tmp_path / name)])
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "second")
    assert "`outliers`" in (tmp_path / "first" / "README.md").read_text("utf-8")


# No effect


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip-vision", "siglip-vision"])
@pytest.mark.parametrize("key_value", [False, True])
def test_a_low_gate_starts_at_the_base_and_can_open(name: str, key_value: bool) -> None:
    base = build(name)
    inputs = make_inputs(name)
    before = run(base, inputs)
    model = add_registers(base, 4, gate=-16.0, key_value=key_value, init_std=1.0).eval()
    after = run(model, inputs)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-5)
    outputs = flatten(model(**inputs))
    sum(value.square().sum() for value in outputs.values() if value.is_floating_point()).backward()  # type: ignore[union-attr]
    gates = [parameter for key, parameter in model.named_parameters() if key.endswith("gate")]
    assert all(gate.grad is not None and gate.grad.abs().max() > 0 for gate in gates)


# A teacher with an adapter


@pytest.fixture(scope="module")
def teacher(batches: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    fitted = fit_test_time_registers(load_planted_vit().model, batches, attention_bias=True, progress=False)
    fitted.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("moves", ["registers", "lora"])
def test_its_tokens_are_the_targets(
    moves: str, views: int, teacher: Path, items: list[dict[str, Any]], batches: list[torch.Tensor]
) -> None:
    model = wrap(load_planted_vit().model, DistillationObjective(), train=moves)
    objective, bare = DistillationObjective(views, teacher=str(teacher)), DistillationObjective(views)
    parameters = {name: value.clone() for name, value in model.named_parameters()}
    objective.prepare(model, items)
    batch = objective.collate(items[:4])
    with torch.no_grad():
        taught, own = (term.targets(Teacher(model, batch)) for term in (objective, bare))
        clean = read_tokens(load_vit(), batch)
    assert set(taught) == {"patches", "cls"}
    assert set(own) == {"patches"}
    distances = [1 - F.cosine_similarity(t["patches"], clean.patches, dim=-1).mean() for t in (taught, own)]
    assert distances[0] < distances[1]
    # The student is as before, and its own frozen weights are the teacher's.
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    loss, _ = objective.loss(model.train(), batch)
    loss.backward()
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)


@pytest.mark.slow
def test_what_the_teacher_is_belongs_to_the_recipe(teacher: Path, items: list[dict[str, Any]], tmp_path: Path) -> None:
    def details(folder: Path) -> dict[str, Any]:
        objective = DistillationObjective(1, teacher=str(folder))
        objective.prepare(wrap(load_planted_vit().model, objective), items)
        return objective.details()

    other = add_registers(load_planted_vit().model, 1)
    other.save_pretrained(tmp_path / "other")
    assert details(teacher) == details(teacher)
    assert details(teacher) != details(tmp_path / "other")


@pytest.mark.slow
def test_training_towards_a_teacher_repairs(teacher: Path, items: list[dict[str, Any]], tmp_path: Path) -> None:
    objective = DistillationObjective(1, teacher=str(teacher))
    model = wrap(load_planted_vit().model, objective, train="lora")
    args = TrainArguments(
        str(tmp_path), max_train_steps=12, learning_rate=1e-3, per_device_train_batch_size=8, quiet=True, use_cpu=True
    )
    train(model, objective, items, args, image_processor=load_image_processor(), eval_dataset=items[:8])
    metrics = results_of(tmp_path)["metrics"]
    first = wrap(load_planted_vit().model, objective, train="lora").eval()
    batch = objective.collate(items[:8])
    assert metrics["eval_loss"] < 0.5 * objective.evaluate(first, batch)["loss"].mean()
