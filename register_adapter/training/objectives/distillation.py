"""Distillation of denoised features: the frozen base, averaged over views, teaches the model with registers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Batch
from .similarity import feature_loss
from .terms import Targets, Teacher, Term
from .tokens import Tokens
from .views import MOST_VIEWS, denoised_tokens

__all__ = ["DistillationObjective"]

_NO_PROCESSOR = [1.0, 1.0, 1.0]


def _white_of(processor: Any) -> list[float]:
    """What an image processor of transformers makes of a white pixel."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None or not getattr(processor, "do_normalize", False):
        return _NO_PROCESSOR
    return [(1.0 - float(m)) / float(s) for m, s in zip(mean, std, strict=True)]


class DistillationObjective(Term):
    """``(1 - cosine) + MSE`` between patch tokens and the base's mean over views of the same image.

    After "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501). The target of an image depends on the
    image, its number and the seed alone: it is the same in every epoch, and can be stored.

    Args:
        num_views: Number of views that the target is the mean of, the image itself included; default 10 as published.
        seed: Seed of the views.
        white: ``(3,)``, what a white pixel is to the model, for the padding of views; ``None`` takes it from the image
            processor of the training images, or 1 in every channel where they come without one.
    """

    name = "distillation"

    def __init__(self, num_views: int = 10, seed: int = 0, white: Sequence[float] | None = None) -> None:
        if not 1 <= num_views <= MOST_VIEWS:
            raise ValueError(f"num_views must be 1 to {MOST_VIEWS}, got {num_views}")
        self.num_views, self.seed = num_views, seed
        self.white = None if white is None else [float(value) for value in white]

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--num-views``."""
        parser.add_argument(
            *("--num-views", "--num_views"),
            type=int,
            default=10,
            help="Views that a target is the mean of, default 10.",
        )

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> DistillationObjective:
        """The objective of the parsed flags."""
        return cls(arguments.num_views, arguments.seed)

    def prepare(self, model: nn.Module, images: Any) -> None:
        """Look up what white is, if nobody has said so."""
        self.white = self.white or _white_of(getattr(images, "image_processor", None))

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``patches`` ``(B, P, D)``: the mean over views that show the patch."""
        pixels = teacher.batch["pixel_values"]
        if self.num_views == 1:
            return {"patches": teacher.tokens.patches}
        numbers = teacher.batch.get("index", torch.arange(len(pixels)))
        # Views of one image must not be those of another: large primes keep numbers and seeds apart.
        seeds = [(int(number) * 1_000_003 + self.seed * 7_919) % 2**31 for number in numbers]
        grid, white = teacher.tokens.grid, torch.tensor(self.white or _NO_PROCESSOR)
        tokens = denoised_tokens(lambda views: teacher.run(views).patches, pixels, seeds, grid, white, self.num_views)
        return {"patches": tokens}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Mean over the patches of each image, ``(B,)``."""
        return feature_loss(student.patches, targets["patches"].to(student.patches.device)).mean(1)

    def details(self) -> dict[str, Any]:
        """The name and the number of views."""
        return {"name": self.name, "num_views": self.num_views, "seed": self.seed, "white": self.white}
