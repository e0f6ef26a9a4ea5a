"""Tiny models of the ViT kind: one row a family and head class."""

from __future__ import annotations

from typing import Any

from cases_base import DEEP, IMAGE, LABELS, MLP, PAIR, PATCH, PATCHES, SHAPE, WIDTH, Case, case, configure

_FOUR = {"out_indices": [1, 2, 3, 4]}
_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
_DETECTION_TOKENS = 5


def _config(kind: str, **options: Any) -> Any:
    return configure(kind, **{**SHAPE, **MLP, "num_labels": LABELS, "encoder_stride": PATCH, **options})


def _mae(mask_ratio: float) -> Any:
    return _config("ViTMAEConfig", mask_ratio=mask_ratio, **_DECODER)


def _beit(kind: str = "BeitConfig", **options: Any) -> Any:
    values = {
        "attn_implementation": "eager",  # transformers 4 chooses the class by it, when the model is made
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mask_token": True,
        "use_mean_pooling": False,
        "layer_scale_init_value": 1.0,
        "drop_path_rate": 0.0,
        "vocab_size": 16,
        "pool_scales": [1, 2],
        "use_auxiliary_head": False,
    }
    return _config(kind, **{**values, **options})


def _shared(kind: str = "BeitConfig") -> Any:
    """One position bias for all blocks, as in BEiT's pretraining."""
    return _beit(kind, use_relative_position_bias=False, use_shared_relative_position_bias=True, use_mean_pooling=True)


def _data2vec(kind: str, attention: str = "eager", **options: Any) -> Case:
    """The attention class is chosen when the model is made, not when it runs."""

    def config() -> Any:
        return _beit("Data2VecVisionConfig", attn_implementation=attention, **options)

    outputs = {"Data2VecVisionModel": "last_hidden_state"}
    return case("data2vec-vision", kind, config, output=outputs.get(kind, "logits"), whole="out_indices" not in options)


def _dinov3(kind: str = "DINOv3ViTConfig", **options: Any) -> Any:
    # In training the rotary embedding is rescaled at random otherwise, and no two runs are the same.
    return _config(kind, num_register_tokens=3, pos_embed_rescale=None, **options)


def _with_ratio(kind: str, **options: Any) -> Any:
    values = {"mlp_ratio": 2, **SHAPE, "num_labels": LABELS, **options}
    return configure(kind, **values)


def _dpt(**options: Any) -> Any:
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [2, 1, 1, 1]}
    return _config("DPTConfig", is_hybrid=False, use_auxiliary_head=False, **{**neck, **options})


_DPT_HEAD: dict[str, Any] = {**DEEP, "backbone_out_indices": [0, 1, 2, 3]}


def _yolos() -> Any:
    options = {"num_detection_tokens": _DETECTION_TOKENS, "use_mid_position_embeddings": False}
    return _config("YolosConfig", **{**PAIR, **options})


def _video(kind: str, **options: Any) -> Any:
    return _config(kind, num_frames=2, **options)


def _vivit() -> Any:
    return _video("VivitConfig", tubelet_size=[2, PATCH, PATCH])


def _ast() -> Any:
    stride = {"frequency_stride": PATCH, "time_stride": PATCH, "max_length": IMAGE, "num_mel_bins": IMAGE}
    return _config("ASTConfig", **stride)


def _scene_text() -> Any:
    sizes = {"max_token_length": 5, "num_character_labels": 7, "num_bpe_labels": 7, "num_wordpiece_labels": 7}
    return _with_ratio("MgpstrConfig", **{**PAIR, **sizes}, mlp_ratio=2.0)


def _pix2struct() -> Any:
    values = {name: value for name, value in SHAPE.items() if name not in ("image_size", "patch_size")}
    return configure(
        "Pix2StructVisionConfig",
        **values,
        patch_embed_hidden_size=3 * PATCH**2,
        d_ff=2 * WIDTH,
        d_kv=8,
        seq_len=PATCHES,
    )


_RADIO: dict[str, Any] = {"mlp_ratio": 2.0, "max_img_size": IMAGE, "num_cls_tokens": 2, "num_registers": 2}
_TIPSV2: dict[str, Any] = {"mlp_ratio": 2.0, "num_register_tokens": 3}
_DETECTOR: dict[str, Any] = {"patches": PATCHES + _DETECTION_TOKENS}
_AUDIO = "audio-spectrogram-transformer"

