"""Patches that stand apart at the input of the first block already are the images' own, and no artifacts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from register_adapter import audit, find_tower, fit_test_time_registers
from register_adapter.errors import NoArtifactsError


@pytest.fixture(scope="module")
def model() -> Any:
    """A ViT whose blocks change little; its embedding knows no position, so that empty patches have small norms."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    made = tf.ViTModel(tf.ViTConfig(**sizes, image_size=64, patch_size=8), add_pooling_layer=False).eval()
    with torch.no_grad():
        made.embeddings.position_embeddings.zero_()
        made.embeddings.patch_embeddings.projection.weight.normal_(std=0.2)
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """``(16, 3, 64, 64)`` of noise, three patches of 64 in each nearly empty."""
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3, 8, 8, 8, 8, generator=drawn)  # rows, columns, and the pixels of a patch
    for image in pixels:
        for place in torch.randperm(64, generator=drawn)[:3].tolist():
            image[:, place // 8, place % 8] *= 0.05
    return pixels.permute(0, 1, 2, 4, 3, 5).reshape(16, 3, 64, 64)


def test_a_group_that_is_given_is_no_artifact(model: Any, images: torch.Tensor) -> None:
    report = audit(model, images, progress=False)
    assert report.layers[0].threshold.separated
    assert report.layers[0].low_share == pytest.approx(3 / 64, abs=0.005)
    assert report.verdict == "none"
    assert [layer.outlier_share for layer in report.layers[1:]] == [0, 0, 0]
    assert "4.69% do so at the input of the first block already, which is the images' own" in report.reason
    with pytest.raises(NoArtifactsError):
        fit_test_time_registers(model, images, progress=False)


@pytest.mark.parametrize("rule", ["sigma:2", "percentile:5", "two_sided_percentile:95"])
def test_a_rule_that_does_not_ask_keeps_its_lines(model: Any, images: torch.Tensor, rule: str) -> None:
    report = audit(model, images, rule=rule, progress=False)
    assert all(layer.outlier_share > 0 for layer in report.layers[1:])


@pytest.mark.parametrize("side", ["larger", "smaller"])
def test_what_the_model_adds_counts(model: Any, images: torch.Tensor, side: str) -> None:
    """Before the second block other patches are made outliers, or the same ones much smaller still."""

    def write(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        first, patches = hidden[:, :1], hidden[:, 1:]
        if side == "larger":
            patches = torch.cat([10 * patches[:, :2], patches[:, 2:]], 1)
        else:
            norms = patches.norm(dim=-1, keepdim=True)
            patches = torch.where(norms < 0.5 * norms.median(), 0.1 * patches, patches)
        changed = torch.cat([first, patches], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = find_tower(model).part("blocks")[0].register_forward_hook(write)
    try:
        report = audit(model, images, progress=False)
    finally:
        handle.remove()
    assert report.verdict != "none"
    layer = report.layers[2]
    shares = {"larger": layer.outlier_share - layer.low_share, "smaller": layer.low_share}
    assert shares[side] > 0.01
    assert shares["smaller" if side == "larger" else "larger"] == 0
