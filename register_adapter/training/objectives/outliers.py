"""Which patch tokens of the frozen base are outliers: the audit's own rule, asked once before training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...artifacts import audit
from ...artifacts.report import ArtifactReport
from ...artifacts.rules import Threshold
from ...errors import NoArtifactsError

__all__ = ["Outliers", "audit_base"]

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
        if report.verdict == "none" or report.first_layer is None:
            raise NoArtifactsError(
                f"{report.name} has no artifacts on these images ({report.reason}), so that there is nothing to train "
                "away. Leave the model as it is, or train towards other targets (--objective distillation)."
            )
        separated = [layer for layer in report.layers[report.first_layer :] if layer.threshold.separated]
        most = max(separated, key=lambda layer: layer.outlier_share)
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
    """
    inner: Any = extract_model_from_parallel(model)
    count = min(len(images), AUDITED_IMAGES)
    device = next(inner.parameters()).device

    def batches() -> Any:
        for first in range(0, count, batch_size):
            items = [images[index]["pixel_values"] for index in range(first, min(first + batch_size, count))]
            yield torch.stack(items).to(device)

    with inner.disable_adapter():
        report = audit(inner, batches(), rule=rule, attentions=False, progress=False)
    return Outliers.of(report)
