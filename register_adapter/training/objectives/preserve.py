"""Preservation: what the base says of an image as a whole must not drift."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F

from ...data.texts import TextTokenizer, read_prompts
from .base import Batch
from .similarity import base_of, text_logits, unit
from .terms import Targets, Teacher, Term
from .tokens import Tokens, read_base

__all__ = ["PreservationObjective"]

#: Texts in one pass of the text tower.
_TEXTS = 64


class PreservationObjective(Term):
    """Image embedding (or pooled output, or CLS) and CLS tokens stay where the frozen base has them.

    With prompts it is the base's zero-shot distribution that stays: the softmax over classes of the cosines between an
    image's embedding and the prompts', times the model's own scale.

    Args:
        prompts: Texts of each class, of which the mean embedding counts, at least two classes; for models that embed
            images and texts, such as CLIP and SigLIP. Default: none.
        tokenizer: By default that of the base, from where the base was loaded.
    """

    name = "preserve"

    def __init__(self, prompts: Sequence[Sequence[str]] | None = None, tokenizer: TextTokenizer | None = None) -> None:
        if prompts is not None and len(prompts) < 2:
            raise ValueError(f"prompts must be of at least two classes, found {len(prompts)}")
        self.prompts = (
            None if prompts is None else [[texts] if isinstance(texts, str) else [*texts] for texts in prompts]
        )
        self.tokenizer = tokenizer
        self.base = "image_text" if prompts is not None else Term.base
        self._classes: torch.Tensor | None = None

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--preserve-prompts``."""
        parser.add_argument(
            *("--preserve-prompts", "--preserve_prompts"),
            metavar="FILE",
            help="Preserve the base's zero-shot distribution over these prompts: a text file with one a line, or JSON, "
            "a list or a mapping from classes to prompts.",
        )

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> PreservationObjective:
        """The objective of the parsed flags.

        Raises:
            ValueError: The file of prompts is none.
            OSError: It cannot be read.
        """
        path = arguments.preserve_prompts
        return cls(None if path is None else read_prompts(path))

    def prepare(self, model: nn.Module, images: Any) -> None:
        """Embed the prompts with the base's own text tower, once.

        Raises:
            ValueError: The base has no tokenizer.
        """
        if self.prompts is None or self._classes is not None:
            return
        tokenizer = self.tokenizer or TextTokenizer.of(base_of(model))
        inner: nn.Module = extract_model_from_parallel(model)
        device = next(inner.parameters()).device
        pixels = images[0]["pixel_values"][None].to(device)  # an image must be there, too
        texts = [text for group in self.prompts for text in group]
        embeds = []
        for start in range(0, len(texts), _TEXTS):
            tokens = tokenizer(texts[start : start + _TEXTS])
            batch = {"pixel_values": pixels, **{name: value.to(device) for name, value in tokens.items()}}
            embeds.append(unit(read_base(model, batch).output.text_embeds))
        groups = torch.split(torch.cat(embeds), [len(group) for group in self.prompts])
        self._classes = unit(torch.stack([group.mean(0) for group in groups]))

    def targets(self, teacher: Teacher) -> dict[str, torch.Tensor]:
        """``summary`` ``(B, E)``, and ``cls`` ``(B, C, D)`` where there is a CLS and no prompts."""
        tokens = teacher.tokens
        with_cls = self.prompts is None and tokens.cls.shape[1]
        return {"summary": tokens.summary} | ({"cls": tokens.cls} if with_cls else {})

    def measure(self, model: nn.Module, student: Tokens, targets: Targets, batch: Batch) -> torch.Tensor:
        """Of each image ``(B,)``: ``1 - cosine`` plus the error relative to the base's size.

        With prompts the Kullback-Leibler divergence of the model's distribution from the base's, in nats.
        """
        if self.prompts is not None:
            said, meant = (self._distribution(model, embeds) for embeds in (student.summary, targets["summary"]))
            return F.kl_div(said, meant, reduction="none", log_target=True).sum(1)
        drift = _drift(student.summary, targets["summary"])
        if "cls" in targets:
            drift = drift + _drift(student.cls, targets["cls"]).mean(1)
        return drift

    def metrics(self, student: Tokens, targets: Targets, batch: Batch) -> dict[str, torch.Tensor]:
        """With prompts ``zero_shot_agreement``: 1 where the likeliest class is the base's, 0 elsewhere, ``(B,)``."""
        if self.prompts is None:
            return {}
        nearest, before = (self._cosines(embeds).argmax(1) for embeds in (student.summary, targets["summary"]))
        return {"zero_shot_agreement": (nearest == before.to(nearest.device)).float()}

    def _cosines(self, embeds: torch.Tensor) -> torch.Tensor:
        return unit(embeds) @ self._embedded.to(embeds.device).T

    def _distribution(self, model: nn.Module, embeds: torch.Tensor) -> torch.Tensor:
        """Logarithms of the probabilities of classes, ``(B, K)``."""
        device = next(model.parameters()).device
        return text_logits(base_of(model), unit(embeds.to(device)), self._embedded.to(device)).log_softmax(1)

    @property
    def _embedded(self) -> torch.Tensor:
        """Embeddings of the classes, ``(K, E)``."""
        if self._classes is None:
            raise RuntimeError(f"{type(self).__name__} has not embedded its prompts: call prepare() first")
        return self._classes

    def details(self) -> dict[str, Any]:
        """The name, and of prompts how many classes there are and a checksum."""
        if self.prompts is None:
            return {"name": self.name}
        digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {"name": self.name, "classes": len(self.prompts), "prompts": digest[:16]}


def _drift(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    student, target = student.float(), target.to(student.device, torch.float32)
    error = (student - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
    return 1.0 - F.cosine_similarity(student, target, dim=-1) + error
