"""Tiny random models, one a family and head class, with inputs: what the tests run over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import nn

IMAGE, PATCH, WIDTH, BLOCKS, HEADS, LABELS = 32, 8, 32, 2, 4, 5
PATCHES = (IMAGE // PATCH) ** 2

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_MLP: dict[str, Any] = {"intermediate_size": 2 * WIDTH}
_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IMAGE_TOKEN = 63


def _vit(**options: Any) -> tf.ViTConfig:
    return tf.ViTConfig(**_SHAPE, **_MLP, encoder_stride=PATCH, num_labels=LABELS, **options)


def _deit(**options: Any) -> tf.DeiTConfig:
    return tf.DeiTConfig(**_SHAPE, **_MLP, encoder_stride=PATCH, num_labels=LABELS, **options)


def _dinov2(kind: type = tf.Dinov2Config, **options: Any) -> Any:
    return kind(**{**_SHAPE, **options}, mlp_ratio=2, num_labels=LABELS)


def _dinov2_registers(**options: Any) -> Any:
    return _dinov2(tf.Dinov2WithRegistersConfig, num_register_tokens=3, **options)


def _clip_vision(**options: Any) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**_SHAPE, **_MLP, projection_dim=16, **options)


def _clip(**options: Any) -> tf.CLIPConfig:
    return tf.CLIPConfig(text_config=_TEXT, vision_config=_clip_vision(), projection_dim=16, **options)


def _siglip_vision() -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**_SHAPE, **_MLP)


def _siglip(**options: Any) -> tf.SiglipConfig:
    text = {**_TEXT, "projection_size": WIDTH}
    return tf.SiglipConfig(text_config=text, vision_config=_siglip_vision().to_dict(), **options)


def _llava() -> Any:
    text = tf.LlamaConfig(**_TEXT, num_key_value_heads=HEADS)
    config = tf.LlavaConfig(vision_config=_clip_vision(), text_config=text, image_token_id=_IMAGE_TOKEN)
    return tf.LlavaForConditionalGeneration(config)


def _dual_encoder() -> Any:
    vision, text = _vit(), tf.BertConfig(**_TEXT)
    return tf.VisionTextDualEncoderModel(
        tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    )


def _captioner() -> Any:
    decoder = tf.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True)
    return tf.VisionEncoderDecoderModel(tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(_deit(), decoder))


def _depth() -> Any:
    backbone = _dinov2(num_hidden_layers=4, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = tf.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_factors=[2, 1, 1, 1]
    )
    model = tf.DPTForDepthEstimation(config)
    # Otherwise the last ReLU can be dead, and no gradient comes through.
    torch.nn.init.constant_(model.head.head[4].bias, 1.0)
    return model


@dataclass(frozen=True)
class Case:
    """A model to test.

    Attributes:
        family: Family in the package's table.
        make: Builds the model with random weights.
        inputs: Names of the inputs beside ``pixel_values``.
        output: Name of the output that a loss is taken of.
        whole: Whether the model is a vision model (its outputs have hidden states), not one part of a larger model.
    """

    family: str
    make: Callable[[], Any]
    inputs: tuple[str, ...] = ()
    output: str = "last_hidden_state"
    whole: bool = True


def _backbone(kind: str, config: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, kind)(config(out_indices=[1, 2], **options))


CASES: dict[str, Case] = {
    "vit": Case("vit", lambda: tf.ViTModel(_vit())),
    "vit-classifier": Case("vit", lambda: tf.ViTForImageClassification(_vit()), output="logits"),
    "vit-masked": Case(
        "vit", lambda: tf.ViTForMaskedImageModeling(_vit()), inputs=("bool_masked_pos",), output="reconstruction"
    ),
    "deit": Case("deit", lambda: tf.DeiTModel(_deit())),
    "deit-classifier": Case("deit", lambda: tf.DeiTForImageClassification(_deit()), output="logits"),
    "deit-teacher": Case("deit", lambda: tf.DeiTForImageClassificationWithTeacher(_deit()), output="logits"),
    "deit-masked": Case(
        "deit", lambda: tf.DeiTForMaskedImageModeling(_deit()), inputs=("bool_masked_pos",), output="reconstruction"
    ),
    "clip-vision": Case("clip", lambda: tf.CLIPVisionModel(_clip_vision())),
    "clip-projection": Case("clip", lambda: tf.CLIPVisionModelWithProjection(_clip_vision()), output="image_embeds"),
    "clip-classifier": Case("clip", lambda: tf.CLIPForImageClassification(_clip(num_labels=LABELS)), output="logits"),
    "clip": Case(
        "clip",
        lambda: tf.CLIPModel(_clip()),
        inputs=("input_ids", "attention_mask"),
        output="logits_per_image",
        whole=False,
    ),
    "dinov2": Case("dinov2", lambda: tf.Dinov2Model(_dinov2())),
    "dinov2-swiglu": Case("dinov2", lambda: tf.Dinov2Model(_dinov2(use_swiglu_ffn=True))),
    "dinov2-classifier": Case("dinov2", lambda: tf.Dinov2ForImageClassification(_dinov2()), output="logits"),
    "dinov2-backbone": Case("dinov2", _backbone("Dinov2Backbone", _dinov2), output="feature_maps"),
    "dinov2-registers": Case("dinov2_with_registers", lambda: tf.Dinov2WithRegistersModel(_dinov2_registers())),
    "dinov2-registers-classifier": Case(
        "dinov2_with_registers",
        lambda: tf.Dinov2WithRegistersForImageClassification(_dinov2_registers()),
        output="logits",
    ),
    "dinov2-registers-backbone": Case(
        "dinov2_with_registers", _backbone("Dinov2WithRegistersBackbone", _dinov2_registers), output="feature_maps"
    ),
    "siglip-vision": Case("siglip", lambda: tf.SiglipVisionModel(_siglip_vision())),
    "siglip-classifier": Case(
        "siglip", lambda: tf.SiglipForImageClassification(_siglip(num_labels=LABELS)), output="logits"
    ),
    "siglip": Case(
        "siglip", lambda: tf.SiglipModel(_siglip()), inputs=("input_ids",), output="logits_per_image", whole=False
    ),
    "llava": Case("clip", _llava, inputs=("image_text",), output="logits", whole=False),
    "dual-encoder": Case(
        "vit", _dual_encoder, inputs=("input_ids", "attention_mask"), output="logits_per_image", whole=False
    ),
    "captioner": Case("deit", _captioner, inputs=("decoder_input_ids",), output="logits", whole=False),
    "depth": Case("dinov2", _depth, output="predicted_depth", whole=False),
}
#: The bare tower of every family.
TOWERS = ("vit", "deit", "clip-vision", "dinov2", "dinov2-swiglu", "dinov2-registers", "siglip-vision")


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Move every parameter, so that biases, layer norms, layer scales and tokens are not at trivial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@cache
def _built(name: str) -> Any:
    with torch.random.fork_rng():  # lest the first use of a model changes what a test draws next
        torch.manual_seed(0)
        model = CASES[name].make()
    perturb(model)
    return model.eval()


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of the model ``name``, frozen, in evaluation mode; the same weights at every call."""
    model = copy.deepcopy(_built(name)).requires_grad_(False).to(dtype)
    model.set_attn_implementation(attention)
    return model


def make_inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, size: int = IMAGE) -> dict[str, Any]:
    """Random inputs for the model ``name``, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Any] = {"pixel_values": torch.randn(batch, 3, size, size, generator=generator).to(dtype)}
    ids = torch.randint(3, 60, (batch, 6), generator=generator)
    ids[:, -1] = 2
    for kind in CASES[name].inputs:
        if kind == "bool_masked_pos":
            values[kind] = torch.rand(batch, PATCHES, generator=generator) < 0.5
        elif kind == "attention_mask":
            values[kind] = torch.ones_like(ids)
        elif kind == "image_text":
            image = torch.full((batch, PATCHES), _IMAGE_TOKEN)
            values["input_ids"] = torch.cat([image, ids], dim=1)
            values["attention_mask"] = torch.ones_like(values["input_ids"])
        else:
            values[kind] = ids
    return values
