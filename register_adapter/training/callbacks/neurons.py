"""The register neurons' shift that fades during a run."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...neurons import set_strength
from .base import Callback

__all__ = ["AnnealNeurons"]


class AnnealNeurons(Callback):
    """Lets the strength of the register neurons' shift fall from 1 to 0, in a straight line.

    Args:
        until: Part of the run after which the strength is 0, default 0.8: the rest is trained without the shift.
    """

    def __init__(self, until: float = 0.8) -> None:
        self.until = until

    def on_step_begin(self, model: nn.Module, progress: float) -> None:
        """Set the strength that goes with ``progress``."""
        set_strength(extract_model_from_parallel(model), max(0.0, 1.0 - progress / self.until))

    def details(self) -> dict[str, Any]:
        """How the shift was annealed."""
        return {"annealed_until": self.until}
