"""Where a rule draws the line between usual norms and outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold:
    """What a rule says about the norms of the patch tokens at one layer.

    Norms below ``low`` or above ``high`` are outliers.

    Attributes:
        rule: Name of the rule in :data:`register_adapter.artifacts.RULES`.
        high: Norms above it are outliers; infinity where the rule finds none on that side.
        low: Norms below it are outliers; 0 where the rule finds none on that side.
        separated: Whether the rule holds that there are two kinds of tokens at all. Rules without such a test
            (a fixed threshold, a quantile) say ``True`` wherever something lies beyond the line.
        reason: One sentence with the figures behind it.
    """

    rule: str
    high: float = float("inf")
    low: float = 0.0
    separated: bool = False
    reason: str = ""

    def in_words(self) -> str:
        """Which norms are outliers, such as ``"norms over 41.3"``."""
        sides = [f"over {self.high:.4g}"] * (self.high < float("inf")) + [f"under {self.low:.4g}"] * (self.low > 0)
        return f"norms {' or '.join(sides)}" if sides else "no norm"

    def outliers(self, norms: Any) -> Any:
        """Bool of the shape of ``norms`` (a tensor or an array): which of them are outliers."""
        return (norms > self.high) | (norms < self.low)

    def mask(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` bool: which tokens ``(B, N, D)`` are outliers by their L2 norm, taken in float32."""
        outlying: torch.Tensor = self.outliers(hidden_states.float().norm(dim=-1))
        return outlying

    def near(self, other: Threshold, factor: float) -> bool:
        """Whether both draw lines on the same sides, and those differ by less than ``factor``."""
        lines = ((self.high, other.high), (self.low, other.low))
        return all(first == second or 1 / factor < first / (second or math.inf) < factor for first, second in lines)
