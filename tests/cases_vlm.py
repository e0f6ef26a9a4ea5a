"""Tiny vision-language and dense-prediction models: a tower of the table inside a larger model."""

from __future__ import annotations

from typing import Any

import transformers as tf
from cases_base import (
    DEEP,
    HEADS,
    IMAGE_TOKEN,
    MLP,
    PAIR,
    PATCH,
    PATCHES,
    SHAPE,
    TEXT,
    WIDTH,
    Case,
    case,
    configure,
    llama,
)

_TEXT_AND_MASK = ("input_ids", "attention_mask")
_QUERIES = 3
_IMAGE: dict[str, Any] = {"image_token_id": IMAGE_TOKEN}
#: Some configs have the older name.
_IMAGE_INDEX: dict[str, Any] = {**_IMAGE, "image_token_index": IMAGE_TOKEN}
_QFORMER: dict[str, Any] = {**TEXT, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
_GEMMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
_NECK: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [2, 1, 1, 0.5]}


def _vision(kind: str, **options: Any) -> Any:
    return configure(f"{kind}VisionConfig", **SHAPE, **MLP, **options)


def _blip() -> Any:
    text = {**TEXT, "encoder_hidden_size": WIDTH, "sep_token_id": 2}
    sizes = {"projection_dim": 16, "image_text_hidden_size": 16}
    return configure("BlipConfig", text_config=text, vision_config=_vision("Blip").to_dict(), **sizes)


def _with_qformer(kind: str) -> Any:
    text = tf.OPTConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        ffn_dim=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
    )
    return configure(
        f"{kind}Config",
        vision_config=_vision(kind).to_dict(),
        qformer_config=_QFORMER,
        text_config=text.to_dict(),
        num_query_tokens=_QUERIES,
        image_token_index=IMAGE_TOKEN,
    )


def _idefics2() -> Any:
    perceiver = {"resampler_n_latents": _QUERIES, "resampler_depth": 1, "resampler_n_heads": HEADS}
    perceiver |= {"hidden_size": WIDTH, "resampler_head_dim": 8, "num_key_value_heads": 2}
    text = tf.MistralConfig(**TEXT, num_key_value_heads=HEADS).to_dict()
    parts = {"vision_config": {**SHAPE, **MLP}, "perceiver_config": perceiver, "text_config": text}
    return configure("Idefics2Config", **parts, **_IMAGE)


def _shuffled(kind: str) -> Any:
    """Idefics3 and SmolVLM: four patches become one token."""
    parts = {"vision_config": {**SHAPE, **MLP}, "text_config": llama().to_dict()}
    return configure(f"{kind}Config", **parts, **_IMAGE, scale_factor=2, pad_token_id=0)


def _idefics() -> Any:
    vision = {"embed_dim": WIDTH, **{key: value for key, value in SHAPE.items() if key != "hidden_size"}, **MLP}
    text = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    layers = {"use_resampler": False, "cross_layer_interval": 1, "additional_vocab_size": 0}
    return configure("IdeficsConfig", **text, **layers, vision_config=vision)


def _kosmos2() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {"vocab_size": 64, "embed_dim": WIDTH, "layers": 1, "attention_heads": HEADS, "ffn_dim": 2 * WIDTH, **ids}
    text["max_position_embeddings"] = 64
    return configure("Kosmos2Config", text_config=text, vision_config={**SHAPE, **MLP}, latent_query_num=_QUERIES)


