"""The table of families: which vision towers registers can enter, one row each, and which they cannot, with the reason.

A new family is one row; nothing else in the package names a model of transformers. ``libraries.py`` has the rows of
other libraries' towers.
"""

from __future__ import annotations

from dataclasses import replace

from .anatomy import Anatomy

__all__ = ["FAMILIES", "REFUSED"]

# Encoders of the CLIP kind, with the parts of a block where CLIP has them.
_CLIP = Anatomy(
    "clip",
    remove="encoder",
    remove_from="output",
    blocks="encoder.layers",
    attention="self_attn",
    patch_embedding="embeddings.patch_embedding",
    position_embedding="embeddings.position_embedding",
    cls_token="embeddings.class_embedding",
    final_norm="post_layernorm",
    norm_patches=False,
)
# The outer model records hidden states, so the tower is the outer model.
_GIT = replace(
    _CLIP,
    family="git",
    embeddings="vision_model.embeddings",
    remove="vision_model.encoder",
    blocks="vision_model.encoder.layers",
    patch_embedding="vision_model.embeddings.patch_embedding",
    position_embedding="vision_model.embeddings.position_embedding",
    cls_token="vision_model.embeddings.class_embedding",
    final_norm="vision_model.post_layernorm",
    norm_patches=True,
)
# Rotary tables cover CLS and the patches.
_MLCD = replace(_CLIP, family="mlcd", rotary="position_embeddings", position_embedding=None)
# Positions are added between two modules, and the last block is followed by nothing.
_MOLMO2 = replace(
    _CLIP,
    family="molmo2",
    embeddings="layers.0",
    insert_at="input",
    remove="layers.-1",
    blocks="layers",
    prefix=0,
    patch_embedding=None,
    position_embedding="positional_embedding",
    cls_token=None,
    final_norm=None,
)
_BLIP = replace(_CLIP, family="blip", norm_patches=True)
_SIGLIP = replace(_CLIP, family="siglip", prefix=0, cls_token=None, norm_patches=True)
# The mask is made behind the embeddings, for the length it finds there: registers join at the encoder.
_MASKED = replace(_SIGLIP, family="idefics3", embeddings="encoder", insert_at="input")
# A linear patch embedding is what quantisers change: it is not part of the fingerprint.
_NAFLEX = replace(_MASKED, family="siglip2", patch_embedding=None)
_AIMV2 = replace(
    _SIGLIP,
    family="aimv2",
    attention="attention",
    mlp_in="ffn.gate_proj",
    mlp_up="ffn.up_proj",
    mlp_out="ffn.down_proj",
    patch_embedding=("embeddings.patch_embed", "embeddings.patch_embedding"),
    final_norm="rms_norm",
)

# Encoders of the ViT kind. ``attention.attention`` is the module that returns attention maps where there are two.
_NESTED = ("attention.attention", "attention")
_YOLOS = Anatomy("yolos", blocks="encoder.layer", attention=_NESTED, cls_token="embeddings.cls_token")
_DPT = replace(
    _YOLOS, family="dpt", patch_embedding=("embeddings.patch_embeddings.projection", "embeddings.projection")
)
_BEIT = Anatomy(
    "beit",
    attention=("attention.attention", "attention"),
    position_bias=(
        "shared_position_bias",
        "encoder.relative_position_bias",
        "relative_position_bias",
        "attention.attention.relative_position_bias",
    ),
    mlp_scale="lambda_2",
)
_INTERNVL = replace(_BEIT, family="internvl", attention="attention", position_bias=None)
_PIXIO = Anatomy("pixio", prefix=0, native_registers="config.n_cls_tokens", cls_token=None)
_VITPOSE = Anatomy(
    "vitpose",
    prefix=0,
    remove="encoder",
    remove_from="output",
    attention=_NESTED,
    blocks="encoder.layer",
    cls_token=None,
)
_VIDEOMAE = replace(_VITPOSE, family="videomae")

