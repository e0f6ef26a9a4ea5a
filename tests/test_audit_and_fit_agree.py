"""The audit and the fit give one answer to one question, and attention that norms do not explain is named by both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import build
from torch import nn

from register_adapter import (
    ArtifactReport,
    NoArtifactsError,
    RegisterAdapterError,
    audit,
    capture,
    fit_test_time_registers,
)
from register_adapter.artifacts import Threshold, resolve_rule
from register_adapter.artifacts.auditing import audit_outliers
from register_adapter.neurons import parts
from register_adapter.testbed import SceneDataset, load_grown, load_image_processor, load_planted_vit, load_vit
from register_adapter.testbed.grown import RECIPES


def _scenes(count: int, seed: int = 5) -> torch.Tensor:
    scenes = SceneDataset(count, seed=seed, split="train")
    images = [scenes[index]["image"] for index in range(count)]
    pixels: torch.Tensor = load_image_processor()(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def _ask_both(model: nn.Module, pixels: torch.Tensor, **options: Any) -> tuple[ArtifactReport, dict[str, Any] | None]:
    report = audit(model, pixels, progress=False, **options)
    try:
        fitted = fit_test_time_registers(model, pixels, progress=False, **options)
    except NoArtifactsError:
        return report, None
    record: dict[str, Any] = fitted.peft_config["default"].test_time_fit
    return report, record


@pytest.fixture
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that a few images make a fit with all three of them."""
    monkeypatch.setattr(parts, "NUM_FIRST", 8)
    monkeypatch.setattr(parts, "NUM_HELD_OUT", 6)


def _until(most: int) -> Any:
    """The audit's rule, which finds nothing more once there are more than ``most`` patches; -1: nothing before."""

    def rule(values: Any, weights: Any) -> Threshold:
        enough = weights.sum() <= most if most > 0 else weights.sum() > -most
        threshold = resolve_rule("auto")(values, weights)
        return threshold if enough else replace(threshold, separated=False)

    return rule


@pytest.mark.usefixtures("few_kept")
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("planted", "auto"),
        ("clean", "auto"),
        ("planted", _until(1500)),  # outliers in the first images, none in all of them
        ("planted", _until(-1500)),  # none in the first images, outliers in all of them
    ],
    ids=["planted", "clean", "first only", "all only"],
)
def test_one_answer(name: str, rule: Any) -> None:
    model = load_planted_vit().model if name == "planted" else load_vit()
    report, record = _ask_both(model, _scenes(24), rule=rule)
    assert (report.verdict == "none") == (record is None)
    if record is None:
        return
    assert record["verdict"] == report.verdict
    assert record["top_block"] + 1 == report.first_layer
    (lines,) = record["thresholds"]
    named = [layer for layer in report.layers[record["top_block"] + 1 :] if layer.threshold.separated]
    assert lines == {str(layer.layer): [layer.threshold.low, layer.threshold.high] for layer in named}
    assert record["num_images"]["detect"] == report.num_images


