"""Tiny random models of timm, OpenCLIP, torchvision and DINOv2's own code, and what users call on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import helpers
import hub_dinov2
import pytest
import torch
import transformers as tf
from cases_base import BLOCKS, HEADS, IMAGE, LABELS, PATCH, PATCHES, WIDTH
from families import perturb
from helpers import flatten, run
from torch import nn

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
torchvision = pytest.importorskip("torchvision")

__all__ = ["CALLS", "DYNAMIC", "STACKS", "PlainSnapshot", "Stack", "build_stack", "call", "images", "tower_of"]

_SHAPE: dict[str, Any] = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": BLOCKS,
    "num_heads": HEADS,
}


def timm_vit(**options: Any) -> Any:
    return timm.models.vision_transformer.VisionTransformer(**_SHAPE, mlp_ratio=2, num_classes=LABELS, **options)


def timm_eva(**options: Any) -> Any:
    options = {"use_rot_pos_emb": True, **options}
    return timm.models.eva.Eva(**_SHAPE, mlp_ratio=2, num_classes=LABELS, **options)


def timm_dinov3(**options: Any) -> Any:
    return timm_eva(
        rope_type="dinov3",
        use_abs_pos_emb=False,
        init_values=1.0,
        rope_rotate_half=True,
        **options,
    )


def timm_features(**options: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=[0, 1], **_SHAPE, **options)


def clip_visual(**options: Any) -> Any:
    return open_clip.transformer.VisionTransformer(
        IMAGE, PATCH, WIDTH, BLOCKS, HEADS, mlp_ratio=2.0, output_dim=16, **options
    )


_CLIP_TEXT = {"context_length": 6, "vocab_size": 64, "width": WIDTH, "heads": HEADS, "layers": 1}
_CLIP_VISION = {
    "image_size": IMAGE,
    "patch_size": PATCH,
    "width": WIDTH,
    "layers": BLOCKS,
    "head_width": WIDTH // HEADS,
    "mlp_ratio": 2.0,
}


def clip_whole(**vision: Any) -> Any:
    return open_clip.model.CLIP(16, {**_CLIP_VISION, **vision}, _CLIP_TEXT)


def coca() -> Any:
    text = {**_CLIP_TEXT, "embed_cls": True, "output_tokens": True}
    pool = {"attentional_pool": True, "attn_pooler_heads": HEADS, "attn_pooler_queries": 8, "output_tokens": True}
    model = open_clip.coca_model.CoCa(WIDTH, _CLIP_TEXT, text, {**_CLIP_VISION, **pool})
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # OpenCLIP leaves it as the memory was
    return model


def clip_timm() -> Any:
    """OpenCLIP's CLIP with a trunk of timm."""
    model = clip_whole(
        timm_model_name="vit_tiny_patch16_224", timm_pool="avg", timm_proj="linear", image_size=2 * IMAGE
    )
    model.visual.trunk = timm_vit(global_pool="avg")
    model.visual.trunk.reset_classifier(0)
    model.visual.head = nn.Sequential(nn.Linear(WIDTH, 16, bias=False))
    return model


def vit_torchvision(**options: Any) -> Any:
    return torchvision.models.VisionTransformer(
        IMAGE, PATCH, BLOCKS, HEADS, WIDTH, 2 * WIDTH, num_classes=LABELS, **options
    )


def timm_wrapper(kind: str = "TimmWrapperModel") -> Any:
    arguments = {**_SHAPE, "mlp_ratio": 2}
    config = tf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=LABELS)
    return getattr(tf, kind)(config)


@dataclass(frozen=True)
class Stack:
    """A model to test.

    Attributes:
        family: Family in the package's table.
        make: Builds the model.
        prefix: Number of tokens before the patches.
        tower: Name of the tower below the model.
        calls: Names of what users call on it, see ``CALLS``.
        native: Name of the registers of its own that the model can have, for which ``make`` takes a number.
    """

    family: str
    make: Callable[..., Any]
    prefix: int = 1
    tower: str = ""
    calls: tuple[str, ...] = ("forward",)
    native: str | None = None


