"""Pairs of images and texts: each image is to be nearest to its own text, by the loss of the base's own family."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F

from ...data.texts import TextTokenizer, caption_of
from .base import Batch
from .similarity import base_of, text_logits, unit
from .terms import Targets, Teacher, Term
from .tokens import Tokens

__all__ = ["ContrastiveObjective"]


class ContrastiveObjective(Term):
    """CLIP's symmetric cross-entropy (arXiv 2103.00020), or for a model with a ``logit_bias`` SigLIP's sigmoid loss.

    The others of a step are those of all processes, but not of other batches of one step; in an evaluation those of one
    process's batch, so that its value goes with ``per_device_eval_batch_size``. The text tower and the scale stay as
    they are. Items need ``text``.

    Args:
        tokenizer: By default that of the base, from where the base was loaded.
    """

    name = "contrastive"
    needs = ("text",)
    base = "image_text"

    def __init__(self, tokenizer: TextTokenizer | None = None) -> None:
        self.tokenizer = tokenizer

    def prepare(self, model: nn.Module, images: Any) -> None:
        """Look up the base's tokenizer, if none was given.

        Raises:
            ValueError: There is none.
        """
        self.tokenizer = self.tokenizer or TextTokenizer.of(base_of(model))

    def encode(self, items: list[dict[str, Any]]) -> Batch:
        """The items' texts.

        Raises:
            ValueError: An item has none.
            RuntimeError: ``prepare`` was not called, and no tokenizer was given.
        """
        if self.tokenizer is None:
            raise RuntimeError(f"{type(self).__name__} has no tokenizer: call prepare() first")
        return self.tokenizer([caption_of(item) for item in items])

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """None: texts say what is wanted."""
        return {}

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """The part of each image in the loss, ``(B,)``; its mean over all processes is the loss of the whole step."""
        base = base_of(model)
        images, texts = (unit(getattr(student.output, f"{kind}_embeds")) for kind in ("image", "text"))
        all_images, first = _gathered(images)
        all_texts, _ = _gathered(texts)
        own = torch.arange(first, first + len(images), device=images.device)
        by_image = text_logits(base, images, all_texts)
        if hasattr(base, "logit_bias"):
            signs = -torch.ones_like(by_image)
            signs[torch.arange(len(own)), own] = 1.0
            return -F.logsigmoid(signs * by_image).sum(1)
        by_text = text_logits(base, texts, all_images)
        return (F.cross_entropy(by_image, own, reduction="none") + F.cross_entropy(by_text, own, reduction="none")) / 2

    def metrics(self, student: Tokens, targets: Targets, batch: Batch) -> dict[str, torch.Tensor]:
        """``accuracy``: 1 where an image is nearest to its own text in the batch, 0 elsewhere, ``(B,)``."""
        images, texts = unit(student.output.image_embeds), unit(student.output.text_embeds)
        nearest = (images @ texts.T).argmax(1)
        return {"accuracy": (nearest == torch.arange(len(nearest), device=nearest.device)).float()}


def _gathered(embeds: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Embeddings of all processes, which have as many each, and the place of the own ones; an evaluation's alone.

    Gradients of every process's loss come back, so that their mean is that of one process with the whole batch.
    """
    state = PartialState()
    if state.num_processes == 1 or not torch.is_grad_enabled():
        return embeds, 0
    from torch.distributed.nn.functional import all_gather

    parts: Any = all_gather(embeds)  # type: ignore[no-untyped-call]
    return torch.cat(list(parts)), state.process_index * len(embeds)
