"""What may move beside registers: each part trains, comes back bit for bit, and leaves the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from register_adapter import load_adapters, save_adapters
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.objectives.tokens import read_base, read_tokens
from register_adapter.utils.parameters import trainable_by_part

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}


def make_dinov2() -> nn.Module:
    return tf.Dinov2Model(tf.Dinov2Config(**SIZES, **IMAGE))


def make_clip() -> nn.Module:
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**SIZES, **IMAGE, intermediate_size=64))


def make_classifier() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **IMAGE, intermediate_size=64))


def build(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().eval()
    return model


WHOLE = "registers+gates+lora+positions+patch_embedding+norms+last_blocks=2"


@pytest.mark.parametrize("text", ["registers", "lora", "registers+gates", "last_blocks=1", WHOLE])
def test_a_text_says_what_moves(text: str) -> None:
    assert str(Moving.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot train ''"),
        ("register", "cannot train 'register'; name any of registers,"),
        ("last_blocks", "cannot train 'last_blocks'"),
        ("last_blocks=0", "cannot train 'last_blocks=0'"),
        ("lora=8", "cannot train 'lora=8'"),
        ("lora+lora", "'lora' stands twice"),
        ("gates+lora", "gates are the registers'"),
    ],
)
def test_a_text_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moving.parse(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("registers+gates", {"registers", "gates"}),
        ("lora", {"lora"}),
        ("positions", {"positions"}),
        ("registers+norms", {"registers", "copies"}),
        ("registers+patch_embedding", {"registers", "copies"}),
        ("last_blocks=1", {"copies"}),
        (WHOLE, {"registers", "gates", "lora", "positions", "copies"}),
    ],
)
@pytest.mark.parametrize("make", [make_dinov2, make_clip, make_classifier])
def test_every_part_trains_and_comes_back(make: Any, text: str, parts: set[str], tmp_path: Path) -> None:
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        plain = read_tokens(build(make), pixels).patches
    model = put_on(build(make), Moving.parse(text), {"num_registers": 2})
    assert torch.equal(read_base(model, pixels).patches, plain), "the base is still there"
    assert set(trainable_by_part(model)) == parts
    tokens = read_tokens(model, pixels)
    (tokens.patches.square().mean() + tokens.summary.square().mean()).backward()
    untouched = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not untouched
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        trained = read_tokens(model.eval(), pixels).patches
        save_adapters(model, tmp_path)
        again = read_tokens(load_adapters(build(make), tmp_path).eval(), pixels).patches
    assert torch.equal(again, trained)
    assert not torch.equal(trained, plain)


def test_a_tower_without_such_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="last_blocks=4 of 3 blocks"):
        put_on(build(make_dinov2), Moving.parse("last_blocks=4"))


def test_the_text_tower_does_not_move() -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = tf.CLIPModel(tf.CLIPConfig(vision_config={**text, **IMAGE}, text_config=text)).eval()
    model = put_on(clip, Moving.parse("registers+lora+last_blocks=1"), {"target_modules": "vision_model"})
    moved = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert moved
    assert not [name for name in moved if "text_model" in name]
