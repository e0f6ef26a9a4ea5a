"""The table's rows for vision transformers outside transformers: timm, OpenCLIP, torchvision, DINOv2's own code.

Keys are ``package.ClassName`` where a class name alone does not say which library it is from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .anatomy import Anatomy

__all__ = ["CONDITIONS", "STACKS", "VARIANTS"]

# The tower's own count of prefix tokens is CLS, distillation token and registers together.
_TIMM_VIT = Anatomy(
    "timm_vit",
    embeddings="norm_pre",
    insert_at="input",
    remove="norm",
    blocks="blocks",
    prefix=0,
    native_registers="num_prefix_tokens",
    pass_methods=("forward_features",),
    counted_methods=("forward_intermediates",),
    method_counter="num_prefix_tokens",
    attention="attn",
    attention_maps="dropout",
    mlp_in=("mlp.fc1_g", "mlp.fc1"),
    mlp_up="mlp.fc1_x",
    mlp_out="mlp.fc2",
    mlp_scale=("ls2.gamma", "gamma_2"),
    patch_embedding="patch_embed.proj",
    position_embedding="pos_embed",
    cls_token="cls_token",
    final_norm="norm",
)

STACKS: dict[str, Anatomy] = {
    "timm.VisionTransformer": _TIMM_VIT,
    # Its blocks turn what stands behind the prefix tokens, which registers join.
    "timm.Eva": replace(_TIMM_VIT, family="timm_eva", rotary="rope"),
    "open_clip.VisionTransformer": Anatomy(
        "open_clip",
        embeddings="ln_pre",
        insert_at="input",
        remove="transformer",
        remove_from="output",
        blocks="transformer.resblocks",
        # The tower's own is one pass from the embeddings on, whatever adapters another thread sets meanwhile.
        methods=("forward_intermediates", "transformer.forward_intermediates"),
        attention="attn",
        attention_maps="weights",
        mlp_in="mlp.c_fc",
        mlp_up=None,
        mlp_out="mlp.c_proj",
        mlp_scale="ls_2.gamma",
        patch_embedding="conv1",
        position_embedding="positional_embedding",
        cls_token="class_embedding",
        final_norm="ln_post",
    ),
    "torchvision.VisionTransformer": Anatomy(
        "torchvision",
        embeddings="encoder.dropout",
        remove="encoder.ln",
        blocks="encoder.layers",
        attention="self_attention",
        attention_maps="weights",
        mlp_in="mlp.0",
        mlp_up=None,
        mlp_out="mlp.3",
        mlp_scale=None,
        patch_embedding="conv_proj",
        position_embedding="encoder.pos_embedding",
        cls_token="class_token",
        final_norm="encoder.ln",
    ),
    # facebookresearch/dinov2, as torch.hub loads it. Tokens are prepared by a method, so registers enter with block 0.
    "DinoVisionTransformer": Anatomy(
        "dinov2_hub",
        embeddings="blocks.0",
        insert_at="input",
        remove="norm",
        blocks="blocks",
        native_registers="num_register_tokens",
        methods=("forward_features",),
        counted_methods=("get_intermediate_layers",),
        method_counter="num_register_tokens",
        attention="attn",
        attention_maps="dropout",
        mlp_in=("mlp.fc1", "mlp.w12"),
        mlp_up=None,
        mlp_out=("mlp.fc2", "mlp.w3"),
        mlp_scale="ls2.gamma",
        patch_embedding="patch_embed.proj",
        position_embedding="pos_embed",
        cls_token="cls_token",
        final_norm="norm",
    ),
}

#: Family -> attributes of the tower, the values they must have, and why registers cannot enter otherwise.
CONDITIONS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "open_clip": (
        ("transformer.batch_first", True, "its blocks take (tokens, batch, width); a newer open_clip_torch has others"),
    ),
    "dinov2_hub": (
        ("chunked_blocks", False, "its methods reach past the chunks to the blocks; build it with block_chunks=0"),
    ),
}

#: Family -> attributes of the tower that, where they are set, change its row.
VARIANTS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    # Patch tokens go through no norm where the last one comes after pooling.
    "open_clip": (
        ("attn_pool", {"final_norm": None, "norm_patches": False}),
        ("final_ln_after_pool", {"norm_patches": False}),
    ),
}
