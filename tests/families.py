"""Tiny random models, one a family and head class, with inputs: what the tests run over."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import cases_clip
import cases_vit
import cases_vlm
import pytest
import torch
import transformers as tf
from cases_base import (
    BLOCKS,
    HEADS,
    IMAGE,
    IMAGE_TOKEN,
    LABELS,
    MLP,
    PATCH,
    PATCHES,
    SHAPE,
    TEXT,
    WIDTH,
    Case,
    llama,
)
from torch import nn

from register_adapter import AdapterFileError

__all__ = [
    "BLOCKS",
    "CASES",
    "FAMILIES",
    "HEADS",
    "IMAGE",
    "KINDS",
    "LABELS",
    "PATCH",
    "PATCHES",
    "TOWERS",
    "WIDTH",
    "Case",
    "build",
    "make_inputs",
    "perturb",
]


def _vit(**options: Any) -> tf.ViTConfig:
    return tf.ViTConfig(**SHAPE, **MLP, encoder_stride=PATCH, num_labels=LABELS, **options)


def _deit(**options: Any) -> tf.DeiTConfig:
    return tf.DeiTConfig(**SHAPE, **MLP, encoder_stride=PATCH, num_labels=LABELS, **options)


def _dinov2(kind: type = tf.Dinov2Config, **options: Any) -> Any:
    return kind(**{**SHAPE, **options}, mlp_ratio=2, num_labels=LABELS)


def _dinov2_registers(**options: Any) -> Any:
    return _dinov2(tf.Dinov2WithRegistersConfig, num_register_tokens=3, **options)


def _clip_vision(**options: Any) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**SHAPE, **MLP, projection_dim=16, **options)


def _clip(**options: Any) -> tf.CLIPConfig:
    return tf.CLIPConfig(text_config=TEXT, vision_config=_clip_vision().to_dict(), projection_dim=16, **options)


def _siglip_vision() -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**SHAPE, **MLP)


def _siglip(**options: Any) -> tf.SiglipConfig:
    text = {**TEXT, "projection_size": WIDTH}
    return tf.SiglipConfig(text_config=text, vision_config=_siglip_vision().to_dict(), **options)


def _llava() -> Any:
    config = tf.LlavaConfig(vision_config=_clip_vision(), text_config=llama(), image_token_id=IMAGE_TOKEN)
    return tf.LlavaForConditionalGeneration(config)


def _dual_encoder() -> Any:
    vision, text = _vit(), tf.BertConfig(**TEXT)
    return tf.VisionTextDualEncoderModel(
        tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    )


def _captioner() -> Any:
    decoder = tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
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


def _backbone(kind: str, config: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, kind)(config(out_indices=[1, 2], **options))


_FIRST: dict[str, Case] = {
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
#: Every model that the installed transformers has.
CASES: dict[str, Case] = {
    name: case
    for name, case in {**_FIRST, **cases_vit.CASES, **cases_clip.CASES, **cases_vlm.CASES}.items()
    if hasattr(tf, case.needs)
}
#: Bare towers that AutoModel knows, one of each way for registers to enter and leave.
TOWERS = tuple(
    name
    for name in (
        *("vit", "deit", "clip-vision", "dinov2", "dinov2-swiglu", "dinov2-registers", "siglip-vision"),
        *("mae", "msn", "ijepa", "beit", "beit-shared", "dinov3", "dinov3-swiglu", "sapiens2", "tipsv2", "pixio"),
        *(
            "dpt",
            "internvl-vision",
            "qianfan-ocr-vision",
            "siglip2-vision",
            "idefics3-vision",
            "mlcd-vision",
            "molmo2-vision",
        ),
    )
    if name in CASES
)
#: Whether adapters are put into a tower below ``base_model_prefix`` (not by transformers 4: one place in both models).
LOOKS_BELOW_PREFIX = "load_config" in inspect.signature(tf.PreTrainedModel.load_adapter).parameters
#: Whether transformers' own loaders put in what is in ``modules_to_save`` (not from 5.0 to 5.17, for any method).
LOADS_HEADS = not LOOKS_BELOW_PREFIX or "adapter_state_dict_load_map" in inspect.getsource(
    tf.PreTrainedModel.load_adapter
)
#: The first model of every family. What happens inside the tower does not depend on the head around it.
FAMILIES = tuple({case.family: name for name, case in reversed(CASES.items())}.values())[::-1]
#: One model of each kind of anatomy, which is what an option can depend on: with and without tokens before the patches,
#: native registers, a final norm over patches, position biases, rotary tables, masks, the attention interface.
KINDS = tuple(
    name
    for name in (
        *("vit", "deit", "clip-vision", "dinov2-registers", "siglip-vision", "beit", "beit-shared", "data2vec"),
        *("dinov3", "radio", "pixio", "yolos", "flava-vision", "mgp-str", "siglip2-vision", "pix2struct-vision"),
        *("mlcd-vision", "molmo2-vision"),
    )
    if name in CASES
)


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
    for module in [model, *model.modules()]:
        # A model without SDPA of its own can have a tower with it.
        if isinstance(module, tf.PreTrainedModel) and (attention == "eager" or module._supports_sdpa):
            # transformers 4 raises for a whole that has one part without SDPA (a Q-Former).
            with contextlib.suppress(ValueError):
                module.set_attn_implementation(attention)
    return model


_Pixels = Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]


def _naflex(batch: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    side = size // PATCH
    return {
        "pixel_values": torch.randn(batch, side**2, 3 * PATCH**2, generator=generator),
        "pixel_attention_mask": torch.ones(batch, side**2, dtype=torch.long),
        "spatial_shapes": torch.full((batch, 2), side),
    }


def _patches(batch: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, (size // PATCH) ** 2, 3 * PATCH**2, generator=generator)}


def _flattened(batch: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    side = size // PATCH
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1) + 1.0
    patches = torch.randn(batch, side**2, 3 * PATCH**2, generator=generator)
    return {"flattened_patches": torch.cat([place.reshape(1, -1, 2).expand(batch, -1, -1), patches], dim=-1)}


def _images(count: int) -> _Pixels:
    return lambda batch, size, generator: {
        "pixel_values": torch.randn(batch, count, 3, size, size, generator=generator)
    }


def _tiles(batch: int, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_images(2)(batch, size, generator), "image_sizes": torch.full((batch, 2), size)}


#: Kinds of image, by the name that a case gives.
PIXELS: dict[str, _Pixels] = {
    "image": lambda batch, size, generator: {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)},
    "images": _images(1),
    "tiles": _tiles,
    "video": _images(2),
    "spectrogram": lambda batch, size, generator: {"input_values": torch.randn(batch, size, size, generator=generator)},
    "naflex": _naflex,
    "flattened": _flattened,
    "patches": _patches,
}


def make_inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, size: int = IMAGE) -> dict[str, Any]:
    """Random inputs for the model ``name``, the same at every call."""
    case, generator = CASES[name], torch.Generator().manual_seed(1)
    values: dict[str, Any] = PIXELS[case.pixels](batch, size, generator)
    values = {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}
    patches = (size // PATCH) ** 2
    ids = torch.randint(3, 60, (batch, 6), generator=generator)
    ids[:, -1] = 2
    for kind in case.inputs:
        if kind == "bool_masked_pos":
            values[kind] = torch.rand(batch, patches, generator=generator) < 0.5
        elif kind == "tube_mask":  # as many patches hidden in every video
            values["bool_masked_pos"] = (torch.arange(patches) % 2).bool().expand(batch, -1)
        elif kind == "noise":
            values[kind] = torch.rand(batch, patches, generator=generator)
        elif kind == "attention_mask":
            values[kind] = torch.ones_like(ids)
        elif kind == "image_attention_mask":
            values[kind] = torch.ones_like(ids)[..., None]
        elif kind == "image_text":
            image = torch.full((batch, case.image_tokens), IMAGE_TOKEN)
            values["input_ids"] = torch.cat([image, ids], dim=1)
            values["attention_mask"] = torch.ones_like(values["input_ids"])
        elif kind == "image_position":
            values["image_embeds_position_mask"] = values["input_ids"] == IMAGE_TOKEN
        else:
            values[kind] = ids
    return values


def loads_heads(load: Callable[[], Any]) -> Any:
    """What a loader of transformers gives; where it forgets ``modules_to_save`` that is refused, and the test ends."""
    if LOADS_HEADS:
        return load()
    with pytest.raises(AdapterFileError, match=r"has not put .* forgets modules_to_save"):
        load()
    pytest.skip("these transformers forget modules_to_save, and are refused by name")
