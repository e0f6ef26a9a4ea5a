"""Image classification: registers learn through the cross-entropy of a head, trained with them or frozen."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.hf_argparser import string_to_bool

from ...tuner.heads import number_of_labels
from .base import Batch, Objective

__all__ = ["ClassificationObjective"]


class ClassificationObjective(Objective):
    """Cross-entropy on the data set's classes.

    With ``freeze_head=False`` the head is trained and saved with the registers (``modules_to_save``); it is the model's
    own where that has the data set's classes, in their order, and a new one otherwise. With ``freeze_head=True`` the
    model keeps its own head and only registers are trained; the data set's classes are found among the model's by name.

    Args:
        labels: Class names in the order of the data set's numbers; ``None`` if labels are the model's own numbers.
        freeze_head: Train registers only.
        head: Name of the head in the model, with dots where it lies deeper (``"timm_model.head"``), default
            ``"classifier"``.
    """

    name = "classification"
    needs = ("labels",)
    base = "classifier"

    def __init__(
        self, labels: Sequence[str] | None = None, freeze_head: bool = False, head: str = "classifier"
    ) -> None:
        self.labels = list(labels) if labels is not None else None
        self.freeze_head = freeze_head
        self.head = head
        self._ids: list[int] | None = None

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add ``--freeze-head`` and ``--head``."""
        parser.add_argument(
            *("--freeze-head", "--freeze_head"),
            **{"nargs": "?", "type": string_to_bool, "const": True, "default": False},
            help="keep the model's head, train registers only",
        )
        parser.add_argument(
            "--head", default="classifier", help="name of the model's head, as in named_modules(), default 'classifier'"
        )

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> ClassificationObjective:
        """The objective of the parsed flags."""
        return cls(labels, arguments.freeze_head, arguments.head)

    @property
    def base_options(self) -> dict[str, Any]:
        """The classes, and what is with the head."""
        return {"labels": self.labels, "head": self.head, "freeze_head": self.freeze_head}

    @property
    def heads(self) -> tuple[str, ...]:
        """The head, if it is trained."""
        return () if self.freeze_head else (self.head,)

    def check_base(self, base: nn.Module) -> None:
        """Find the head that is trained, or the data set's classes among those of a frozen one.

        Raises:
            ValueError: The model has no module of the head's name, or a frozen head lacks some of the classes.
        """
        if self.freeze_head:
            self._ids = self._find_labels(base)
        elif self.head not in dict(base.named_modules()):
            raise ValueError(
                f"{type(base).__name__} has no head {self.head!r}; it has {_heads_of(base)}. Name the head (--head), "
                "or train registers only (--freeze-head)."
            )

    def _find_labels(self, base: nn.Module) -> list[int] | None:
        """The model's number for each of the data set's classes, ``None`` if they are the same."""
        if self.labels is None:
            return None
        own: dict[str, int] = {label: int(index) for index, label in getattr(base, "config").id2label.items()}  # noqa: B009
        unknown = [label for label in self.labels if label not in own]
        if unknown:
            raise ValueError(
                f"the frozen head of {type(base).__name__} lacks {len(unknown)} of the data set's classes, such as "
                f"{unknown[:3]}; it has {len(own)}, such as {list(own)[:3]}. Name the classes as the model does, or "
                "train a new head (leave --freeze-head out)."
            )
        return [own[label] for label in self.labels]

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """As for any objective, with ``labels`` ``(B,)`` int64 in the model's numbers."""
        batch = super().collate(items)
        if self._ids is not None:
            batch["labels"] = torch.tensor([self._ids[label] for label in batch["labels"].tolist()])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy, and the accuracy on the batch."""
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        return F.cross_entropy(logits, batch["labels"]), {"accuracy": accuracy}

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """``accuracy`` (0 or 1) and ``loss`` of each sample, ``(B,)`` float32."""
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        return {
            "accuracy": (logits.argmax(-1) == batch["labels"]).float(),
            "loss": F.cross_entropy(logits, batch["labels"], reduction="none"),
        }

    def details(self) -> dict[str, Any]:
        """The objective's name, its classes, and whether the head was frozen."""
        return {"name": self.name, "freeze_head": self.freeze_head, "labels": self.labels}


def _heads_of(base: nn.Module) -> list[str]:
    """Names of the layers with as many outputs as there are classes, of the model's parts if there are none."""
    classes = number_of_labels(base)
    heads = [name for name, module in base.named_modules() if getattr(module, "out_features", None) == classes]
    return heads or [name for name, _ in base.named_children()]