_DINOV2 = Anatomy(
    "dinov2",
    remove="encoder",
    remove_from="output",
    blocks=("encoder.layer", "layer"),
)
_DINOV2_REGISTERS = replace(_DINOV2, family="dinov2_with_registers", native_registers="config.num_register_tokens")
_TIPSV2 = replace(_DINOV2_REGISTERS, family="tipsv2")
# The rotary embedding turns the last P tokens, and leaves alone whatever stands before them.
_DINOV3 = Anatomy(
    "dinov3_vit",
    remove="norm",
    blocks=("model.layer", "layer"),
    native_registers="config.num_register_tokens",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    patch_embedding="embeddings.patch_embeddings",
    position_embedding=None,
    final_norm="norm",
)
# A backbone norms every stage that it returns, so registers have to go before.
_DINOV3_BACKBONE = replace(_DINOV3, remove="model", remove_from="output")
_RADIO = Anatomy(
    "radio",
    remove="encoder",
    remove_from="output",
    blocks="encoder.layer",
    prefix=0,
    native_registers="config.num_summary_tokens",
    patch_embedding=None,
    position_embedding="embeddings.position_embedding",
    cls_token=None,
    final_norm=None,
    norm_patches=False,
)

_MGP_STR = Anatomy(
    "mgp_str",
    remove="encoder",
    remove_from="output",
    blocks="encoder.blocks",
    attention="attn",
    patch_embedding="embeddings.proj",
    position_embedding="embeddings.pos_embed",
    final_norm=None,
    norm_patches=False,
)
_PIX2STRUCT = Anatomy(
    "pix2struct",
    embeddings="encoder",
    insert_at="input",
    blocks="encoder.layer",
    prefix=0,
    mlp_in="mlp.wi_0",
    mlp_up="mlp.wi_1",
    mlp_out="mlp.wo",
    patch_embedding=None,
    position_embedding="embeddings.row_embedder",
    cls_token=None,
)

