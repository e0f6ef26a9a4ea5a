"""The direct route: the target of an outlier is the mean of its clean neighbours, that of any other patch itself."""

from __future__ import annotations

import torch
from torch import nn

from .base import Batch
from .outliers import AuditedTerm
from .similarity import feature_loss, neighbour_mean
from .terms import Targets, Teacher
from .tokens import Tokens

__all__ = ["SmoothObjective"]


class SmoothObjective(AuditedTerm):
    """``(1 - cosine) + MSE`` to the base's patch tokens, with every outlier replaced by its clean neighbours' mean.

    After the smoothing of defect tokens in "SINDER" (arXiv 2407.16826), with the audit's rule for outliers.

    The arguments are those of :class:`AuditedTerm`.
    """

    name = "smooth"

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``patches`` ``(B, P, D)``."""
        tokens = teacher.tokens
        outlying = self.line.threshold.mask(tokens.inside[self.line.layer])
        smooth = neighbour_mean(tokens.patches, ~outlying, tokens.grid)
        return {"patches": torch.where(outlying.unsqueeze(-1), smooth, tokens.patches)}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Mean over the patches of each image, ``(B,)``."""
        return feature_loss(student.patches, targets["patches"].to(student.patches.device)).mean(1)
