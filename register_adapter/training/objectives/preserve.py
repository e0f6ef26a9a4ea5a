"""Preservation: what the base says of an image as a whole must not drift."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .base import Batch
from .terms import Targets, Teacher, Term
from .tokens import Tokens

__all__ = ["PreservationObjective"]


class PreservationObjective(Term):
    """Image embedding (or pooled output, or CLS) and CLS tokens stay where the frozen base has them."""

    name = "preserve"

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``summary`` ``(B, E)``, and ``cls`` ``(B, C, D)`` where there is a CLS."""
        tokens = teacher.tokens
        return {"summary": tokens.summary} | ({"cls": tokens.cls} if tokens.cls.shape[1] else {})

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """``1 - cosine`` plus the error relative to the base's size, of each image ``(B,)``."""
        drift = _drift(student.summary, targets["summary"])
        if "cls" in targets:
            drift = drift + _drift(student.cls, targets["cls"]).mean(1)
        return drift


def _drift(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    student, target = student.float(), target.to(student.device, torch.float32)
    error = (student - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
    return 1.0 - F.cosine_similarity(student, target, dim=-1) + error
