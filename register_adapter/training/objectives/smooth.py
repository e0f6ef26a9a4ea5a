"""The direct route: the target of an outlier is the mean of its clean neighbours, that of any other patch itself."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Batch
from .outliers import Outliers, audit_base
from .similarity import feature_loss, neighbour_mean
from .terms import Targets, Teacher, Term
from .tokens import Tokens

__all__ = ["SmoothObjective"]


class SmoothObjective(Term):
    """``(1 - cosine) + MSE`` to the base's patch tokens, with every outlier replaced by its clean neighbours' mean.

    After the smoothing of defect tokens in "SINDER" (arXiv 2407.16826), with the audit's rule for outliers.

    Args:
        outliers: The line between outliers and others; ``None`` has the base audited on the training images first.
        rule: The rule of that audit.
    """

    name = "smooth"

    def __init__(self, outliers: Outliers | None = None, rule: str = "auto") -> None:
        self.outliers, self.rule = outliers, rule

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--rule``."""
        parser.add_argument("--rule", default="auto", help="The audit's rule for outliers, default auto.")

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> SmoothObjective:
        """The objective of the parsed flags."""
        return cls(rule=arguments.rule)

    def prepare(self, model: nn.Module, images: Any) -> None:
        """Audit the base, if nobody has said what an outlier is.

        Raises:
            NoArtifactsError: The base has none.
        """
        self.outliers = self.outliers or audit_base(model, images, self.rule)

    @property
    def line(self) -> Outliers:
        """The line between outliers and others.

        Raises:
            RuntimeError: ``prepare`` was not called, and no line was given.
        """
        if self.outliers is None:
            raise RuntimeError(f"{type(self).__name__} does not know what an outlier is: call prepare() first")
        return self.outliers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of that line."""
        return (self.line.layer,)

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``patches`` ``(B, P, D)``."""
        tokens = teacher.tokens
        outlying = self.line.threshold.mask(tokens.inside[self.line.layer])
        smooth = neighbour_mean(tokens.patches, ~outlying, tokens.grid)
        return {"patches": torch.where(outlying.unsqueeze(-1), smooth, tokens.patches)}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Mean over the patches of each image, ``(B,)``."""
        return feature_loss(student.patches, targets["patches"].to(student.patches.device)).mean(1)

    def details(self) -> dict[str, Any]:
        """The name, and the line between outliers and others."""
        line = self.outliers.to_dict() if self.outliers is not None else None
        return {"name": self.name, "rule": self.rule, "outliers": line}
