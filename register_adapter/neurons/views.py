"""The images of a fit at one size, and where outliers appear there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from ..artifacts.rules.rules import Rule
from ..artifacts.rules.threshold import Threshold
from ..artifacts.statistics import Statistics, Sums
from ..artifacts.verdicts import judge
from ..data.batches import Batch
from ..errors import UnsupportedModelError
from ..towers.tower import Tower
from .scores import NeuronScores

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """Images of one size, and what an audit of them says.

    Attributes:
        tower: The vision tower, without registers.
        size: Side in pixels, ``None`` for the images as they come.
        statistics: What the audit sums, of all images so far.
        thresholds: By layer, for the layers where outliers separate, from the first one where they do and stay.
        verdict: The audit's.
        reason: Why.
    """

    tower: Tower
    size: int | None
    statistics: Statistics
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

    def look(self, batch: Batch, scores: NeuronScores | None = None) -> None:
        """Run the tower over a batch at this size, for the audit's statistics and for the scores, if any."""
        with ExitStack() as stack:
            stack.enter_context(self.statistics.attach())
            if scores is not None:
                stack.enter_context(scores.attach())
            try:
                self.tower.run(self.resized(batch))
            except (AssertionError, RuntimeError) as error:  # timm asserts
                if self.size is None:
                    raise
                said = str(error).partition("\n")[0]
                raise ValueError(
                    f"images of side {self.size} (image_sizes) cannot be run through {type(self.tower.module).__name__}"
                    f" in this batch size ({said})"
                ) from error

    def fresh(self) -> View:
        """The same with nothing summed yet."""
        return replace(self, statistics=Statistics(self.tower, attentions=self.statistics.attends))

    def attention(self, batches: Sequence[Batch]) -> Sums | None:
        """What an audit with attention sums over batches, on the CPU; ``None`` where attention returns no maps.

        Args:
            batches: Those so far, or the part of them that was kept.
        """
        seen = Statistics(self.tower)
        try:
            with seen.attach():
                for batch in batches:
                    self.tower.run(self.resized(batch))
        except UnsupportedModelError:  # norms alone decide
            return None
        return seen.sums(torch.device("cpu"))

    def attend(self, parts: Sequence[Sums]) -> None:
        """Look at the attention too from here on, in addition to what was seen of it in :meth:`attention`."""
        seen = Statistics(self.tower)
        for sums in parts:
            seen.add_sums(sums)
        self.statistics.attentions, self.statistics.attends = seen.attentions, True

    def judged(self, rule: Rule, by_hand: dict[int, Threshold]) -> View:
        """The same with the layers where outliers separate in all images so far: those that the audit names.

        Args:
            rule: The audit's rule.
            by_hand: Layer to a threshold that is given and not found.
        """
        judged = judge(self.statistics, rule)
        thresholds, first = dict(by_hand), judged.first_layer
        if not by_hand and first is not None:
            thresholds = {layer.layer: layer.threshold for layer in judged.layers[first:] if layer.threshold.separated}
        return replace(self, thresholds=thresholds, verdict=judged.verdict, reason=judged.reason)
