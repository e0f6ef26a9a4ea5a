"""A model in a few numbers: how many outliers, how accurate, how far from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..artifacts import summarise_norms
from ..features.finite import check_finite_features, subject_in_words
from ..features.trace import capture

__all__ = ["Measured", "Reference", "measure_model"]


@dataclass(frozen=True)
class Reference:
    """Outputs that others are compared with: ``(B, patches, D)`` and, where there is one, CLS ``(B, D)``."""

    patches: torch.Tensor
    cls: torch.Tensor | None


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        name: What was measured.
        outlier_share: Share of patch tokens over 3 times the median norm (L2, last block, before the final LayerNorm).
        largest_norm: Largest such norm over the median.
        accuracy: Top-1 accuracy, ``None`` without labels or logits.
        patch_drift: Mean of 1 - cosine to the reference's patch tokens, ``None`` without a reference.
        cls_drift: The same for CLS.
    """

    name: str
    outlier_share: float
    largest_norm: float
    accuracy: float | None = None
    patch_drift: float | None = None
    cls_drift: float | None = None


@torch.no_grad()
def measure_model(
    name: str,
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    labels: torch.Tensor | None = None,
    reference: Reference | None = None,
) -> tuple[Measured, Reference]:
    """Measure a model with or without registers.

    Args:
        name: What to call it.
        model: Called as ``model(pixel_values=...)``, in the mode it is in.
        batches: Pixel values, ``(B, 3, H, W)`` each.
        labels: ``(images,)`` int64 class indices of the model's logits.
        reference: What to compare with.

    Returns:
        The numbers, and the outputs as a reference for others.

    Raises:
        RegisterAdapterError: The patch tokens are not finite (NaN or infinite).
    """
    patches, cls, right = [], [], []
    for pixel_values in batches:
        with capture(model, attentions=False) as trace:
            logits = getattr(model(pixel_values=pixel_values), "logits", None)
        patches.append(trace.patches().float().cpu())
        last = len(trace.hidden_states) - 1
        check_finite_features({"patch tokens": patches[-1]}, subject_in_words(model), last, title=name)
        if trace.prefix:
            cls.append(trace.hidden_states[-1][:, 0].float().cpu())
        if labels is not None and logits is not None:
            start = sum(len(part) for part in patches[:-1])
            right.append(logits.argmax(-1).cpu() == labels[start : start + len(logits)])
    outputs = Reference(torch.cat(patches), torch.cat(cls) if cls else None)
    summary = summarise_norms(outputs.patches.norm(dim=-1))
    return (
        Measured(
            name,
            summary.share,
            summary.largest,
            torch.cat(right).float().mean().item() if right else None,
            _drift(outputs.patches, reference.patches) if reference else None,
            _drift(outputs.cls, reference.cls) if reference else None,
        ),
        outputs,
    )


def _drift(outputs: torch.Tensor | None, reference: torch.Tensor | None) -> float | None:
    if outputs is None or reference is None:
        return None
    return (1 - F.cosine_similarity(outputs, reference, dim=-1)).mean().item()
