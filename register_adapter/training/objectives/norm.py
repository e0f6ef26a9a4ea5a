"""The other direct route: patch tokens of outlying norm are penalised, whatever they should be instead."""

from __future__ import annotations

import torch
from torch import nn

from .base import Batch
from .outliers import AuditedTerm
from .terms import Targets, Teacher
from .tokens import Tokens

__all__ = ["NormObjective"]


class NormObjective(AuditedTerm):
    """How far patch norms lie beyond the audit's line, relative to it, squared.

    Alone it says nothing about content; go on with ``--preserve``.
    """

    name = "norm"

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``median`` ``(B, 1)``: the base's median patch norm, for the measure's scale."""
        norms = teacher.tokens.inside[self.line.layer].float().norm(dim=-1)
        return {"median": norms.median(1, keepdim=True).values}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Mean over the patches of each image, ``(B,)``."""
        norms = student.inside[self.line.layer].float().norm(dim=-1)
        median = targets["median"].to(norms.device)
        line = self.line.threshold
        beyond = (norms - line.high).clamp_min(0) + (line.low - norms).clamp_min(0)
        error: torch.Tensor = (beyond / median).square().mean(1)
        return error
