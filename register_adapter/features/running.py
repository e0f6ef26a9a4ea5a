"""Running a vision tower for its statistics: where images go, where the model came from."""

from __future__ import annotations

import torch
from torch import nn

from ..towers.tower import Tower

__all__ = ["place_of", "source_of"]


def place_of(tower: Tower) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the pictures: those of the tower's first floating point weight."""
    weights = [*tower.module.parameters(), *tower.module.buffers()]
    for weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight.device, weight.dtype
    return (weights[0].device if weights else torch.device("cpu")), torch.float32


def source_of(model: nn.Module, tower: Tower) -> str | None:
    """Name or folder that the model was loaded from."""
    for config in (getattr(model, "config", None), tower.config):
        name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
        if name:
            return str(name)
    return None