def _drawing(values: float = 1.0, place: str = "patch") -> tuple[nn.Module, torch.Tensor]:
    """A model one of whose tokens in each image gets most of the attention, with a norm like the others'.

    Args:
        values: What its value is multiplied by.
        place: Whether it is a ``"patch"``, another one in every image, or ``"cls"``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, pixels = build("ijepa" if place == "patch" else "vit").eval(), torch.randn(12, 3, 32, 32)
        special = torch.randn(3, 8, 8)
    height = pixels.shape[2] // model.config.patch_size
    side = model.config.patch_size
    places = [(7 * index) % (height * height) for index in range(len(pixels))]
    for image, spot in zip(pixels, places, strict=True):
        row, column = divmod(spot, height)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = special[:, :side, :side]
    block = model.encoder.layer[1] if hasattr(model, "encoder") else model.layers[1]
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(pixel_values=pixels)
        hidden = block.layernorm_before(trace.hidden_states[1])
    marked = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    marked[range(len(places)), places if place == "patch" else [0] * len(places)] = True
    direction = hidden[marked].mean(0) - hidden[~marked].mean(0)
    query, key, value = _projections(block)
    with torch.no_grad():
        query.weight.zero_()
        query.bias.fill_(1.0)
        key.weight.copy_(40 * direction / direction.norm() ** 2 / query.bias.shape[0] ** 0.5)
        key.bias.zero_()
        if values != 1:
            mean = hidden[marked].mean(0)
            value.bias.zero_()
            value.weight += (values - 1) * torch.outer(value.weight @ mean, mean) / mean.norm() ** 2
    return model, pixels


def _projections(block: nn.Module) -> list[nn.Linear]:
    """The layers of queries, keys and values, by either version of transformers."""
    named: Any = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    return [named.get(name, named.get(f"{name[0]}_proj")) for name in ("query", "key", "value")]


@pytest.mark.parametrize(("values", "kind"), [(0.0, "no-op"), (30.0, "broadcast")])
def test_what_draws_attention_with_values_far_off_is_an_artifact_whatever_its_norm(values: float, kind: str) -> None:
    model, pixels = _drawing(values)
    report = audit(model, pixels, progress=False)
    assert (report.verdict, report.evidence, report.kind) == ("present inside only", "attention", kind)
    assert report.summary == f"present inside only, by attention ({kind})"
    assert not report.unexplained
    assert not any(layer.threshold.separated for layer in report.layers[1:])
    assert report.first_layer is report.most_outlying is None
    layer = report.most_telling
    assert layer is not None
    assert layer.layer == 1
    again = ArtifactReport.from_dict(report.to_dict())
    assert (again.evidence, again.kind, again.reason) == (report.evidence, report.kind, report.reason)
    assert again.layers[1].gathered == layer.gathered
    assert audit(model, pixels, attentions=False, progress=False).verdict == "none"
    with pytest.raises(
        RegisterAdapterError, match=f"has artifacts .present inside only, by attention .{kind}"
    ) as refusal:
        fit_test_time_registers(model, pixels, progress=False)
    assert not isinstance(refusal.value, NoArtifactsError)


def test_a_sink_on_cls_is_no_artifact() -> None:
    model, pixels = _drawing(0.0, "cls")
    report = audit(model, pixels, progress=False)
    assert report.layers[1].attention is not None
    assert min(report.layers[1].attention.from_all["cls"]) > 0.9
    assert report.summary == report.verdict == "none"
    assert report.evidence is report.kind is None


def _never(values: Any, weights: Any) -> Threshold:
    return Threshold("never", reason="the rule draws no line")


@pytest.mark.usefixtures("few_kept")
@pytest.mark.parametrize("twin", [None, "registers"])
def test_where_norms_show_nothing_attention_gives_both_the_same_answer(twin: Any) -> None:
    model = load_grown("tiles", twin).backbone
    pixels = RECIPES["tiles"].task.draw(32, seed=5).pixel_values
    report = audit(model, pixels, rule=_never, progress=False)
    assert report.evidence == (None if twin else "attention")
    if twin:  # a model with registers is not fitted
        assert report.summary == "none"
        return
    audited = audit_outliers(model, pixels, _never)
    report, record = _ask_both(model, pixels, rule=_never)
    assert record is not None
    assert record["verdict"] == report.verdict == audited.verdict == "present inside only"
    assert audited.most_outlying is not None
    assert audited.most_outlying == report.most_outlying
    assert record["top_block"] + 1 == report.first_layer
    (lines,) = record["thresholds"]
    drawn = [layer for layer in report.layers if layer.threshold.separated]
    assert {layer.threshold.rule for layer in drawn} == {"attention"}
    assert lines == {str(layer.layer): [layer.threshold.low, layer.threshold.high] for layer in drawn}
    assert all(0.05 < layer.outlier_share < 0.08 for layer in drawn)


def test_grown_sinks_are_named_by_norms_and_attention() -> None:
    report = audit(
        load_grown("mosaics").backbone, RECIPES["mosaics"].task.draw(32, seed=5).pixel_values, progress=False
    )
    assert (report.evidence, report.kind) == ("both", "no-op")


def test_a_bare_none_never_stands_where_few_patches_draw_most_of_the_attention() -> None:
    model, pixels = _drawing()
    report = audit(model, pixels, progress=False)
    assert report.verdict == "none"
    layer = report.most_gathered
    assert report.unexplained
    assert layer is not None
    assert layer.layer == 1
    assert layer.gathered is not None
    assert layer.gathered.attention > 0.5
    assert layer.gathered.patches == pytest.approx(1 / report.grid[0] / report.grid[1], rel=0.2)
    for words in (report.summary, report.reason, repr(report)):
        assert "a few patches draw most of the attention" in words
    assert f"{layer.gathered.attention:.0%}" in report.reason
    assert "in block 1" in report.reason
    again = ArtifactReport.from_dict(report.to_dict())
    assert again.unexplained
    assert again.layers[1].gathered == layer.gathered
    with pytest.raises(NoArtifactsError, match="a few patches draw most of the attention: in block 1") as refusal:
        fit_test_time_registers(model, pixels, progress=False)
    assert "needs no registers" not in str(refusal.value)


@pytest.mark.parametrize("name", ["clean", "vit", "siglip", "ijepa"])
def test_clean_and_random_models_get_no_warning(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_vit() if name == "clean" else build(name).eval()
        size = 80 if name == "clean" else 32
        pixels = _scenes(12) if name == "clean" else torch.randn(16, 3, size, size)
    report = audit(model, pixels, progress=False)
    assert report.summary == report.verdict == "none"
    assert not report.unexplained
    assert "draw most" not in report.reason


def test_without_attention_statistics_the_reason_says_so() -> None:
    report = audit(load_vit(), _scenes(4), attentions=False, progress=False)
    assert report.most_gathered is None
    assert "Attention was not measured" in report.reason
    assert "Attention gathers" in audit(load_vit(), _scenes(4), progress=False).reason
