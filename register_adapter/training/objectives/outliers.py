"""Which patch tokens of the frozen base are outliers: the audit's own rule, asked once before training."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...artifacts.auditing import audit_outliers
from ...artifacts.report import ArtifactReport
from ...artifacts.rules import Threshold
from ...data.datasets import PixelBatches
from ...errors import NoArtifactsError
from .terms import Term
from .tokens import with_switch

__all__ = ["AuditedTerm", "Outliers", "audit_base"]

#: Images that the audit before training looks at, the first ones.
AUDITED_IMAGES = 256


@dataclass(frozen=True)
class Outliers:
    """The line that the audit draws at one layer.

    Attributes:
        layer: Index into ``hidden_states``.
        threshold: What its rule says about the patch norms there.
    """

    layer: int
    threshold: Threshold

    @classmethod
    def of(cls, report: ArtifactReport) -> Outliers:
        """The line at the layer with most outliers, among those from the first one with outliers on.

        Raises:
            NoArtifactsError: The report says that there are none.
        """
        most = report.most_outlying
        if most is None:
            raise NoArtifactsError(
                f"{report.name} has no outliers on these images ({report.reason}), so that there is nothing to train "
                "away. Leave the model as it is, or train towards other targets (--objective distillation)."
            )
        return cls(most.layer, most.threshold)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; a side without a line is ``None``."""
        line = self.threshold
        high = line.high if math.isfinite(line.high) else None
        return {"layer": self.layer, "rule": line.rule, "low": line.low or None, "high": high}


def audit_base(model: nn.Module, images: Any, rule: str = "auto", batch_size: int = 16) -> Outliers:
    """Audit the frozen base on training images.

    Args:
        model: With adapters, which are off meanwhile.
        images: Items with ``pixel_values`` ``(3, H, W)``.
        rule: As in :func:`~register_adapter.artifacts.audit`.
        batch_size: Images in a pass.

    Raises:
        NoArtifactsError: There are none.
        TypeError: The adapters have no switch.
    """
    inner = with_switch(model)
    batches = PixelBatches(images, batch_size, AUDITED_IMAGES)
    with inner.disable_adapter():
        report = audit_outliers(inner, batches, rule)
    return Outliers.of(report)


class AuditedTerm(Term):
    """A term for which patch tokens of the base are outliers or others, by the audit's own rule.

    Args:
        outliers: The line between the two; ``None`` has the base audited on the training images first.
        rule: The rule of that audit.
    """

    def __init__(self, outliers: Outliers | None = None, rule: str = "auto") -> None:
        self.outliers, self.rule = outliers, rule

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--rule``."""
        parser.add_argument("--rule", default="auto", help="The audit's rule for outliers, default auto.")

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> AuditedTerm:
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

    def details(self) -> dict[str, Any]:
        """The name, and the line between outliers and others."""
        line = self.outliers.to_dict() if self.outliers is not None else None
        return {"name": self.name, "rule": self.rule, "outliers": line}
