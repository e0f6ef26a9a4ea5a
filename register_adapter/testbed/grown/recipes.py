"""How each grown model is made: what it learns, its shape, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from ...tuner import add_registers
from .mosaics import MosaicTask

__all__ = ["RECIPES", "TWINS", "GrownModel", "Recipe", "build"]


@dataclass(frozen=True)
class Recipe:
    """One model.

    Attributes:
        task: What it learns.
        width: Hidden size ``D``.
        blocks: Number of blocks.
        heads: Number of heads.
        mlp: Hidden units of each MLP. A narrow MLP cannot take away what attention leaks, a wide one can.
        act: Its activation.
        cls: Whether the model has a CLS token.
        cls_loss: Weight of a loss that CLS has of its own: its prediction is to be four times the mean target of the
            image's tiles.
        registers: Register tokens that it has from the start.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: After the warm-up, constant.
        warmup_steps: Steps over which it rises.
        weight_decay: Of matrices; biases, norms and embeddings have none.
    """

    task: MosaicTask = field(default_factory=MosaicTask)
    width: int = 64
    blocks: int = 6
    heads: int = 4
    mlp: int = 16
    act: str = "relu"
    cls: bool = False
    cls_loss: float = 0.0
    registers: int = 0
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step."""
        return min(1.0, (step + 1) / self.warmup_steps)


class GrownModel(nn.Module):
    """Backbone and linear head: what is said of each tile.

    Args:
        backbone: A vision transformer whose patch tokens come last.
        width: Its hidden size.
        num_targets: Numbers in a tile's target.
    """

    def __init__(self, backbone: nn.Module, width: int, num_targets: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_targets)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Predictions ``(B, prefix + P, num_targets)`` for pixels ``(B, 3, H, W)``, from tokens behind the norm."""
        predictions: torch.Tensor = self.head(self.backbone(pixel_values=pixel_values).last_hidden_state)
        return predictions

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay applies to: matrices, but no embeddings."""
        tokens = ("position_embeddings", "cls_token", "registers")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim > 1 and not any(token in name for token in tokens)
        }


def build(recipe: Recipe, seed: int) -> GrownModel:
    """The untrained model of a recipe; registers that it has from the start are an adapter on it."""
    transformers.set_seed(seed)
    kinds: dict[bool, tuple[Any, Any, dict[str, Any]]] = {
        True: (transformers.ViTConfig, transformers.ViTModel, {"add_pooling_layer": False}),
        False: (transformers.IJepaConfig, transformers.IJepaModel, {}),
    }
    make_config, make_model, options = kinds[recipe.cls]
    config = make_config(
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        hidden_act=recipe.act,
        image_size=recipe.task.image_size,
        patch_size=recipe.task.patch_size,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    backbone = make_model(config, **options)
    if recipe.registers:
        backbone = add_registers(backbone, num_registers=recipe.registers)
        backbone.requires_grad_(True)
    return GrownModel(backbone, recipe.width, recipe.task.num_targets)


_MOSAICS = Recipe(steps=1500)
_TILES = Recipe(
    task=MosaicTask(grid=7, asking=8, background=(2, 4), contrast=(0.3, 0.3), background_weight=0.1),
    blocks=4,
    heads=1,
    mlp=8,
    batch_size=24,
)
#: Models whose artifacts grow, by name.
RECIPES = {"mosaics": _MOSAICS, "tiles": _TILES}
#: What each is compared with: the same, but for one thing.
TWINS: dict[str, dict[str, Any]] = {
    "registers": {"registers": 4},
    "cls": {"cls": True},
    "wide": {"mlp": 256},
}