_Call = Callable[[Any, torch.Tensor], Any]

_TEXT = torch.tensor([[1, 5, 9, 2, 0, 0], [1, 7, 8, 9, 2, 0]])


def _intermediates(**options: Any) -> _Call:
    return lambda model, x: model.forward_intermediates(x, **options)


def _layers(**options: Any) -> _Call:
    return lambda model, x: model.get_intermediate_layers(x, **options)


def _visual(**options: Any) -> _Call:
    return lambda model, x: model.visual.forward_intermediates(x, **options)


#: What users call, by name.
CALLS: dict[str, _Call] = {
    "forward": lambda model, x: model(x),
    "features": lambda model, x: model.forward_features(x),
    "head": lambda model, x: model.forward_head(model.forward_features(x)),
    "pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "intermediates": _intermediates(),
    "intermediates-last": _intermediates(indices=1, intermediates_only=True),
    "intermediates-early": _intermediates(indices=[0], stop_early=True, return_prefix_tokens=True),
    "intermediates-nlc": _intermediates(output_fmt="NLC", norm=True),
    "intermediates-prefix": _intermediates(return_prefix_tokens=True, norm=True),
    "intermediates-prefix-nlc": _intermediates(return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True),
    "intermediates-dict": _intermediates(output_dict=True),
    "intermediates-dict-prefix": _intermediates(output_dict=True, return_prefix_tokens=True, output_fmt="NLC"),
    "intermediates-dict-only": _intermediates(output_dict=True, return_prefix_tokens=True, intermediates_only=True),
    "layers": _layers(n=2),
    "layers-reshape": _layers(n=[0], reshape=True, norm=True),
    "layers-prefix": _layers(n=2, return_prefix_tokens=True),
    "layers-all": _layers(n=2, reshape=True, return_prefix_tokens=True, norm=True),
    "is_training": lambda model, x: model(x, is_training=True),
    "masks": lambda model, x: model.forward_features(x, masks=_mask(x)),
    "hub-layers": _layers(n=2),
    "hub-layers-class": _layers(n=[0], return_class_token=True, norm=False),
    "hub-layers-reshape": _layers(n=[0, 1], reshape=True, return_class_token=True),
    "clip-intermediates": _intermediates(),
    "clip-intermediates-nlc": _intermediates(output_fmt="NLC", normalize_intermediates=True, output_extra_tokens=True),
    "clip-intermediates-early": _intermediates(
        indices=[0], stop_early=True, intermediates_only=True, output_extra_tokens=True
    ),
    "visual-intermediates": _visual(output_extra_tokens=True),
    "visual-intermediates-nlc": _visual(output_fmt="NLC", normalize_intermediates=True, intermediates_only=True),
    "whole-intermediates": lambda model, x: model.forward_intermediates(
        image=x, text=_TEXT, image_output_extra_tokens=True, normalize_intermediates=True
    ),
    "image": lambda model, x: model.encode_image(x, normalize=True),
    "image-text": lambda model, x: model(x, _TEXT),
    "hidden-states": lambda model, x: model(pixel_values=x, output_hidden_states=True),
    "pixel_values": lambda model, x: model(pixel_values=x),
}


def _mask(x: torch.Tensor) -> torch.Tensor:
    return (torch.arange(PATCHES) % 3 == 0).expand(len(x), -1)


