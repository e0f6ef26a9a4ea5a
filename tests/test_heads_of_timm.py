"""Heads within the tower, as timm's: named for training, of other classes, and left out where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from register_adapter import add_registers
from register_adapter.training.bases import load_base, wrap
from register_adapter.training.objectives import ClassificationObjective, DistillationObjective

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
CLASSES = ["cat", "cup", "sea"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of timm with ten classes, as transformers saves it."""
    folder = tmp_path_factory.mktemp("timm")
    config = TimmWrapperConfig(architecture=ARCHITECTURE, model_args=ARGUMENTS, num_labels=10)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_head_within_the_tower_is_trained_and_loaded(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no head 'classifier'; it has \['timm_model.head'\]. Name the head"):
        load_base(ClassificationObjective(CLASSES), str(classifier))
    objective = ClassificationObjective(CLASSES, head="timm_model.head")
    model = wrap(load_base(objective, str(classifier)), objective, num_registers=2).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
    own = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(classifier), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(own(pixel_values=images).logits, expected)
    assert expected.shape == (2, len(CLASSES))
    with pytest.warns(UserWarning, match="'timm_model.head' .* it is left out"):
        bare = PeftModel.from_pretrained(AutoModel.from_pretrained(classifier), str(tmp_path)).eval()
    with torch.no_grad():
        features = bare(pixel_values=images).pooler_output
        assert torch.allclose(model.get_base_model().timm_model.head(features), expected, atol=1e-5)


def _replaced() -> Any:
    model = timm.create_model(ARCHITECTURE, num_classes=3, **ARGUMENTS)
    model.head = nn.Identity()
    return model


@pytest.mark.parametrize(
    "bare", [lambda: timm.create_model(ARCHITECTURE, num_classes=0, **ARGUMENTS), _replaced], ids=["timm", "replaced"]
)
def test_an_empty_place_of_a_head_is_no_head(bare: Any, tmp_path: Path) -> None:
    whole, base = timm.create_model(ARCHITECTURE, num_classes=3, **ARGUMENTS), bare()
    base.load_state_dict(whole.state_dict(), strict=False)
    model = add_registers(whole, 2, modules_to_save=["head"]).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="'head' .* it is left out"):
        again = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(model.get_base_model().head(again(images)), model(images), atol=1e-5)


def test_a_tower_without_a_class_with_a_head_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(CLIPVisionConfig\) has no class with a head .*--objective distillation"):
        load_base(ClassificationObjective(CLASSES), str(tmp_path))
    assert load_base(DistillationObjective(), str(tmp_path)).config.hidden_size == 16
