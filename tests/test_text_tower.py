"""The text tower that zero-shot classification is measured with on the test bed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from training_helpers import ROOT

from register_adapter import RegisterConfig, compose
from register_adapter.evaluation import evaluate_zero_shot
from register_adapter.testbed import LABELS, load_vit


@pytest.fixture
def text_tower(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import text_tower

    monkeypatch.setattr(text_tower, "_STEPS", 2)
    return text_tower


def test_images_are_seen_by_the_model_with_all_its_adapters(text_tower: Any) -> None:
    pixels = torch.randn(8, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    tower = text_tower.TextTower(load_vit(), pixels, torch.arange(8), 0)
    lora = LoraConfig(target_modules=["q_proj", "query"], r=2, init_lora_weights=False)
    model = compose(load_vit(), {"registers": RegisterConfig(num_registers=2, init_std=2.0), "lora": lora}).eval()
    images = torch.randn(4, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    pair = tower.beside(model)
    with torch.no_grad():
        wanted, plain = model(pixel_values=images).logits, load_vit()(pixel_values=images).logits
        seen = pair.get_image_features(pixel_values=images)
        seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
        assert torch.equal(model.get_base_model().classifier(seen), wanted)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    report = evaluate_zero_shot(pair, (images, [0, 1, 2, 3]), LABELS[:4], tokenizer=tower.tokenize)
    assert len(report.rows[0].values) == 4


def test_every_colour_and_shape_is_in_a_caption(text_tower: Any) -> None:
    named = {word for label in LABELS if label not in text_tower.UNNAMED for word in label.split()}
    assert named == {word for label in LABELS for word in label.split()}
    assert len(set(text_tower.UNNAMED)) == 6