def _janus() -> Any:
    vision = configure("JanusVisionConfig", **SHAPE, mlp_ratio=2.0, projection_dim=WIDTH)
    sizes = {"base_channels": 32, "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "num_patches": 4}
    quantizer = {**sizes, "channel_multiplier": [1, 1], "num_res_blocks": 1, "double_latent": False, "resolution": 8}
    parts = {"text_config": llama().to_dict(), "vision_config": vision.to_dict(), "vq_config": quantizer}
    return configure("JanusConfig", **parts, **_IMAGE)


def _internvl() -> Any:
    vision = configure("InternVLVisionConfig", **{**PAIR, **MLP, "patch_size": [PATCH, PATCH]})
    parts = {"vision_config": vision.to_dict(), "text_config": llama().to_dict()}
    return configure("InternVLConfig", **parts, **_IMAGE, image_seq_length=PATCHES // 4, downsample_ratio=0.5)


def _ovis2() -> Any:
    vision = {**SHAPE, **MLP, "hidden_stride": 1, "vocab_size": 24, "num_visual_indicator_tokens": 4}
    parts = {"vision_config": {**vision, "tokenize_function": "softmax"}, "text_config": llama().to_dict()}
    ids = {"visual_indicator_token_ids": [58, 59, 60, 61], "vocab_size": 64, "hidden_size": WIDTH}
    return configure("Ovis2Config", **parts, **_IMAGE, **ids)


def _gemma3() -> Any:
    parts = {"text_config": _GEMMA, "vision_config": {**SHAPE, **MLP}}
    return configure("Gemma3Config", **parts, mm_tokens_per_image=PATCHES // 4, image_token_index=IMAGE_TOKEN)


def _paligemma() -> Any:
    text = {**_GEMMA, "model_type": "gemma"}
    vision = {**SHAPE, **MLP, "model_type": "siglip_vision_model"}
    return configure("PaliGemmaConfig", text_config=text, vision_config=vision, **_IMAGE_INDEX, projection_dim=WIDTH)


def _llava(kind: str, vision: str, **options: Any) -> Any:
    head = {"vision_use_head": False} if vision == "Siglip" else {"projection_dim": 16}
    return configure(
        f"{kind}Config", vision_config=_vision(vision, **head), text_config=llama(), **_IMAGE_INDEX, **options
    )


def _backbone() -> Any:
    values = {**DEEP, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    return tf.Dinov2Config(**values)


def _depth_anything(kind: str) -> Any:
    sizes = {"head_hidden_size": 8, "reassemble_hidden_size": WIDTH, "patch_size": PATCH, "head_in_index": -1}
    return configure(f"{kind}Config", backbone_config=_backbone(), **_NECK, **sizes)


def _zoedepth() -> Any:
    options = {"use_relative_position_bias": True, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    backbone = tf.BeitConfig(**DEEP, **MLP, **options, attn_implementation="eager")
    bins = [{"n_bins": 4, "min_depth": 0.1, "max_depth": 10.0, "name": "scene"}]
    sizes = {
        "bottleneck_features": 8,
        "num_relative_features": 8,
        "num_attractors": [2, 1, 1, 1],
        "bin_embedding_dim": 8,
    }
    return configure("ZoeDepthConfig", backbone_config=backbone, **_NECK, **sizes, bin_configurations=bins)


def _talk(family: str, kind: str, config: Any, tokens: int, **options: Any) -> Case:
    """A model with placeholders for the image in its text."""
    options = {"inputs": ("image_text",), "output": "logits", **options}
    return case(family, kind, config, whole=False, image_tokens=tokens, **options)


def _read(family: str, kind: str, config: Any, output: str, *inputs: str, **options: Any) -> Case:
    """A model with a text of its own beside the image."""
    return case(family, kind, config, output=output, inputs=inputs or _TEXT_AND_MASK, whole=False, **options)


_TILES = 2 * PATCHES + 4  # the thumbnail, and one tile with an end to each row

CASES: dict[str, Case] = {
    "blip-vision": case("blip", "BlipVisionModel", lambda: _vision("Blip")),
    "blip": _read("blip", "BlipModel", _blip, "logits_per_image"),
    "blip-captioner": _read("blip", "BlipForConditionalGeneration", _blip, "logits"),
    "blip-retrieval": _read("blip", "BlipForImageTextRetrieval", _blip, "itm_score"),
    "blip-answers": _read(
        "blip", "BlipForQuestionAnswering", _blip, "image_embeds", *_TEXT_AND_MASK, "decoder_input_ids"
    ),
    "blip2-vision": case("blip-2", "Blip2VisionModel", lambda: _vision("Blip2")),
    "blip2-projection": case(
        "blip-2",
        "Blip2VisionModelWithProjection",
        lambda: _with_qformer("Blip2"),
        output="image_embeds",
        whole=False,
    ),
    "blip2-captioner": _talk("blip-2", "Blip2ForConditionalGeneration", lambda: _with_qformer("Blip2"), _QUERIES),
    "instructblip-vision": case("instructblip", "InstructBlipVisionModel", lambda: _vision("InstructBlip")),
    "instructblip": _talk(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        lambda: _with_qformer("InstructBlip"),
        _QUERIES,
        inputs=("image_text", "qformer_input_ids"),
    ),
    "instructblipvideo-vision": case(
        "instructblipvideo", "InstructBlipVideoVisionModel", lambda: _vision("InstructBlipVideo")
    ),
    "git-vision": case("git", "GitVisionModel", lambda: _vision("Git")),
    "git": _read(
        "git",
        "GitForCausalLM",
        lambda: configure("GitConfig", **TEXT, vision_config=_vision("Git").to_dict()),
        "logits",
    ),
    "idefics": _read(
        "idefics",
        "IdeficsForVisionText2Text",
        _idefics,
        "logits",
        *_TEXT_AND_MASK,
        "image_attention_mask",
        pixels="images",
    ),
    "idefics2": _talk("idefics2", "Idefics2ForConditionalGeneration", _idefics2, _QUERIES, pixels="images"),
    "idefics3-vision": case("idefics3", "Idefics3VisionTransformer", lambda: _vision("Idefics3")),
    "idefics3": _talk(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        lambda: _shuffled("Idefics3"),
        PATCHES // 4,
        pixels="images",
    ),
    "smolvlm": _talk(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        lambda: _shuffled("SmolVLM"),
        PATCHES // 4,
        pixels="images",
    ),
    "kosmos2": _talk(
        "kosmos-2", "Kosmos2ForConditionalGeneration", _kosmos2, _QUERIES, inputs=("image_text", "image_position")
    ),
    "janus-vision": case(
        "janus",
        "JanusVisionModel",
        lambda: configure("JanusVisionConfig", **SHAPE, mlp_ratio=2.0, projection_dim=WIDTH),
    ),
    "janus": _talk("janus", "JanusForConditionalGeneration", _janus, PATCHES),
    "internvl": _talk("internvl", "InternVLForConditionalGeneration", _internvl, PATCHES // 4),
    "ovis2": _talk("ovis2", "Ovis2ForConditionalGeneration", _ovis2, PATCHES),
    "gemma3": _talk("siglip", "Gemma3ForConditionalGeneration", _gemma3, PATCHES // 4),
    "paligemma": _talk("siglip", "PaliGemmaForConditionalGeneration", _paligemma, PATCHES),
    "llava-next": _talk(
        "clip",
        "LlavaNextForConditionalGeneration",
        lambda: _llava("LlavaNext", "CLIP", image_grid_pinpoints=[[32, 32]]),
        _TILES,
        pixels="tiles",
        images=2,
    ),
    "llava-onevision": _talk(
        "siglip",
        "LlavaOnevisionForConditionalGeneration",
        lambda: _llava("LlavaOnevision", "Siglip", image_grid_pinpoints=[[32, 32]]),
        _TILES,
        pixels="tiles",
        images=2,
    ),
    "vipllava": _talk(
        "clip",
        "VipLlavaForConditionalGeneration",
        lambda: _llava("VipLlava", "CLIP", vision_feature_layers=[-1, -2]),
        PATCHES,
    ),
    "aya-vision": _talk(
        "siglip",
        "AyaVisionForConditionalGeneration",
        lambda: _llava("AyaVision", "Siglip", downsample_factor=2),
        PATCHES // 4,
    ),
    "depth-anything": case(
        "dinov2",
        "DepthAnythingForDepthEstimation",
        lambda: _depth_anything("DepthAnything"),
        output="predicted_depth",
        whole=False,
    ),
    "prompt-depth-anything": case(
        "dinov2",
        "PromptDepthAnythingForDepthEstimation",
        lambda: _depth_anything("PromptDepthAnything"),
        output="predicted_depth",
        whole=False,
    ),
    "zoedepth": case("beit", "ZoeDepthForDepthEstimation", _zoedepth, output="predicted_depth", whole=False),
}