CASES: dict[str, Case] = {
    "mae": case("vit_mae", "ViTMAEModel", lambda: _mae(0.0), inputs=("noise",)),
    "mae-masked": case(
        "vit_mae", "ViTMAEForPreTraining", lambda: _mae(0.5), inputs=("noise",), output="logits", patches=PATCHES // 2
    ),
    "msn": case("vit_msn", "ViTMSNModel", lambda: _config("ViTMSNConfig")),
    "msn-classifier": case("vit_msn", "ViTMSNForImageClassification", lambda: _config("ViTMSNConfig"), output="logits"),
    "ijepa": case("ijepa", "IJepaModel", lambda: _config("IJepaConfig")),
    "ijepa-classifier": case("ijepa", "IJepaForImageClassification", lambda: _config("IJepaConfig"), output="logits"),
    "beit": case("beit", "BeitModel", _beit),
    "beit-shared": case("beit", "BeitModel", _shared),
    "beit-no-bias": case("beit", "BeitModel", lambda: _beit(use_relative_position_bias=False)),
    "beit-classifier": case(
        "beit", "BeitForImageClassification", lambda: _beit(use_mean_pooling=True), output="logits"
    ),
    "beit-masked": case("beit", "BeitForMaskedImageModeling", _beit, inputs=("bool_masked_pos",), output="logits"),
    "beit-segmentation": case(
        "beit",
        "BeitForSemanticSegmentation",
        lambda: _beit(**DEEP, **_FOUR),
        output="logits",
        whole=False,
    ),
    "beit-backbone": case("beit", "BeitBackbone", lambda: _beit(out_indices=[1, 2]), output="feature_maps"),
    "data2vec": _data2vec("Data2VecVisionModel"),
    "data2vec-shared": _data2vec(
        "Data2VecVisionModel", use_relative_position_bias=False, use_shared_relative_position_bias=True
    ),
    "data2vec-classifier": _data2vec("Data2VecVisionForImageClassification", use_mean_pooling=True),
    "data2vec-segmentation": _data2vec("Data2VecVisionForSemanticSegmentation", **DEEP, **_FOUR),
    "dinov3": case("dinov3_vit", "DINOv3ViTModel", _dinov3),
    "dinov3-swiglu": case("dinov3_vit", "DINOv3ViTModel", lambda: _dinov3(use_gated_mlp=True)),
    "dinov3-backbone": case(
        "dinov3_vit", "DINOv3ViTBackbone", lambda: _dinov3(out_indices=[1, 2]), output="feature_maps"
    ),
    "sapiens2": case("sapiens2", "Sapiens2Model", lambda: _dinov3("Sapiens2Config")),
    "sapiens2-backbone": case(
        "sapiens2",
        "Sapiens2Backbone",
        lambda: _dinov3("Sapiens2Config", out_indices=[1, 2]),
        output="feature_maps",
    ),
    "sapiens2-segmentation": case(
        "sapiens2",
        "Sapiens2ForSemanticSegmentation",
        lambda: _dinov3("Sapiens2Config", head_config={"upsample_out_channels": [8], "conv_out_channels": [8]}),
        output="logits",
    ),
    "tipsv2": case("tipsv2", "Tipsv2VisionModel", lambda: _with_ratio("Tipsv2VisionConfig", **_TIPSV2)),
    "tipsv2-backbone": case(
        "tipsv2",
        "Tipsv2VisionBackbone",
        lambda: _with_ratio("Tipsv2VisionConfig", **_TIPSV2, out_indices=[1, 2]),
        output="feature_maps",
    ),
    "radio": case("radio", "RadioModel", lambda: _with_ratio("RadioConfig", **_RADIO), output="features"),
    "pixio": case("pixio", "PixioModel", lambda: _with_ratio("PixioConfig", n_cls_tokens=3)),
    "pixio-backbone": case(
        "pixio",
        "PixioBackbone",
        lambda: _with_ratio("PixioConfig", n_cls_tokens=3, out_indices=[1, 2]),
        output="feature_maps",
    ),
    "dpt": case("dpt", "DPTModel", _dpt),
    "dpt-depth": case("dpt", "DPTForDepthEstimation", lambda: _dpt(**_DPT_HEAD), output="predicted_depth", whole=False),
    "dpt-segmentation": case(
        "dpt", "DPTForSemanticSegmentation", lambda: _dpt(**_DPT_HEAD), output="logits", whole=False
    ),
    "yolos": case("yolos", "YolosModel", _yolos, **_DETECTOR),
    "yolos-detection": case("yolos", "YolosForObjectDetection", _yolos, output="logits", **_DETECTOR),
    "vitpose": case(
        "vitpose",
        "VitPoseBackbone",
        lambda: _with_ratio("VitPoseBackboneConfig", **PAIR, out_indices=[1, 2]),
        output="feature_maps",
    ),
    "vitpose-keypoints": case(
        "vitpose",
        "VitPoseForPoseEstimation",
        lambda: configure(
            "VitPoseConfig",
            backbone_config=_with_ratio(
                "VitPoseBackboneConfig", **{**PAIR, "patch_size": [PATCH, PATCH]}, out_indices=[2]
            ),
            num_labels=LABELS,
        ),
        output="heatmaps",
    ),
    "internvl-vision": case(
        "internvl",
        "InternVLVisionModel",
        lambda: _config("InternVLVisionConfig", **{**PAIR, "patch_size": [PATCH, PATCH]}),
    ),
    "qianfan-ocr-vision": case(
        "qianfan_ocr",
        "QianfanOCRVisionModel",
        lambda: _config("QianfanOCRVisionConfig", **{**PAIR, "patch_size": [PATCH, PATCH]}, drop_path_rate=0.0),
    ),
    "flava-vision": case("flava", "FlavaImageModel", lambda: _config("FlavaImageConfig")),
    "mgp-str": case("mgp_str", "MgpstrModel", _scene_text),
    "mgp-str-text": case("mgp_str", "MgpstrForSceneTextRecognition", _scene_text, output="logits"),
    "pix2struct-vision": case("pix2struct", "Pix2StructVisionModel", _pix2struct, pixels="flattened"),
    "videomae": case("videomae", "VideoMAEModel", lambda: _video("VideoMAEConfig"), pixels="video"),
    "videomae-classifier": case(
        "videomae",
        "VideoMAEForVideoClassification",
        lambda: _video("VideoMAEConfig"),
        output="logits",
        pixels="video",
    ),
    "videomae-masked": case(
        "videomae",
        "VideoMAEForPreTraining",
        lambda: _video("VideoMAEConfig", norm_pix_loss=False, **_DECODER),
        inputs=("tube_mask",),
        output="logits",
        pixels="video",
        patches=PATCHES // 2,
    ),
    "vivit": case("vivit", "VivitModel", _vivit, pixels="video"),
    "vivit-classifier": case("vivit", "VivitForVideoClassification", _vivit, output="logits", pixels="video"),
    "ast": case(_AUDIO, "ASTModel", _ast, pixels="spectrogram"),
    "ast-classes": case(_AUDIO, "ASTForAudioClassification", _ast, output="logits", pixels="spectrogram"),
}