_EVA_CALLS = (
    *("forward", "features", "head", "pre_logits", "intermediates", "intermediates-last", "intermediates-early"),
    *("intermediates-nlc", "intermediates-prefix", "intermediates-prefix-nlc"),
)
_VIT_CALLS = (
    *(*_EVA_CALLS, "intermediates-dict", "intermediates-dict-prefix", "intermediates-dict-only"),
    *("layers", "layers-reshape", "layers-prefix", "layers-all"),
)
_HUB_CALLS = ("forward", "is_training", "features", "masks", "hub-layers", "hub-layers-class", "hub-layers-reshape")
_CLIP_CALLS = ("forward", "clip-intermediates", "clip-intermediates-nlc", "clip-intermediates-early")
_WHOLE_CALLS = ("image-text", "image", "visual-intermediates", "visual-intermediates-nlc", "whole-intermediates")


def _vit(prefix: int = 1, make: Callable[..., Any] = timm_vit, **options: Any) -> Stack:
    own = options.get("reg_tokens", 0)
    native = None if options.get("pool_include_prefix") or options.get("global_pool") == "prr" else "reg_token"
    return Stack("timm_vit", lambda n=0: make(**{**options, "reg_tokens": own + n}), prefix, "", _VIT_CALLS, native)


def _eva(
    prefix: int = 1, make: Callable[..., Any] = timm_eva, native: str | None = "reg_token", **options: Any
) -> Stack:
    own = options.get("num_reg_tokens", 0)
    return Stack("timm_eva", lambda n=0: make(**{**options, "num_reg_tokens": own + n}), prefix, "", _EVA_CALLS, native)


def _hub(prefix: int = 1, **options: Any) -> Stack:
    own, make = options.get("num_register_tokens", 0), hub_dinov2.DinoVisionTransformer
    return Stack(
        "dinov2_hub",
        lambda n=0: make(**{**options, "num_register_tokens": own + n}),
        prefix,
        "",
        _HUB_CALLS,
        "register_tokens",
    )


def _features(**options: Any) -> Stack:
    return Stack(
        "timm_vit", lambda n=0: timm_features(reg_tokens=n, **options), 1, "model", ("forward",), "model.reg_token"
    )


def _clip(calls: tuple[str, ...] = _CLIP_CALLS, **options: Any) -> Stack:
    return Stack("open_clip", lambda: clip_visual(**options), calls=calls)


_POOLER = {"attn_pooler_queries": 8, "attn_pooler_heads": HEADS}