# Class name of a tower -> its row. Names, so that no model is imported before the user has done so.
# ``*Transformer`` is the tower inside the model of that name, in transformers 4 or still.
FAMILIES: dict[str, Anatomy] = {
    "ViTModel": Anatomy("vit"),
    "DeiTModel": Anatomy("deit", prefix=2),
    "ViTMAEModel": Anatomy("vit_mae"),
    "ViTMSNModel": Anatomy("vit_msn"),
    "IJepaModel": Anatomy("ijepa", prefix=0, cls_token=None),
    "BeitModel": _BEIT,
    # In transformers 4, where it holds no BeitModel.
    "BeitBackbone": replace(_BEIT, remove="encoder", remove_from="output"),
    "Data2VecVisionModel": replace(_BEIT, family="data2vec-vision", attention="attention"),
    "DPTModel": _DPT,
    "YolosModel": replace(_YOLOS, positions_between="encoder.interpolation"),
    "FlavaImageModel": replace(_YOLOS, family="flava", attention="attention"),
    "InternVLVisionModel": _INTERNVL,
    "QianfanOCRVisionModel": replace(_INTERNVL, family="qianfan_ocr"),
    "PixioModel": _PIXIO,
    "VitPoseBackbone": _VITPOSE,
    "MgpstrModel": _MGP_STR,
    # DINO
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2_REGISTERS,
    "Dinov2WithRegistersBackbone": _DINOV2_REGISTERS,
    "DINOv3ViTModel": _DINOV3,
    "DINOv3ViTBackbone": _DINOV3_BACKBONE,
    "Sapiens2Model": replace(_DINOV3, family="sapiens2"),
    "Sapiens2Backbone": replace(_DINOV3_BACKBONE, family="sapiens2"),
    "Tipsv2VisionModel": _TIPSV2,
    "Tipsv2VisionBackbone": _TIPSV2,
    "RadioModel": _RADIO,
    # CLIP
    "CLIPVisionModel": _CLIP,
    "CLIPVisionTransformer": _CLIP,
    "MetaClip2VisionModel": replace(_CLIP, family="metaclip_2"),
    "MetaClip2VisionTransformer": replace(_CLIP, family="metaclip_2"),
    "AltCLIPVisionModel": replace(_CLIP, family="altclip"),
    "AltCLIPVisionTransformer": replace(_CLIP, family="altclip"),
    "ChineseCLIPVisionModel": replace(_CLIP, family="chinese_clip"),
    "ChineseCLIPVisionTransformer": replace(_CLIP, family="chinese_clip"),
    "CLIPSegVisionModel": replace(_CLIP, family="clipseg"),
    "CLIPSegVisionTransformer": replace(_CLIP, family="clipseg"),
    "OwlViTVisionTransformer": replace(_CLIP, family="owlvit"),
    "Owlv2VisionTransformer": replace(_CLIP, family="owlv2"),
    "GitVisionModel": _GIT,
    "MLCDVisionModel": _MLCD,
    "MLCDVisionTransformer": _MLCD,
    "Molmo2VisionModel": _MOLMO2,
    "IdeficsVisionTransformer": replace(_CLIP, family="idefics"),
    "Kosmos2VisionTransformer": replace(_CLIP, family="kosmos-2"),
    "BlipVisionModel": _BLIP,
    "Blip2VisionModel": replace(_BLIP, family="blip-2"),
    "InstructBlipVisionModel": replace(_BLIP, family="instructblip"),
    "InstructBlipVideoVisionModel": replace(_BLIP, family="instructblipvideo"),
    # SigLIP
    "SiglipVisionModel": _SIGLIP,
    "SiglipVisionTransformer": _SIGLIP,
    "Siglip2VisionModel": _NAFLEX,
    "Siglip2VisionTransformer": _NAFLEX,
    "Idefics2VisionTransformer": replace(_MASKED, family="idefics2"),
    "Idefics3VisionTransformer": _MASKED,
    "SmolVLMVisionTransformer": replace(_MASKED, family="smolvlm"),
    "Phi4MultimodalVisionModel": replace(_MASKED, family="phi4_multimodal"),
    "JanusVisionModel": replace(_SIGLIP, family="janus"),
    "Aimv2VisionModel": _AIMV2,
    "Ovis2VisionTransformer": replace(_AIMV2, family="ovis2"),
    "Pix2StructVisionModel": _PIX2STRUCT,
    # Full attention over all tokens of a video, or of a spectrogram
    "VideoMAEModel": _VIDEOMAE,
    "VivitModel": Anatomy("vivit"),
    "ASTModel": Anatomy("audio-spectrogram-transformer", prefix=2),
}

