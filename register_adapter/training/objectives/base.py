"""What registers are trained on: the interface between an objective and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...tuner.peft_model import RegisterPeftModel

__all__ = ["Batch", "Objective"]

#: What ``collate`` makes of items: name to tensor, the batch first.
Batch = dict[str, torch.Tensor]


class Objective(ABC):
    """An objective turns items into batches and batches into a loss; it knows neither devices nor processes.

    A new one is a subclass and an entry in :data:`register_adapter.training.OBJECTIVES`. The model that ``loss`` and
    ``evaluate`` get may be wrapped for distributed training: call it, and reach its own methods, such as
    ``disable_adapter()`` for a frozen teacher, through ``accelerate.utils.extract_model_from_parallel(model)``.
    """

    name: ClassVar[str]

    @classmethod  # noqa: B027 - most objectives need no flags
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add the objective's own flags to the command line, if it has any."""

    @classmethod
    @abstractmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> Objective:
        """Make the objective from its parsed flags and the data set's class names, in the order of their numbers."""

    @abstractmethod
    def load_base(self, name_or_path: str, **kwargs: Any) -> nn.Module:
        """Load the model that the objective needs; ``kwargs`` go to ``from_pretrained``."""

    @abstractmethod
    def wrap(self, base: nn.Module, **kwargs: Any) -> RegisterPeftModel:
        """Put registers on ``base``, and whatever is trained beside them; ``kwargs`` go to ``add_registers``."""

    @abstractmethod
    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """A batch of the data set's items, ``{"pixel_values": (3, H, W) float, "labels": int}``."""

    def begin_step(self, model: nn.Module, progress: float) -> None:  # noqa: B027 - most objectives change nothing
        """Called before every batch with the part of the run that is done, 0 to 1, for what changes on the way."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimise, and scalars to log."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """One value a sample, ``(B,)``, for each metric; the loop averages them over the whole set."""

    def details(self) -> dict[str, Any]:
        """What ``results.json`` says about the objective, ready for JSON."""
        return {"name": self.name}