STACKS: dict[str, Stack] = {
    "timm": _vit(),
    "timm-avg": _vit(global_pool="avg"),
    "timm-avg-norm": _vit(global_pool="avg", fc_norm=False, pool_include_prefix=True),
    "timm-avgmax": _vit(global_pool="avgmax"),
    "timm-max": _vit(global_pool="max"),
    "timm-map": _vit(0, global_pool="map", class_token=False),
    "timm-map-prefix": _vit(global_pool="map", pool_include_prefix=True),
    "timm-prr": _vit(global_pool="prr"),
    "timm-unpooled": _vit(global_pool=""),
    "timm-no-class": _vit(0, global_pool="avg", class_token=False),
    "timm-registers": _vit(4, reg_tokens=3, no_embed_class=True),
    "timm-registers-embedded": _vit(4, reg_tokens=3),
    "timm-registers-only": _vit(3, reg_tokens=3, class_token=False, global_pool="avg"),
    "timm-clip": _vit(pre_norm=True, init_values=0.1),
    "timm-dynamic": _vit(dynamic_img_size=True),
    "timm-dynamic-registers": _vit(4, dynamic_img_size=True, reg_tokens=3),
    "timm-qk-norm": _vit(qk_norm=True, final_norm=False),
    "timm-swiglu": _vit(mlp_layer=timm.layers.SwiGLU),
    "timm-parallel": _vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
    "deit-distilled": Stack(
        "timm_vit",
        lambda: timm.models.deit.VisionTransformerDistilled(**_SHAPE, num_classes=LABELS),
        2,
        calls=_VIT_CALLS,
    ),
    "eva": _eva(use_rot_pos_emb=False),
    "eva02": _eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False, init_values=0.1),
    "eva-token": _eva(global_pool="token", dynamic_img_size=True),
    "eva-map": _eva(global_pool="map", native=None),  # its pooling reads the registers too
    "eva-post-norm": _eva(use_post_norm=True),
    "eva-rope-attention": _eva(attn_type="rope", num_reg_tokens=2, prefix=3),
    "eva-mixed": _eva(rope_type="mixed", use_pre_transformer_norm=True),
    "dinov3-timm": _eva(3, timm_dinov3, num_reg_tokens=2),
    "features_only": _features(),
    "features_only-dynamic": _features(dynamic_img_size=True),
    "open_clip": _clip(),
    "open_clip-avg": _clip(pool_type="avg", no_ln_pre=True, ls_init_value=0.1, output_tokens=True),
    "open_clip-unpooled": _clip(pool_type="none", final_ln_after_pool=True),
    "open_clip-attentional": _clip(("forward",), attentional_pool=True, output_tokens=True, **_POOLER),
    "open_clip-custom-blocks": _clip(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_fc=True),
    "open_clip-whole": Stack("open_clip", clip_whole, tower="visual", calls=_WHOLE_CALLS),
    "coca": Stack("open_clip", coca, tower="visual", calls=("image-text", "image")),
    "open_clip-timm": Stack("timm_vit", clip_timm, tower="visual.trunk", calls=_WHOLE_CALLS),
    "torchvision": Stack("torchvision", vit_torchvision),
    "torchvision-representation": Stack("torchvision", lambda: vit_torchvision(representation_size=16)),
    "hub": _hub(),
    "hub-registers": _hub(4, num_register_tokens=3),
    "hub-swiglu": _hub(ffn_layer="swiglu", fused=False),
    "timm-wrapper": Stack("timm_vit", timm_wrapper, tower="timm_model", calls=("pixel_values", "hidden-states")),
    "timm-wrapper-classifier": Stack(
        "timm_vit",
        lambda: timm_wrapper("TimmWrapperForImageClassification"),
        tower="timm_model",
        calls=("pixel_values", "hidden-states"),
    ),
}


#: Models that take images of any size.
DYNAMIC = ("timm-dynamic", "timm-dynamic-registers", "eva-token", "features_only-dynamic", "hub", "hub-registers")


#: Models that the installed release of their library cannot build -> why.
_LACKING: dict[str, str] = {}
if "'prr'" not in inspect.getsource(timm.models.vision_transformer.VisionTransformer):
    _LACKING["timm-prr"] = "this timm has no pooling of the kind prr (1.0.26 has)"


@cache
def _built(name: str) -> Any:
    if name in _LACKING:
        pytest.skip(_LACKING[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STACKS[name].make()
    perturb(model)
    return model.eval().requires_grad_(False)


def build_stack(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of the model ``name``, frozen, in evaluation mode; the same weights at every call."""
    return copy.deepcopy(_built(name)).to(dtype)


def images(size: int | tuple[int, int] = IMAGE, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random images ``(B, 3, H, W)``, the same at every call."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def call(name: str, model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The flat outputs of one of ``CALLS``, without gradients."""
    with torch.no_grad():
        return flatten(CALLS[name](model, x))


def tower_of(name: str, model: Any) -> Any:
    """The vision tower in the model ``name``."""
    return model.get_submodule(STACKS[name].tower)


class PlainSnapshot(helpers.Snapshot):
    """A snapshot of a model that cannot be asked for hidden states; it watches plain attributes of all modules too."""

    def __post_init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(helpers, "run", lambda model, inputs, **options: run(model, inputs))
            super().__post_init__()
        self.plain = self._plain()

    def _plain(self) -> dict[tuple[str, str], Any]:
        kinds = (bool, int, float, str, type(None))
        return {
            (name, key): value if isinstance(value, kinds) else None
            for name, module in self.model.named_modules()
            for key, value in vars(module).items()
        }

    def check(self) -> None:
        super().check()
        assert self._plain() == self.plain
