"""Measures between tokens that several objectives share."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F

__all__ = ["base_of", "feature_loss", "neighbour_mean", "text_logits", "unit"]


def feature_loss(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``(1 - cosine) + mean squared error`` of every token, ``(B, P)`` float32; the error is of tokens as they are.

    The loss of "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501).

    Args:
        student: ``(B, P, D)``.
        target: ``(B, P, D)``, without a gradient.
    """
    student, target = student.float(), target.float()
    return 1.0 - F.cosine_similarity(student, target, dim=-1) + (student - target).square().mean(-1)


def neighbour_mean(tokens: torch.Tensor, clean: torch.Tensor, grid: tuple[int, int], radius: int = 1) -> torch.Tensor:
    """The mean of the clean tokens around every patch, ``(B, P, D)``.

    Args:
        tokens: ``(B, P, D)``.
        clean: ``(B, P)`` bool; a patch without a clean one within ``radius`` looks further, and at last at the image.
        grid: ``(h, w)``.
        radius: Neighbours in a square of ``2 * radius + 1`` patches.
    """
    height, width = grid
    batch, _, width_of_tokens = tokens.shape
    weights = clean.to(tokens.dtype).view(batch, 1, height, width)
    values = tokens.transpose(1, 2).reshape(batch, width_of_tokens, height, width) * weights
    mean = torch.zeros_like(values)
    left = torch.ones_like(weights, dtype=torch.bool)
    while True:
        side = 2 * radius + 1
        share, sums = (F.avg_pool2d(maps, side, stride=1, padding=radius) for maps in (weights, values))
        enough = left & (share > 0.5 / side**2)
        mean = torch.where(enough, sums / share.clamp_min(1e-9), mean)
        left = left & ~enough
        if not bool(left.any()) or radius >= max(height, width):
            break
        radius *= 2
    return mean.flatten(2).transpose(1, 2)


def text_logits(base: nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What the model makes of the cosines between embeddings of length 1, ``(R, E)`` and ``(C, E)``: ``(R, C)``."""
    scale: Any = getattr(base, "logit_scale")  # noqa: B009
    most, bias = getattr(base, "max_log_logit_scale", None), getattr(base, "logit_bias", None)
    scale = scale if most is None else scale.clamp(0.0, most)  # AIMv2
    logits: torch.Tensor = rows @ columns.T * scale.float().exp().to(rows.device)
    return logits if bias is None else logits + bias.float().to(rows.device)


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings ``(..., E)`` as float32 of length 1."""
    return F.normalize(embeds.float(), dim=-1)


def base_of(model: nn.Module) -> Any:
    """The base model below adapters and what wraps it for distributed training."""
    inner: Any = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
