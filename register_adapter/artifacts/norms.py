"""L2 norms of patch tokens, and how many of them are outliers.

"Vision Transformers Need Registers" (arXiv 2309.16588) calls a patch token an artifact when its L2 norm is about ten
times the others'; the distribution is bimodal, so where between the modes the threshold lies hardly matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from ..features.layout import adapters_stay, each_outside
from ..features.subjects import keeping_adapters
from ..features.trace import capture
from ..towers.tower import Tower
from ..tuner.layer import find_register_layer

__all__ = ["NormSummary", "neighbour_similarity", "patch_norms", "similarity_of", "summarise_norms"]


@keeping_adapters
def patch_norms(model: nn.Module, batches: Iterable[torch.Tensor], layer: int = -1) -> torch.Tensor:
    """L2 norms of the patch tokens behind one block, before the final LayerNorm.

    Args:
        model: A base model or one with registers; registers and CLS do not count.
        batches: Pixel values, ``(B, 3, H, W)`` each, on the model's device.
        layer: Index into ``hidden_states``: 0 is the input of the first block, -1 the output of the last.

    Returns:
        ``(images, patches)`` float32 on the CPU.
    """
    norms, registers = [], find_register_layer(model)
    for pixel_values in each_outside(batches):
        with adapters_stay(registers), torch.no_grad(), capture(model, attentions=False) as trace:
            model(pixel_values=pixel_values)
        norms.append(trace.patches(layer).float().norm(dim=-1).cpu())
    return torch.cat(norms)


@dataclass(frozen=True)
class NormSummary:
    """Patch norms of a set of images in a few numbers.

    Attributes:
        share: Share of patch tokens whose norm is over ``factor`` times the median.
        largest: Largest norm over the median.
        median: Median norm over all patches of all images.
        factor: The threshold.
    """

    share: float
    largest: float
    median: float
    factor: float


def summarise_norms(norms: torch.Tensor, factor: float = 3.0) -> NormSummary:
    """Count outliers in ``(images, patches)`` norms: those over ``factor`` times the median of all of them."""
    median = norms.median().item()
    return NormSummary((norms > factor * median).float().mean().item(), (norms.max() / median).item(), median, factor)


@torch.no_grad()
def neighbour_similarity(tower: Tower, pixel_values: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every patch to its up to 4 neighbours right after the patch embedding, without position.

    Artifacts sit where it is high (arXiv 2309.16588, figure 5a): such patches say little that others do not say.

    Args:
        tower: The vision tower.
        pixel_values: ``(B, 3, H, W)``.

    Returns:
        ``(B, h, w)``, the mean over the neighbours that exist.

    Raises:
        UnsupportedModelError: The tower embeds patches in another way than by a 2-D convolution.
    """
    convolution = tower.part("patch_embedding")
    if not isinstance(convolution, nn.Conv2d):
        raise UnsupportedModelError(
            f"{type(tower.module).__name__} embeds its patches without a 2-D convolution, so they have no known places"
        )
    return similarity_of(convolution(pixel_values.to(convolution.weight.dtype)))


def similarity_of(features: torch.Tensor) -> torch.Tensor:
    """Mean cosine ``(B, h, w)``, float32, of every cell of ``(B, D, h, w)`` to its up to 4 neighbours."""
    features = F.normalize(features.float(), dim=1)
    total = features.new_zeros(features.shape[0], *features.shape[2:])
    count = torch.zeros_like(total)
    for dim in (1, 2):
        size = total.shape[dim]
        first, second = features.narrow(dim + 1, 0, size - 1), features.narrow(dim + 1, 1, size - 1)
        cosine = (first * second).sum(1)
        for start in (0, 1):
            total.narrow(dim, start, size - 1).add_(cosine)
            count.narrow(dim, start, size - 1).add_(1)
    return total / count.clamp_min(1)
