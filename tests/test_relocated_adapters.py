"""Adapters of several methods where the tower lies elsewhere: trained on a backbone, used under a head, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import assert_identical
from peft import IA3Config, LoHaConfig, LoraConfig
from torch import nn

from register_adapter import RegisterConfig, compose, load_adapters
from register_adapter.training.moving import Moving, put_on
from register_adapter.training.objectives.tokens import read_tokens

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
VIT, DINO = tf.ViTConfig(**SIZES, **IMAGE), tf.Dinov2Config(**{**SIZES, "intermediate_size": 128}, **IMAGE)
CLIP = tf.CLIPConfig(vision_config={**SIZES, **IMAGE}, text_config={**SIZES, "vocab_size": 99})
# A backbone, a model that has it inside, and its place there.
PAIRS = {
    "vit": (lambda: tf.ViTModel(VIT), lambda: tf.ViTForImageClassification(VIT), "vit"),
    "dinov2": (lambda: tf.Dinov2Model(DINO), lambda: tf.Dinov2ForImageClassification(DINO), "dinov2"),
    # The text tower has layers of the same names.
    "clip": (lambda: tf.CLIPVisionModel(CLIP.vision_config), lambda: tf.CLIPModel(CLIP), "vision_model"),
}
MOVED = ["lora", "registers+lora", "registers+norms+last_blocks=1", "registers+gates+lora+patch_embedding"]


def pair(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A backbone, a model around it with the same weights, and the tower inside that model."""
    small, large, place = PAIRS[name]
    torch.manual_seed(0)
    backbone, whole = small().eval(), large().eval()
    inside = whole.get_submodule(place)
    tower = backbone if type(backbone) is type(inside) else getattr(backbone, place, backbone)
    own = {key: value for key, value in tower.state_dict().items() if key in inside.state_dict()}
    inside.load_state_dict(own, strict=False)
    return backbone, whole, inside


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """With trained values: LoRA and gates begin with no effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@torch.no_grad()
def patches(model: nn.Module, whole: bool) -> torch.Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    if not whole:
        return read_tokens(model, {"pixel_values": pixels}).patches
    base = model.get_base_model()  # type: ignore[operator]
    if hasattr(base, "get_image_features"):
        return read_tokens(base.vision_model, {"pixel_values": pixels}).patches
    return read_tokens(model, {"pixel_values": pixels}).patches


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("name", PAIRS)
def test_what_was_trained_on_a_backbone_works_under_a_head_and_back(name: str, moved: str, tmp_path: Path) -> None:
    backbone, whole, _ = pair(name)
    trained = shaken(put_on(backbone, Moving.parse(moved), {"num_registers": 2}))
    expected = patches(trained, whole=False)
    compose(trained, {}).save_pretrained(tmp_path / "out")
    loaded = load_adapters(whole, tmp_path / "out").eval()
    text = [key for key, _ in loaded.named_parameters() if "text_model" in key]
    assert not any("lora" in key or "ln_tuning" in key for key in text)
    torch.testing.assert_close(patches(loaded, whole=True), expected)

    loaded.save_pretrained(tmp_path / "again")
    fresh, _, _ = pair(name)
    back = load_adapters(fresh, tmp_path / "again").eval()
    torch.testing.assert_close(patches(back, whole=False), expected)


TARGETS = {
    "an end of names": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
    "a longer end": lambda: LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj", "fc1"]),
    "a pattern": lambda: LoraConfig(r=2, target_modules=r"(.*\.)?encoder\.layers\.\d\.mlp\.fc\d"),
    "some layers": lambda: LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1]),
    "ranks": lambda: LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"encoder.layers.0.self_attn.q_proj": 3}),
    "parameters": lambda: LoraConfig(r=2, target_modules=[], target_parameters=["layers.0.mlp.fc1.weight"]),
    "norms": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layer_norm1", "post_layernorm"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=["out_proj"]),
}


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("targets", TARGETS)
def test_names_that_fit_the_text_tower_too_stay_in_the_vision_tower(targets: str, kind: str, tmp_path: Path) -> None:
    _, whole, _ = pair("clip")
    config = {"default": RegisterConfig(num_registers=2), "other": TARGETS[targets]()}
    state = {key.removeprefix("vision_model."): value for key, value in whole.vision_model.state_dict().items()}

    def tower() -> Any:
        made = getattr(tf, kind)(whole.config.vision_config).eval()
        into = getattr(made, "vision_model", made)
        into.load_state_dict(state, strict=False)
        return made

    trained = shaken(compose(tower(), config))
    trained.save_pretrained(tmp_path / "out")
    loaded = load_adapters(whole, tmp_path / "out").eval()
    assert not any("text_model" in key for key, value in loaded.named_parameters() if value.requires_grad)
    expected = patches(trained, whole=False)
    torch.testing.assert_close(patches(loaded, whole=True), expected)

    loaded.save_pretrained(tmp_path / "again")
    back = load_adapters(tower(), tmp_path / "again").eval()
    torch.testing.assert_close(patches(back, whole=False), expected)


def test_names_that_were_trained_in_both_towers_are_found_in_both(tmp_path: Path) -> None:
    _, whole, _ = pair("clip")
    trained = shaken(compose(whole, {"lora": LoraConfig(r=2, target_modules=["q_proj"])}))
    trained.save_pretrained(tmp_path)
    _, again, _ = pair("clip")
    loaded = load_adapters(again, tmp_path).eval()
    values = {key: value for key, value in trained.state_dict().items() if "lora" in key}
    assert any("text_model" in key for key in values)
    assert_identical(values, {key: value for key, value in loaded.state_dict().items() if "lora" in key})


def test_values_are_put_into_a_model_with_a_head(tmp_path: Path) -> None:
    backbone, whole, _ = pair("vit")
    trained = shaken(put_on(backbone, Moving.parse("registers+lora"), {"num_registers": 2}))
    trained.save_pretrained(tmp_path)
    other = put_on(whole, Moving.parse("registers+lora"), {"num_registers": 2})
    other.load_adapter(tmp_path, "lora")
    torch.testing.assert_close(patches(other.eval(), whole=True), patches(trained, whole=False))
