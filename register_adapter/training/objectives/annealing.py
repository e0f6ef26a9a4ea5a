"""Any objective, with the register neurons' shift annealed away while the registers learn to do without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...neurons import set_strength
from ...tuner.peft_model import RegisterPeftModel
from .base import Batch, Objective

__all__ = ["AnnealedNeurons"]


class AnnealedNeurons(Objective):
    """Lets the strength of the shift fall from 1 to 0, in a straight line that ends at ``until`` of the run.

    Args:
        inner: What is trained on.
        until: Part of the run after which the strength is 0, default 0.8: the rest is trained without the shift.
    """

    name = "annealed"

    def __init__(self, inner: Objective, until: float = 0.8) -> None:
        self.inner, self.until = inner, until

    @classmethod
    def from_arguments(cls, arguments: Any, labels: Sequence[str]) -> Objective:
        """Not made from flags: it goes around an objective that is."""
        raise NotImplementedError("AnnealedNeurons goes around another objective")

    def load_base(self, name_or_path: str, **kwargs: Any) -> nn.Module:
        """As the inner objective."""
        return self.inner.load_base(name_or_path, **kwargs)

    def wrap(self, base: nn.Module, **kwargs: Any) -> RegisterPeftModel:
        """As the inner objective."""
        return self.inner.wrap(base, **kwargs)

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """As the inner objective."""
        return self.inner.collate(items)

    def begin_step(self, model: nn.Module, progress: float) -> None:
        """Set the strength that goes with ``progress``; it depends on nothing else, so that a run can be resumed."""
        self.inner.begin_step(model, progress)
        set_strength(extract_model_from_parallel(model), max(0.0, 1.0 - progress / self.until))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As the inner objective."""
        return self.inner.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """As the inner objective."""
        return self.inner.evaluate(model, batch)

    def details(self) -> dict[str, Any]:
        """What the inner one says, and how the shift was annealed."""
        return {**self.inner.details(), "annealed_until": self.until}