_WHY: dict[str, tuple[str, ...]] = {
    "attention inside windows: a token outside the grid belongs to no window, and registers have to be seen by all": (
        *("SwinModel", "SwinBackbone", "Swinv2Model", "Swinv2Backbone", "Swin2SRModel", "DonutSwinModel"),
        *(
            "MaskFormerSwinModel",
            "MaskFormerSwinBackbone",
            "DinatModel",
            "DinatBackbone",
            "HieraModel",
            "HieraBackbone",
        ),
        *("VitDetModel", "VitDetBackbone", "SamVisionEncoder", "SamHQVisionEncoder", "Sam2HieraDetModel"),
        *("Sam3ViTModel", "GotOcr2VisionEncoder", "DeepseekOcr2SamVisionEncoder", "UnlimitedOcrSamVisionEncoder"),
        *("SLANeXtVisionEncoder", "PPFormulaNetVisionModel", "LwDetrViTBackbone", "RfDetrDinov2Backbone"),
        *("MuseGlimmerVisionModel", "MuseSparkVisionModel", "MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel"),
        "MiniCPMOcrVisionModel",
    ),
    "hierarchical: every stage pools or regroups the grid of tokens, which a register has no place in": (
        *("SegformerModel", "PvtModel", "PvtV2Model", "PvtV2Backbone", "CvtModel", "LevitModel", "GLPNModel"),
        *("GroupViTVisionModel", "GroupViTVisionTransformer", "Florence2VisionBackbone", "EfficientLoFTRModel"),
        *("MobileViTModel", "MobileViTV2Model", "SwiftFormerModel"),
    ),
    "convolutional, or without attention between patches: there is no sequence for a register": (
        *("ResNetModel", "ResNetBackbone", "RTDetrResNetBackbone", "RegNetModel", "BitModel", "BitBackbone"),
        *("ConvNextModel", "ConvNextBackbone", "ConvNextV2Model", "ConvNextV2Backbone", "DINOv3ConvNextModel"),
        *("DINOv3ConvNextBackbone", "EfficientNetModel", "AlignVisionModel", "MobileNetV1Model", "MobileNetV2Model"),
        *("PoolFormerModel", "FocalNetModel", "FocalNetBackbone", "TextNetModel", "TextNetBackbone"),
        *("HGNetV2Backbone", "HGNetV2ForImageClassification", "PPLCNetBackbone", "PPLCNetV3Backbone"),
        *("PPLCNetV4Backbone", "FlavaImageCodebook", "JanusVQVAE", "TvpModel", "SuperPointForKeypointDetection"),
        "InklingVisionModel",
    ),
    "the images of a batch are packed into one sequence with lengths or positions of its own for every image": (
        *("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel"),
        *("Qwen3VLMoeVisionModel", "Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Qwen4ExpVisionModel"),
        *("Qwen2_5OmniVisionEncoder", "Qwen3OmniMoeVisionEncoder", "Glm4vVisionModel", "Glm4vMoeVisionModel"),
        *("Glm5NextVisionModel", "GlmOcrVisionModel", "GlmImageVisionModel", "PixtralVisionModel"),
        *("PaddleOCRVisionModel", "VideoLlama3VisionModel", "Kimi_K25VisionModel", "HunYuanVLVisionTransformer"),
        *("Cosmos3EdgeVisionModel", "Lfm3VlVisionModel", "Exaone4_5_VisionModel", "Dots3NoteVisionModel"),
        *("CohereCompassVisionModel", "Inkling2VisionModel", "MiniMaxM3VLVisionModel"),
        *("Ernie4_5_VLMoeVisionTransformerPretrainedModel", "Ernie4_5_VL_MoeVisionTransformerPretrainedModel"),
    ),
    "positions are given to every token of a fixed grid inside the blocks, and a register has none": (
        *("Gemma4VisionModel", "VJEPA2Model", "SegGptModel"),
    ),
    "tokens are merged behind the last block: what the tower returns is shorter than its sequence": (
        *("Llama4VisionModel", "Step3p7VisionModel"),
    ),
    "tiles are padded and run through two encoders under a mask of fixed length": ("MllamaVisionModel",),
    "space and time are attended to in turn, by reshaping the sequence": (
        *("TimesformerModel", "VideoPrismVisionModel"),
    ),
    "every block appends a message token of its own and exchanges it between frames": (
        *("XCLIPVisionModel", "XCLIPVisionTransformer"),
    ),
    "the model puts query tokens of its own into the sequence on the way, and counts tokens from there": (
        *("EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation", "VideomtForUniversalSegmentation"),
        "DeepseekOcr2VisionModel",
    ),
    "its mask is made from the pixels before they are embedded, for the length of the patches": (
        "Kosmos2_5VisionModel",
    ),
    "patches are never in the sequence: latents attend to them, or they become discrete tokens first": (
        *("PerceiverModel", "ChameleonModel", "Emu3Model"),
    ),
    "text and patches are one sequence: the model has no vision tower": (
        *(
            "ViltModel",
            "LayoutLMv2Model",
            "LayoutLMv3Model",
            "UdopStack",
            "BridgeTowerModel",
            "FuyuModel",
            "NeoMMEModel",
        ),
        *("ChameleonModel", "Emu3Model"),
    ),
    "states of single blocks go straight into its connector, and registers would go with them": (
        "GraniteDoclingVisionModel",
    ),
    "its patches come from a convolution or from an encoder with windows, not from the image": (
        "UnlimitedOcrVisionModel",
    ),
}
#: Class name of a model without a place for registers -> the reason, for the error; docs/refused.md has the same list.
REFUSED: dict[str, str] = {name: reason for reason, names in _WHY.items() for name in names}
