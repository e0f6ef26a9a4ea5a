"""Planted models whose clean twin is known: the shipped ViT, and models of two other families with other plantings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from register_adapter.data.datasets import ProcessedDataset
from register_adapter.testbed import (
    Planting,
    SceneDataset,
    load_image_processor,
    load_planted_vit,
    load_vit,
    plant_artifacts,
)

__all__ = ["CASES", "Case", "pixels_of"]

#: Parts of the shipped ViT, and what they are called in models of the same arithmetic.
_DINOV2 = {
    "vit.embeddings": "dinov2.embeddings",
    "vit.layers": "dinov2.encoder.layer",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "vit.layernorm": "dinov2.layernorm",
}
_SIGLIP = {
    "vit.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vit.layers": "vision_model.encoder.layers",
    "attention.o_proj": "self_attn.out_proj",
    "attention": "self_attn",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
    "vit.layernorm": "vision_model.post_layernorm",
}


@dataclass(frozen=True)
class Case:
    """One planted model.

    Attributes:
        name: In the table.
        twin: The model before planting, in evaluation mode.
        planting: The planted copy, and which patches are hit.
        device: Where arms are made and measured.
    """

    name: str
    twin: Any
    planting: Planting
    device: str = "cpu"

    def base(self) -> Any:
        """A fresh copy of the planted model, on the device."""
        return copy.deepcopy(self.planting.model).to(self.device)


def pixels_of(count: int, seed: int, split: Literal["train", "test"] = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes as the models take them: ``(N, 3, 80, 80)`` float32, and labels ``(N,)``."""
    scenes = ProcessedDataset(SceneDataset(count, seed=seed, split=split), load_image_processor())
    items = [scenes[index] for index in range(count)]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


def _renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            if key.startswith(old) or f".{old}." in key:
                key = key.replace(old, new, 1)
                if old in ("attention.o_proj", "attention"):
                    break
        renamed[key] = value
    return renamed


def _shape(vit: Any) -> dict[str, Any]:
    config = vit.config
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps"]
    return {name: getattr(config, name) for name in names}


def _labels(vit: Any) -> dict[str, Any]:
    return {"id2label": vit.config.id2label, "label2id": vit.config.label2id}


def make_shipped() -> Case:
    """The shipped ViT and its planting, whose vector draws attention by construction: block 3, 8 ×, CLS looks there."""
    return Case("shipped ViT", load_vit(), load_planted_vit())


def make_dinov2() -> Case:
    """A DINOv2 that computes what the shipped ViT does (layer scales are one), planted at block 4, 5 ×."""
    vit = load_vit()
    config = tf.Dinov2Config(**_shape(vit), mlp_ratio=4, layerscale_value=1.0, **_labels(vit))
    model: Any = tf.Dinov2ForImageClassification(config).eval()
    state = _renamed(vit.state_dict(), _DINOV2)
    # Its head reads CLS and the patches' mean.
    state["classifier.weight"] = torch.cat([vit.classifier.weight, torch.zeros_like(vit.classifier.weight)], 1).detach()
    missing, unexpected = model.load_state_dict(state, strict=False)
    strange = [key for key in missing if "layer_scale" not in key and "mask_token" not in key]
    if strange or unexpected:
        raise RuntimeError(f"the ViT does not fit a DINOv2: {strange}, {unexpected}")
    return Case("DINOv2", model, plant_artifacts(model, 4, pixels_of(128, 41)[0], strength=5.0, seed=1))


def make_siglip() -> Case:
    """A SigLIP, which has no CLS, begun at the shipped ViT's weights and trained on scenes; planted at block 2, 6 ×."""
    vit = load_vit()
    shape = {**_shape(vit), "intermediate_size": vit.config.intermediate_size, "hidden_act": "gelu"}
    config = tf.SiglipConfig(vision_config={**shape, "vision_use_head": False}, **_labels(vit))
    torch.manual_seed(0)
    model: Any = tf.SiglipForImageClassification(config)
    state = _renamed(vit.state_dict(), _SIGLIP)
    positions = state.pop("vit.embeddings.position_embeddings")
    state["vision_model.embeddings.position_embedding.weight"] = positions[0, 1:]
    del state["vit.embeddings.cls_token"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the ViT does not fit a SigLIP: {missing}, {unexpected}")
    _train(model, steps=120)
    return Case("SigLIP", model.eval(), plant_artifacts(model.eval(), 2, pixels_of(128, 41)[0], strength=6.0, seed=2))


def _train(model: nn.Module, steps: int, batch: int = 32) -> None:
    """Cross-entropy on scenes, as ``scripts/train_testbed.py`` trains the shipped model, but shorter."""
    pixels, labels = pixels_of(steps * batch, 43)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = tf.get_cosine_schedule_with_warmup(optimizer, 10, steps)
    model.train()
    for start in range(0, steps * batch, batch):
        logits = model(pixel_values=pixels[start : start + batch]).logits
        F.cross_entropy(logits, labels[start : start + batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.requires_grad_(True)


#: Name of a case to what makes it.
CASES: dict[str, Callable[[], Case]] = {"shipped": make_shipped, "dinov2": make_dinov2, "siglip": make_siglip}
