"""The images of a fit at one size, and where outliers appear there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ..artifacts.auditing import build_report
from ..artifacts.rules.rules import Rule, rule_name
from ..artifacts.rules.threshold import Threshold
from ..artifacts.statistics import collect_statistics
from ..data.batches import Batch
from ..towers.tower import Tower

__all__ = ["View"]


@dataclass
class View:
    """Images of one size.

    Attributes:
        size: Side in pixels, ``None`` for the images as they come.
        thresholds: By layer, for the layers where outliers separate, from the first one where they do and stay.
        verdict: The audit's.
        reason: Why.
    """

    size: int | None
    thresholds: dict[int, Threshold] = field(default_factory=dict)
    verdict: str = "none"
    reason: str = ""

    def threshold_behind(self, block: int) -> Threshold:
        """The threshold behind a block.

        Raises:
            ValueError: Outliers do not separate there.
        """
        if block + 1 not in self.thresholds:
            raise ValueError(
                f"outliers do not separate behind block {block}; they do behind "
                f"{[layer - 1 for layer in self.thresholds]}. Choose top_block among those, or give threshold= too"
            )
        return self.thresholds[block + 1]

    def resized(self, batch: Batch) -> Batch:
        """The batch with its images ``(B, 3, H, W)`` at this view's size."""
        if self.size is None:
            return batch
        if isinstance(batch, torch.Tensor):
            size = (self.size, self.size)
            return F.interpolate(batch.float(), size, mode="bilinear", antialias=True).to(batch.dtype)
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            raise ValueError("image_sizes needs images as pixel_values (B, 3, H, W); give batches of the sizes instead")
        return {**batch, "pixel_values": self.resized(pixels)}

    def detect(self, tower: Tower, batches: Iterable[Batch], rule: Rule, by_hand: dict[int, Threshold]) -> None:
        """Find the layers where outliers separate.

        Args:
            tower: The tower, without registers.
            batches: Images, of any size.
            rule: The audit's rule.
            by_hand: Layer to a threshold that is given and not found.
        """
        with collect_statistics(tower, attentions=False) as statistics:
            for batch in batches:
                tower.run(self.resized(batch))
        report = build_report(statistics, rule, rule_name(rule), "")
        self.verdict, self.reason, self.thresholds = report.verdict, report.reason, dict(by_hand)
        if not by_hand and report.first_layer is not None:
            self.thresholds = {
                layer.layer: layer.threshold
                for layer in report.layers
                if layer.layer >= report.first_layer and layer.threshold.separated
            }
