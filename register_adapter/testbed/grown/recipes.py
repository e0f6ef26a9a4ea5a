"""How each grown model is made: what it learns, its shape, and how it is trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from ...towers.calls import first_of
from ...towers.tower import find_tower
from ...tuner import add_registers
from .mosaics import MosaicTask

__all__ = ["RECIPES", "TWINS", "GrownModel", "MaskedModel", "PooledModel", "Recipe", "build"]

#: Outputs of a head that tells images apart, ``objective="dino"``.
_PROTOTYPES = 256


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
        objective: What is learned of the images, a name in :data:`.objectives.OBJECTIVES`.
        masked: Share of the tiles that ``objective="mae"`` hides.
        mix: Images mixed in pairs, a name in :data:`.mixes.MIXES`; ``""`` for none.
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
    objective: str = "targets"
    masked: float = 0.6
    mix: str = ""
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
        tokens = ("position_embeddings", "cls_token", "mask_token", "query", "registers")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim > 1 and not any(token in name for token in tokens)
        }


class PooledModel(GrownModel):
    """A model with one query more, which says the image's summary from what it finds in the patch tokens.

    It stands behind the last block, so that what is no linear function of the tokens has to be formed in these.
    """

    def __init__(self, backbone: nn.Module, width: int, num_targets: int) -> None:
        super().__init__(backbone, width, num_targets)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Predictions ``(B, 1 + P, num_targets)``, first the query's."""
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        pooled = (self.weights(tokens)[..., None] * self.value(tokens)).sum(-2, keepdim=True)
        predictions: torch.Tensor = self.head(torch.cat([pooled, tokens], -2))
        return predictions

    def weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """The query's attention ``(B, P)`` to tokens ``(B, P, D)`` behind the norm."""
        scores: torch.Tensor = (self.query * self.key(tokens)).sum(-1) / tokens.shape[-1] ** 0.5
        return scores.softmax(-1)


class MaskedModel(GrownModel):
    """A backbone that sees some of the tiles, and one block more that says what the hidden ones hold.

    The block and its tokens serve the training alone; :func:`.packaged.save_grown` leaves them out.

    Args:
        backbone: A vision transformer of patch tokens alone.
        width: Its hidden size.
        num_targets: Numbers in a tile's target.
        masked: Share of the tiles that are hidden.
    """

    def __init__(self, backbone: Any, width: int, num_targets: int, masked: float) -> None:
        super().__init__(backbone, width, num_targets)
        places = backbone.embeddings.position_embeddings
        self.visible = max(1, round((1 - masked) * places.shape[1]))
        self.decoder = copy.deepcopy(find_tower(backbone).part("blocks")[-1])
        for part in self.decoder.modules():
            if hasattr(part, "config"):
                part.config = backbone.config  # attention is as in the backbone, also when that changes
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(places.detach().clone())
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixel_values: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """Predictions ``(B, P, num_targets)``; only the first tiles of ``order`` ``(B, P)`` are seen, or all."""
        backbone: Any = self.backbone
        if order is None:
            tokens = backbone(pixel_values=pixel_values).last_hidden_state
        else:
            tokens = _taken(backbone.embeddings(pixel_values), order[:, : self.visible])
            for block in find_tower(backbone).part("blocks"):
                tokens = first_of(block(tokens))
            hidden = self.mask_token.expand(len(tokens), order.shape[1] - self.visible, -1)
            tokens = _taken(torch.cat([backbone.layernorm(tokens), hidden], 1), order.argsort(1))
        decoded = first_of(self.decoder(tokens + self.position_embeddings))
        predictions: torch.Tensor = self.head(self.norm(decoded))
        return predictions


def _taken(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def build(recipe: Recipe, seed: int) -> GrownModel:
    """The untrained model of a recipe; registers that it has from the start are an adapter on it.

    Raises:
        ValueError: ``objective="mae"`` with CLS or registers, which its encoder of visible tiles has no place for.
    """
    if recipe.objective == "mae" and (recipe.cls or recipe.registers):
        raise ValueError(
            f'objective="mae" hides tiles of a model without other tokens; the recipe has cls={recipe.cls} and '
            f"registers={recipe.registers}: leave them out, or choose another objective"
        )
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
    outputs = {"mae": recipe.task.contents, "dino": _PROTOTYPES}.get(recipe.objective, recipe.task.num_targets)
    if recipe.objective == "mae":
        return MaskedModel(backbone, recipe.width, outputs, recipe.masked)
    kind = PooledModel if recipe.task.summary_at == "pooled" else GrownModel
    return kind(backbone, recipe.width, outputs)


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
