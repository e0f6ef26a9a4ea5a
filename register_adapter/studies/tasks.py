"""What a model is for, in one number: measured with the head it has, which stays frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation.downstream.provenance import combined_digest
from ..testbed.grown import MosaicDataset, weighted_error
from ..training.objectives.tokens import Tokens

__all__ = ["Accuracy", "MosaicError", "Task"]


class Task(ABC):
    """A figure that shows whether a model can still do what it was trained for.

    Attributes:
        name: What the figure is called.
        greater_is_better: Whether more of it is better.
        slack: How much worse than the base's it may be: a difference for what is better when greater, otherwise a part
            of the base's.
    """

    name: str
    greater_is_better: bool
    slack: float

    @property
    def source(self) -> str:
        """What the figure depends on beside the model and the images; a study that has another one is another study."""
        return self.name

    @abstractmethod
    def score(self, tokens: Tokens, numbers: Sequence[int]) -> torch.Tensor:
        """The figure of each image ``(B,)``; ``numbers`` are the images' places among all of the study."""

    def keeps(self, value: float, base: float) -> bool:
        """Whether a figure is about as good as the base's, or better."""
        return value >= base - self.slack if self.greater_is_better else value <= base * (1 + self.slack)

    def better(self, value: float, other: float) -> bool:
        """Whether a figure is better than another one, by more than the slack."""
        return not self.keeps(other, value)


class Accuracy(Task):
    """Top-1 accuracy of the model's own classification head.

    Args:
        labels: Index of each image's class in the model's logits.
    """

    name, greater_is_better, slack = "accuracy", True, 0.02

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = [int(label) for label in labels]

    @property
    def source(self) -> str:
        """The labels, too."""
        return f"{self.name}, labels {combined_digest(self.labels)[:16]}"

    def score(self, tokens: Tokens, numbers: Sequence[int]) -> torch.Tensor:
        """1 where the class is right, 0 elsewhere, ``(B,)`` float32."""
        logits: torch.Tensor = tokens.output.logits
        wanted = torch.tensor([self.labels[number] for number in numbers], device=logits.device)
        return (logits.argmax(-1) == wanted).float()


class MosaicError(Task):
    """The loss that a grown model was trained with, through the head that it grew with.

    Args:
        head: That head.
        images: The mosaics of the study.
    """

    name, greater_is_better, slack = "task loss", False, 0.25

    def __init__(self, head: nn.Module, images: MosaicDataset) -> None:
        self.head, self.images = head, images

    def score(self, tokens: Tokens, numbers: Sequence[int]) -> torch.Tensor:
        """Weighted mean of the squared errors of each image, ``(B,)``."""
        drawn = [self.images.mosaic(number) for number in numbers]
        targets, weights = (torch.cat([getattr(item, name) for item in drawn]) for name in ("targets", "weights"))
        device = tokens.patches.device
        said: Any = self.head.to(device)(tokens.patches)
        return weighted_error(said, targets.to(device), weights.to(device))
