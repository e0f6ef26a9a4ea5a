"""Training without labels: what the terms compute, and the command line on a heap of images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from torch.nn import functional as F
from training_helpers import adapter_bytes, write_planted
from transformers import ViTImageProcessor

from register_adapter import NoArtifactsError, add_registers, capture
from register_adapter.artifacts.rules import Threshold
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.training import (
    OBJECTIVES,
    DistillationObjective,
    NormObjective,
    PreservationObjective,
    RefinementObjective,
    SmoothObjective,
    Term,
    TrainArguments,
    WeightedTerms,
    load_base,
    train,
)
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.objectives.outliers import Outliers, audit_base
from register_adapter.training.objectives.similarity import neighbour_mean
from register_adapter.training.objectives.terms import target_key
from register_adapter.training.objectives.tokens import read_base, read_tokens

#: Where the shipped artifacts are, as the audit says (see the test of that).
LINE = Outliers(4, Threshold("fixed", high=160.0, separated=True))


def make_terms() -> dict[str, Term]:
    return {
        "distillation": DistillationObjective(num_views=3),
        "refine": RefinementObjective(LINE, num_crops=1),
        "smooth": SmoothObjective(LINE),
        "norm": NormObjective(LINE),
        "preserve": PreservationObjective(),
    }


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    scenes, processor = SceneDataset(64, seed=3), load_image_processor()
    pixels = processor(images=[scenes.scene(index).pil for index in range(64)], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": image, "index": index} for index, image in enumerate(pixels)]


@pytest.fixture
def model() -> Any:
    return add_registers(load_planted_vit().model, 4, init_std=0.02)


def batch_of(items: list[dict[str, Any]], *numbers: int) -> dict[str, torch.Tensor]:
    return PreservationObjective().collate([items[number] for number in numbers])


# Tokens


def test_tokens_are_those_of_the_model(model: Any, items: list[dict[str, Any]]) -> None:
    batch = batch_of(items, 0, 1)
    with torch.no_grad():
        tokens = read_tokens(model.eval(), batch, layers=[4])
        with capture(model) as trace:
            model(pixel_values=batch["pixel_values"])
    assert tokens.grid == (10, 10)
    assert tokens.registers.shape == (2, 4, 128)
    assert tokens.cls.shape == (2, 1, 128)
    torch.testing.assert_close(tokens.inside[4], trace.patches(4))
    torch.testing.assert_close(tokens.before_norm, trace.patches(8))
    tower = model.get_base_model().vit
    torch.testing.assert_close(tokens.patches, tower.layernorm.forward(tokens.before_norm))


def test_the_base_is_asked_without_adapters_and_left_as_it_was(model: Any, items: list[dict[str, Any]]) -> None:
    batch = batch_of(items, 0, 1)
    model.train()
    answer = read_base(model, batch)
    assert all(module.training for module in model.modules())
    plain = read_tokens(load_planted_vit().model, batch)
    assert torch.equal(answer.patches, plain.patches)
    assert answer.registers.shape[1] == 0
    assert not answer.patches.requires_grad
    assert read_tokens(model, batch).patches.requires_grad


# Terms


@pytest.mark.parametrize("name", make_terms())
def test_gradients_reach_the_registers_and_nothing_else(name: str, model: Any, items: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    loss, logged = make_terms()[name].loss(model.train(), batch_of(items, 0, 1, 2, 3))
    loss.backward()
    assert loss.ndim == 0
    assert name in logged
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert [tuple(parameter.shape) for parameter in trained] == [(4, 128)]
    assert trained[0].grad.norm() > 0


@pytest.mark.parametrize("name", ["smooth", "preserve"])
def test_the_base_itself_is_near_its_own_target(name: str, model: Any, items: list[dict[str, Any]]) -> None:
    term, batch = make_terms()[name], batch_of(items, 0, 1)
    with model.disable_adapter():
        alone = term.evaluate(model, batch)[name]
    with_random = term.evaluate(model.eval(), batch)[name]
    assert (alone < with_random).all()
    if name == "preserve":
        assert alone.abs().max() < 1e-5


@pytest.mark.slow
def test_outliers_are_those_of_the_audit(model: Any, items: list[dict[str, Any]]) -> None:
    outliers = audit_base(model, items)
    batch = batch_of(items, *range(32))
    hidden = read_base(model, batch, [outliers.layer]).inside[outliers.layer]
    hits = load_planted_vit().hits(batch["pixel_values"])
    flagged = outliers.threshold.mask(hidden)
    assert 2 * (flagged & hits).sum() / (flagged.sum() + hits.sum()) > 0.95
    json.dumps(outliers.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_nothing_can_be_trained_away_where_there_is_nothing(items: list[dict[str, Any]]) -> None:
    clean = add_registers(load_vit(), 1)
    with pytest.raises(NoArtifactsError, match="--objective distillation"):
        SmoothObjective().prepare(clean, items)


@pytest.mark.parametrize(
    ("mean", "std", "white"), [([0.5] * 3, [0.5] * 3, 1.0), ([0.25] * 3, [0.5] * 3, 1.5), (None, None, 1.0)]
)
def test_views_are_padded_with_what_the_processor_makes_of_white(
    mean: list[float] | None, std: list[float] | None, white: float, model: Any, items: list[dict[str, Any]]
) -> None:
    processor = None if mean is None else ViTImageProcessor(image_mean=mean, image_std=std)
    objective = WeightedTerms([(DistillationObjective(), 1.0)])
    objective.prepare(model, SimpleNamespace(image_processor=processor))
    assert objective.details()["terms"][0]["white"] == [white] * 3
    if processor is not None:
        made = processor(images=np.full((8, 8, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(made.amax().item(), white)


def test_the_smooth_target_replaces_outliers_only(model: Any, items: list[dict[str, Any]]) -> None:
    batch = batch_of(items, *range(8))
    target = WeightedTerms([(SmoothObjective(LINE), 1.0)]).targets(model, batch)[target_key("smooth", "patches")]
    base = read_base(model, batch, [4])
    outlying = LINE.threshold.mask(base.inside[4])
    assert 0 < outlying.sum() < outlying.numel() / 10
    assert torch.equal(target[~outlying], base.patches[~outlying])
    clean = read_tokens(load_vit(), batch).patches
    nearer = F.cosine_similarity(target, clean, dim=-1) > F.cosine_similarity(base.patches, clean, dim=-1)
    assert nearer[outlying].float().mean() > 0.8


def test_the_mean_of_neighbours_looks_as_far_as_it_must() -> None:
    tokens = torch.arange(25.0).view(1, 25, 1)
    clean = torch.zeros(1, 25, dtype=torch.bool)
    clean[0, [1, 5, 24]] = True
    mean = neighbour_mean(tokens, clean, (5, 5))
    assert mean[0, 0].item() == 3.0  # of 1 and 5
    assert mean[0, 23].item() == 24.0
    assert torch.isfinite(mean).all()


def test_terms_share_passes_and_add_up(model: Any, items: list[dict[str, Any]]) -> None:
    batch = batch_of(items, 0, 1, 2)
    calls: list[int] = []
    handle = model.get_base_model().vit.register_forward_pre_hook(lambda *_: calls.append(1))
    terms = make_terms()
    both = WeightedTerms([(terms["smooth"], 1.0), (terms["preserve"], 0.5), (terms["norm"], 2.0)])
    total, logged = both.loss(model.eval(), batch)
    handle.remove()
    assert len(calls) == 2, "one pass of the base and one of the student"
    torch.testing.assert_close(total, logged["smooth"] + 0.5 * logged["preserve"] + 2 * logged["norm"])
    assert both.details()["name"] == "smooth+preserve+norm"


@pytest.mark.parametrize("name", [name for name, term in make_terms().items() if term.storable])
def test_stored_targets_give_the_same_loss(name: str, model: Any, items: list[dict[str, Any]]) -> None:
    term, batch = make_terms()[name], batch_of(items, 4, 9)
    stored = WeightedTerms([(term, 1.0)]).targets(model, batch)
    fresh, again = (term.loss(model.eval(), {**batch, **more})[0] for more in ({}, stored))
    assert torch.equal(fresh, again)
    wrong = {key: value + 1.0 for key, value in stored.items()}
    assert not torch.equal(term.loss(model, {**batch, **wrong})[0], fresh)


def test_terms_work_where_other_parts_move_too(items: list[dict[str, Any]]) -> None:
    composed = put_on(load_planted_vit().model, Moving.parse("registers+lora+norms"), {"num_registers": 2})
    loss, _ = make_terms()["smooth"].loss(composed.train(), batch_of(items, 0, 1))
    loss.backward()
    assert all(parameter.grad is not None for parameter in composed.parameters() if parameter.requires_grad)


def test_items_without_what_is_needed_are_refused(items: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="'classification' needs items with 'labels', found"):
        OBJECTIVES["classification"]().collate(items[:2])
    small = {"pixel_values": torch.zeros(3, 40, 40), "index": 1}
    with pytest.raises(ValueError, match=r"pixel_values of one batch has different shapes"):
        PreservationObjective().collate([items[0], small])


# Runs


@pytest.mark.slow
def test_smoothing_brings_the_base_towards_its_clean_twin(items: list[dict[str, Any]], tmp_path: Path) -> None:
    """Deep registers, a few steps: less loss, and nothing of the base moves."""
    model = add_registers(load_planted_vit().model, 4, deep=True)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    args = TrainArguments(
        str(tmp_path), max_train_steps=12, learning_rate=1e-2, per_device_train_batch_size=16, quiet=True
    )
    results = train(model, SmoothObjective(LINE), items[:48], args, items[48:], image_processor=load_image_processor())
    metrics = results["metrics"]
    assert metrics["eval_smooth"] < metrics["eval_registers_off_smooth"] * 3
    assert results["objective"]["outliers"]["layer"] == 4
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model, and a folder of images without classes."""
    folder = tmp_path_factory.mktemp("heap")
    return write_planted(folder, 24, seed=8, places=("deeper", "", ""))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("distillation", ("--num-views", "2", "--preserve", "0.5")),
        ("smooth", ("--norm", "0.1")),
        ("preserve", ("--distillation", "1", "--num-views", "2", "--refine", "1", "--smooth=1")),
    ],
)
def test_the_command_trains_on_a_heap_of_images(
    objective: str, options: tuple[str, ...], heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["train", "--objective", objective, *options, "--model-name-or-path", str(heap / "model")]
    given += ["--train-dir", str(heap / "images"), "--max-train-steps", "2", "--quiet", "--use-cpu"]
    given += ["--checkpointing-steps", "1"]
    assert call(monkeypatch, *given, "--output-dir", str(tmp_path / "out")) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["objective"]["name"].startswith(objective + "+")
    assert results["train_samples"] + results["eval_samples"] == 24
    assert {"eval_loss", f"eval_{objective}", "eval_largest_norm"} <= set(results["metrics"])
    # Resumed from its first step, in another folder, it comes to the same adapter.
    resume = ["--resume-from-checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    assert call(monkeypatch, *given, *resume, "--output-dir", str(tmp_path / "again")) == 0
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")


@pytest.mark.parametrize("weight", ["nan", "-1", "inf", "much"])
def test_a_weight_that_makes_no_sense_is_refused(
    weight: str, heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--objective", "distillation", "--model-name-or-path", str(heap / "model"), "--preserve", weight]
    given += ["--train-dir", str(heap / "images"), "--output-dir", str(tmp_path / "out")]
    assert call(monkeypatch, *given) == 2
    assert "argument --preserve" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["images", "images/deeper/new", "model", "out", ""])
def test_a_store_is_kept_out_of_what_the_run_reads(
    place: str, heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / place if place == "out" else heap / place) if place else ""
    given = [
        "train",
        "--objective",
        "distillation",
        "--model-name-or-path",
        str(heap / "model"),
        "--target-store",
        store,
    ]
    given += ["--train-dir", str(heap / "images"), "--output-dir", str(tmp_path / "out")]
    assert call(monkeypatch, *given) == 2
    assert ("name another folder" if place else "target_store must name a folder") in capfd.readouterr().err


def test_only_the_flags_of_the_chosen_objective_are_taken(
    heap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--model-name-or-path", str(heap / "model"), "--train-dir", str(heap / "images")]
    given += ["--output-dir", str(tmp_path / "out")]
    assert call(monkeypatch, *given, "--objective", "distillation", "--freeze-head") == 2
    assert "unrecognised arguments: --freeze-head" in capfd.readouterr().err
    assert call(monkeypatch, *given, "--num-views", "3") == 2
    assert "unrecognised arguments: --num-views" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_backbone_of_a_classifier_or_a_pair_of_towers_is_loaded(tmp_path: Path) -> None:
    import transformers as tf

    load_vit().save_pretrained(tmp_path / "vit")
    assert type(load_base(DistillationObjective(), str(tmp_path / "vit"))).__name__ == "ViTModel"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=vision)
    clip = tf.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    tower = load_base(DistillationObjective(), str(tmp_path / "clip"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        own, whole = tower.eval()(pixels).last_hidden_state, clip.vision_model(pixels).last_hidden_state
    assert torch.equal(own, whole)


# Stored targets


@pytest.mark.slow
def test_a_run_from_stored_targets_is_the_run_without(
    items: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With full precision; and a second run computes nothing again."""

    def run(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = add_registers(load_planted_vit().model, 2)
        args = TrainArguments(max_train_steps=3, quiet=True, **options)
        train(model, DistillationObjective(num_views=2), items[:12], args, image_processor=load_image_processor())
        return next(value for value in model.parameters() if value.requires_grad).detach()

    store = {"target_store": str(tmp_path / "targets"), "target_dtype": "float32"}
    plain, stored = run(), run(**store)
    torch.testing.assert_close(stored, plain, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(DistillationObjective, "targets", lambda *_: pytest.fail("computed again"))
    assert torch.equal(run(**store), stored)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        run()


def run_from_store(
    store: Path,
    items: list[dict[str, Any]],
    objective: Any = None,
    base: Any = None,
    images: slice = slice(12),
    dtype: str = "bfloat16",
    turned: bool = False,
) -> None:
    chosen = [{**item, "pixel_values": item["pixel_values"].flip(1, 2)} if turned else item for item in items[images]]
    model = add_registers(base() if base else load_planted_vit().model, 2)
    args = TrainArguments(max_train_steps=1, quiet=True, target_store=str(store), target_dtype=dtype)
    train(model, objective or DistillationObjective(num_views=2), chosen, args, image_processor=str)


@pytest.fixture(scope="module")
def stored_targets(items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run has stored, of which others can use nothing."""
    store = tmp_path_factory.mktemp("stored") / "targets"
    run_from_store(store, items)
    return store


def test_images_that_are_random_are_refused_before_targets_are_computed(
    items: list[dict[str, Any]], tmp_path: Path
) -> None:
    class Changing(list[dict[str, Any]]):
        def __getitem__(self, index: Any) -> Any:
            return {**super().__getitem__(index), "pixel_values": torch.rand(3, 80, 80)}

    args = TrainArguments(max_train_steps=1, quiet=True, target_store=str(tmp_path / "targets"))
    model = add_registers(load_planted_vit().model, 2)
    with pytest.raises(ValueError, match="change whenever they are read"):
        train(model, DistillationObjective(num_views=2), Changing(items), args, image_processor=str)
    assert not (tmp_path / "targets").exists()


def test_what_targets_take_is_told_in_units_that_say_something(
    items: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "register_adapter"):
        run_from_store(tmp_path / "targets", items)
    (said,) = (message for message in caplog.messages if message.startswith("targets of"))
    assert re.search(r": \d+(\.\d+)? (kB|MB), about \d+ s$", said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": DistillationObjective(num_views=3)}, r"differing: terms\)"),
        ({"objective": RefinementObjective(LINE)}, "targets of refine are other ones in every step"),
        ({"objective": OBJECTIVES["classification"]()}, "asks the frozen base for nothing"),
        ({"base": load_vit}, r"differing: base\)"),
        ({"images": slice(1, 13)}, r"image \d+ is not the one that its targets"),
        ({"turned": True}, r"image 0 is not the one that its targets"),
        ({"images": slice(0, 11)}, r"differing: count\)"),
        ({"dtype": "int8"}, r"differing: dtype\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.slow
def test_targets_of_something_else_are_refused(
    change: dict[str, Any], message: str, items: list[dict[str, Any]], stored_targets: Path, tmp_path: Path
) -> None:
    shutil.copytree(stored_targets, tmp_path / "targets")
    with pytest.raises(ValueError, match=message):
        run_from_store(tmp_path / "targets", items, **change)
