"""Running a vision tower for its statistics: where images go."""

from __future__ import annotations

import torch

from ..towers.tower import Tower

__all__ = ["place_of"]


def place_of(tower: Tower) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the pictures: those of the tower's first floating point weight."""
    weights = [*tower.module.parameters(), *tower.module.buffers()]
    for weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight.device, weight.dtype
    return (weights[0].device if weights else torch.device("cpu")), torch.float32
