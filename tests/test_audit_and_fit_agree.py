"""The audit and the fit give one answer to one question, and attention that norms do not explain is named by both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import build
from torch import nn

from register_adapter import ArtifactReport, NoArtifactsError, audit, capture, fit_test_time_registers
from register_adapter.artifacts import Threshold, resolve_rule
from register_adapter.neurons import parts
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit


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


def _drawing() -> tuple[nn.Module, torch.Tensor]:
    """A model one of whose patches in each image gets most of the attention, with a norm like the others'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, pixels = build("ijepa").eval(), torch.randn(12, 3, 32, 32)
        special = torch.randn(3, 8, 8)
    height = pixels.shape[2] // model.config.patch_size
    side = model.config.patch_size
    places = [(7 * index) % (height * height) for index in range(len(pixels))]
    for image, place in zip(pixels, places, strict=True):
        row, column = divmod(place, height)
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = special[:, :side, :side]
    block = model.encoder.layer[1] if hasattr(model, "encoder") else model.layers[1]
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(pixel_values=pixels)
    hidden = block.layernorm_before(trace.patches(1))
    marked = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    marked[range(len(places)), places] = True
    direction = hidden[marked].mean(0) - hidden[~marked].mean(0)
    query, key = _projections(block)
    with torch.no_grad():
        query.weight.zero_()
        query.bias.fill_(1.0)
        key.weight.copy_(40 * direction / direction.norm() ** 2 / query.bias.shape[0] ** 0.5)
        key.bias.zero_()
    return model, pixels


def _projections(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The queries' and the keys' layer, by either version of transformers."""
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    return named.get("query", named.get("q_proj")), named.get("key", named.get("k_proj"))  # type: ignore[return-value]


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
