"""Planted artifacts whose norm is low, or like everybody's: what a rule on high norms cannot see.

OpenAI CLIP and OpenCLIP have artifacts with a *lower* norm than their neighbours. The construction is that of
:mod:`register_adapter.testbed.plant`, with another vector: the mean state of the patches hit is taken away, and a
vector that draws attention is put in its place, so that the norm of the new state can be chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..features.trace import capture
from ..towers.tower import find_tower
from .plant import Planting, _attractive_vector, _default_images, _write_columns, plant_artifacts

__all__ = ["plant_low_norm_artifacts"]


def plant_low_norm_artifacts(
    model: nn.Module,
    block: int | None = None,
    pixel_values: torch.Tensor | None = None,
    *,
    norm: float = 0.4,
    attraction_steps: int = 20,
    seed: int = 0,
    **options: Any,
) -> Planting:
    """A copy of a clean model whose planted artifacts have a chosen norm behind the planted block.

    Args:
        model: As for :func:`plant_artifacts`; it is left as it is.
        block: Index of the block that gets the neurons; default: the middle.
        pixel_values: Images to fit on, ``(M, 3, H, W)``.
        norm: Median norm of the patches hit, at the output of that block, over that of all patches there: below 1
            is low, 1 is inconspicuous. It is reached as far as the patches hit are alike; later blocks add to it.
        attraction_steps: Steps of the search for a vector that later blocks attend to; 0 takes a random one.
        seed: Seed of everything random.
        options: ``num_neurons`` and ``share``, as for :func:`plant_artifacts`.

    Returns:
        The :class:`Planting`.

    Raises:
        ValueError: ``norm`` is not above 0, or no patch of the images is hit.
        UnsupportedModelError: As for :func:`plant_artifacts`.
    """
    if not norm > 0:
        raise ValueError(f"norm must be above 0, got {norm}")
    if pixel_values is None:
        pixel_values = _default_images(find_tower(model), seed)
    planting = plant_artifacts(model, block, pixel_values, attraction_steps=0, seed=seed, **options)
    planted, neurons = planting.model, list(planting.neurons)
    tower = find_tower(planted)
    mode = planted.training
    planted.eval().requires_grad_(False)
    pixel_values = pixel_values.to(tower.block_part(planting.block, "mlp_in").weight)
    pairs = [neurons[start : start + 2] for start in range(0, len(neurons), 2)]

    width = tower.block_part(planting.block, "mlp_out").weight.shape[0]
    _write_columns(tower, planting.block, pairs, torch.zeros(width, device=pixel_values.device))
    hits = planting.hits(pixel_values)
    if not hits.any():
        raise ValueError("no patch of the images is hit: give more images, or a larger share")
    with torch.no_grad(), capture(planted, attentions=False) as trace:
        tower.run(pixel_values)
    states = trace.patches(planting.block + 1).float()
    mean = states[hits].mean(0)
    wanted = norm * states.norm(dim=-1).median()
    left = (states[hits] - mean).norm(dim=-1).median()
    size = float((wanted.square() - left.square()).clamp_min((0.1 * wanted).square()).sqrt())
    _write_columns(tower, planting.block, pairs, -mean)
    vector = _attractive_vector(planted, tower, planting.block, pairs[0], pixel_values[:64], size, attraction_steps)
    _write_columns(tower, planting.block, pairs, vector - mean)
    for copied, original in zip(planted.parameters(), model.parameters(), strict=True):
        copied.requires_grad_(original.requires_grad)
    planted.train(mode)
    return planting
