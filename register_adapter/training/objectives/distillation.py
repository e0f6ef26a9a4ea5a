"""Distillation of denoised features: the frozen base, averaged over views, teaches the model with registers."""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...data.processors import normalisation_of
from ...tuner.composed import load_onto
from ...utils.parameters import part_of
from .base import Batch
from .similarity import feature_loss
from .terms import Targets, Teacher, Term
from .tokens import Tokens, copy_of_base, read_tokens
from .views import MOST_VIEWS, denoised_tokens

__all__ = ["DistillationObjective"]

_NO_PROCESSOR = [1.0, 1.0, 1.0]


def _white_of(processor: Any) -> list[float]:
    """What an image processor makes of a white pixel."""
    known = normalisation_of(processor)
    return _NO_PROCESSOR if known is None else [(1.0 - mean) / std for mean, std in zip(*known, strict=True)]


class DistillationObjective(Term):
    """``(1 - cosine) + MSE`` between patch tokens and the base's mean over views of the same image.

    After "Vision Transformers with Self-Distilled Registers" (arXiv 2505.21501). The target of an image depends on the
    image, its number and the seed alone: it is the same in every epoch, and can be stored.

    Args:
        num_views: Number of views that the target is the mean of, the image itself included; default 10 as published.
        seed: Seed of the views.
        teacher: Folder, or repository, of an adapter for the base whose tokens are the targets in place of the bare
            base's: such as registers that were fitted at test time. Where the base's own tokens have artifacts, their
            mean over views has them too. Of such a teacher CLS is a target, too.
        white: ``(3,)``, what a white pixel is to the model, for the padding of views; ``None`` takes it from the image
            processor of the training images, or 1 in every channel where they come without one.
    """

    name = "distillation"

    def __init__(
        self, num_views: int = 10, seed: int = 0, white: Sequence[float] | None = None, teacher: str | None = None
    ) -> None:
        if not 1 <= num_views <= MOST_VIEWS:
            raise ValueError(f"num_views must be 1 to {MOST_VIEWS}, got {num_views}")
        self.num_views, self.seed, self.teacher = num_views, seed, teacher
        self._adapted: nn.Module | None = None
        self.white = None if white is None else [float(value) for value in white]

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--num-views`` and ``--teacher``."""
        parser.add_argument(
            *("--num-views", "--num_views"),
            type=int,
            default=10,
            help="Views that a target is the mean of, default 10.",
        )
        parser.add_argument(
            "--teacher", help="Adapter whose tokens are the targets, such as a fitted one; default: the bare base's."
        )

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> DistillationObjective:
        """The objective of the parsed flags."""
        return cls(arguments.num_views, arguments.seed, teacher=arguments.teacher)

    def prepare(self, model: nn.Module, images: Any) -> None:
        """Look up what white is, if nobody has said so, and load the teacher's adapter onto a copy of the base.

        Raises:
            AdapterFileError, BaseModelMismatchError, HubAccessError: The adapter cannot be read, or is another base's.
        """
        self.white = self.white or _white_of(getattr(images, "image_processor", None))
        if self.teacher is not None:
            self._adapted = load_onto(copy_of_base(model), self.teacher).eval().requires_grad_(False)

    def _tokens(self, teacher: Teacher, pixels: torch.Tensor | None = None) -> Tokens:
        """The teacher's tokens of the batch, or of other images ``(B, 3, H, W)``."""
        if self._adapted is None:
            return teacher.tokens if pixels is None else teacher.run(pixels)
        given = teacher.batch["pixel_values"] if pixels is None else pixels
        return read_tokens(self._adapted.to(given.device), {"pixel_values": given})

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``patches`` ``(B, P, D)``, means over views that show the patch; of a teacher ``cls`` ``(B, C, D)`` too."""
        pixels, given = teacher.batch["pixel_values"], self._tokens(teacher)
        # A bare base's CLS has the artifacts' harm in it; that of a teacher with an adapter is what is wanted.
        targets = {"cls": given.cls} if self._adapted is not None and given.cls.shape[1] else {}
        if self.num_views == 1:
            return {**targets, "patches": given.patches}
        numbers = teacher.batch.get("index", torch.arange(len(pixels)))
        # Views of one image must not be those of another: large primes keep numbers and seeds apart.
        seeds = [(int(number) * 1_000_003 + self.seed * 7_919) % 2**31 for number in numbers]
        grid, white = given.grid, torch.tensor(self.white or _NO_PROCESSOR)
        with teacher.alone():
            tokens = denoised_tokens(
                lambda views: self._tokens(teacher, views).patches,
                *(pixels, seeds, grid, white, self.num_views),
                plain=given.patches,
            )
        return {**targets, "patches": tokens}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Mean over the patches of each image, and that over CLS, ``(B,)``."""
        loss = feature_loss(student.patches, targets["patches"].to(student.patches.device)).mean(1)
        return loss + feature_loss(student.cls, targets["cls"].to(loss.device)).mean(1) if "cls" in targets else loss

    def details(self) -> dict[str, Any]:
        """The name, the views, and the teacher by what its weights are."""
        details = {"name": self.name, "num_views": self.num_views, "seed": self.seed, "white": self.white}
        return {**details, "teacher": _digest(self._adapted)} if self._adapted is not None else details


def _digest(adapted: nn.Module) -> str:
    """Of a model's adapters: the base is known elsewhere, and a folder may hold other values tomorrow."""
    digest = hashlib.sha256()
    for name, value in sorted(adapted.state_dict().items()):
        if part_of(name) != "other":
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
