"""Tiny models of the CLIP and SigLIP kind: vision towers, dual encoders, and their heads."""

from __future__ import annotations

from typing import Any

from cases_base import LABELS, MLP, PATCHES, SHAPE, TEXT, WIDTH, Case, case, configure

_TEXT_AND_MASK = ("input_ids", "attention_mask")
_NO_GRADIENT = "CLIPSegForImageSegmentation runs its vision tower under no_grad"


def _vision(kind: str, **options: Any) -> Any:
    return configure(f"{kind}VisionConfig", **{**SHAPE, **MLP, **options})


def _dual(kind: str, text: dict[str, Any] | None = None, vision: Any = None, **options: Any) -> Any:
    """The config of an image and a text encoder."""
    options = {"projection_dim": 16, **options}
    vision = (vision or _vision(kind)).to_dict()
    return configure(f"{kind}Config", text_config={**TEXT, **(text or {})}, vision_config=vision, **options)


def _naflex() -> Any:
    values = {name: value for name, value in SHAPE.items() if name != "image_size"}
    return configure("Siglip2VisionConfig", **values, **MLP, num_patches=PATCHES)


def _molmo2() -> Any:
    values = {name: value for name, value in SHAPE.items() if name != "image_size"}
    return configure(
        "Molmo2VisionConfig",
        **values,
        **MLP,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        num_position_embeddings=PATCHES,
        num_channels=3,
    )


def _siglip2(**options: Any) -> Any:
    text = {**TEXT, "projection_size": WIDTH}
    return configure("Siglip2Config", text_config=text, vision_config=_naflex().to_dict(), **options)


def _clipseg() -> Any:
    decoder = {"reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    return _dual("CLIPSeg", extract_layers=[0, 1], **decoder)


def _flava() -> Any:
    multimodal = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, **MLP}
    parts = {"image_config": {**SHAPE, **MLP}, "text_config": TEXT, "multimodal_config": multimodal}
    return configure("FlavaConfig", **parts, hidden_size=WIDTH, projection_dim=16)


def _pair(family: str, kind: str, config: Any, inputs: tuple[str, ...] = _TEXT_AND_MASK, **options: Any) -> Case:
    options = {"output": "logits_per_image", **options}
    return case(family, kind, config, inputs=inputs, whole=False, **options)


def _of_kind(family: str, kind: str, name: str, **text: Any) -> dict[str, Case]:
    """A vision tower and its dual encoder."""
    return {
        f"{name}-vision": case(family, f"{kind}VisionModel", lambda: _vision(kind)),
        name: _pair(family, f"{kind}Model", lambda: _dual(kind, text)),
    }


def _owl(family: str, kind: str) -> dict[str, Case]:
    def dual() -> Any:
        return _dual(kind, projection_dim=WIDTH)

    return {
        f"{family}-vision": case(family, f"{kind}VisionModel", lambda: _vision(kind)),
        family: _pair(family, f"{kind}Model", dual),
        f"{family}-detection": _pair(family, f"{kind}ForObjectDetection", dual, output="pred_boxes"),
    }


CASES: dict[str, Case] = {
    **_of_kind("metaclip_2", "MetaClip2", "metaclip2"),
    "metaclip2-projection": case(
        "metaclip_2",
        "MetaClip2VisionModelWithProjection",
        lambda: _vision("MetaClip2", projection_dim=16),
        output="image_embeds",
    ),
    "metaclip2-classifier": case(
        "metaclip_2",
        "MetaClip2ForImageClassification",
        lambda: _dual("MetaClip2", num_labels=LABELS),
        output="logits",
    ),
    **_of_kind("altclip", "AltCLIP", "altclip", project_dim=WIDTH),
    **_of_kind("chinese_clip", "ChineseCLIP", "chinese-clip"),
    "clipseg-vision": case("clipseg", "CLIPSegVisionModel", lambda: _vision("CLIPSeg")),
    "clipseg": _pair("clipseg", "CLIPSegModel", _clipseg),
    "clipseg-segmentation": _pair(
        "clipseg", "CLIPSegForImageSegmentation", _clipseg, output="logits", no_gradient=_NO_GRADIENT
    ),
    **_owl("owlvit", "OwlViT"),
    **_owl("owlv2", "Owlv2"),
    "flava": _pair("flava", "FlavaModel", _flava, output="image_embeddings"),
    "mlcd-vision": case("mlcd", "MLCDVisionModel", lambda: _vision("MLCD")),
    "molmo2-vision": case("molmo2", "Molmo2VisionModel", _molmo2, pixels="patches"),
    "siglip2-vision": case("siglip2", "Siglip2VisionModel", _naflex, pixels="naflex"),
    "siglip2-classifier": case(
        "siglip2",
        "Siglip2ForImageClassification",
        lambda: _siglip2(num_labels=LABELS),
        output="logits",
        pixels="naflex",
    ),
    "siglip2": _pair("siglip2", "Siglip2Model", _siglip2, inputs=("input_ids",), pixels="naflex"),
    "aimv2-vision": case("aimv2", "Aimv2VisionModel", lambda: _vision("Aimv2")),
    "aimv2-native": case("aimv2", "Aimv2VisionModel", lambda: _vision("Aimv2", is_native=True)),
    "aimv2": _pair("aimv2", "Aimv2Model", lambda: _dual("Aimv2"), inputs=("input_ids",)),
}
