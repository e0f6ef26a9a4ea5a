"""Image classification: registers learn through the cross-entropy of a head, trained with them or frozen."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.hf_argparser import string_to_bool

from ...tuner.peft_model import RegisterPeftModel, add_registers
from ...utils.files import check_regular
from ...utils.models import require_model
from ...utils.shipped import local_folder
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
        head: Name of the head in the model, default ``"classifier"``.
    """

    name = "classification"

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
        parser.add_argument("--head", default="classifier", help="name of the model's head, default 'classifier'")

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> ClassificationObjective:
        """The objective of the parsed flags."""
        return cls(labels, arguments.freeze_head, arguments.head)

    def load_base(self, name_or_path: str, **kwargs: Any) -> nn.Module:
        """``AutoModelForImageClassification`` with a head for the data set's classes.

        Raises:
            ValueError: The model has no head of that name; or the checkpoint lacks weights of the tower or of a frozen
                head, or has them in other shapes.
        """
        require_model(name_or_path, **kwargs)
        name_or_path = local_folder(name_or_path)
        check_regular(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        own = [config.id2label[index] for index in sorted(config.id2label)]
        labels = own if self.freeze_head or self.labels is None else self.labels
        if labels != own:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        model, info = AutoModelForImageClassification.from_pretrained(
            name_or_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        if not self.freeze_head:
            self._check_head(model)
        # A new head may be missing from the checkpoint or have another shape there; nothing else may.
        allowed = () if self.freeze_head else (f"{self.head}.",)
        lost = {key for key in info["missing_keys"] if not key.startswith(allowed)}
        # transformers 4 gives the keys alone, 5 their shapes too.
        misshapen = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        lost |= {key for key in misshapen if not key.startswith(allowed)}
        if lost:
            advice = "A frozen head must be in the checkpoint: leave --freeze-head out, or " if self.freeze_head else ""
            raise ValueError(
                f"{name_or_path} has no fitting weights for {sorted(lost)[:6]} of {type(model).__name__}; training "
                f"would build on random values. {advice or 'Please '}choose another checkpoint."
            )
        return model  # type: ignore[no-any-return]

    def wrap(self, base: nn.Module, **kwargs: Any) -> RegisterPeftModel:
        """Add registers, and with ``freeze_head=False`` the head to ``modules_to_save``.

        Raises:
            ValueError: The model has no module of the head's name, or a frozen head lacks some of the classes.
        """
        if self.freeze_head:
            self._ids = self._find_labels(base)
            return add_registers(base, **kwargs)
        self._check_head(base)
        modules = [*(kwargs.pop("modules_to_save", None) or []), self.head]
        return add_registers(base, modules_to_save=list(dict.fromkeys(modules)), **kwargs)

    def _check_head(self, base: nn.Module) -> None:
        if not hasattr(base, self.head):
            children = [name for name, _ in base.named_children()]
            raise ValueError(
                f"{type(base).__name__} has no head {self.head!r}; it has {children}. Name the head (--head), or train "
                "registers only (--freeze-head)."
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
        """``pixel_values`` ``(B, 3, H, W)`` and ``labels`` ``(B,)`` int64, in the model's numbers.

        Raises:
            ValueError: Images have different sizes.
        """
        pixels = [item["pixel_values"] for item in items]
        sizes = {tuple(value.shape) for value in pixels}
        if len(sizes) > 1:
            raise ValueError(
                f"images of one batch have different shapes {sorted(sizes)}; the image processor must resize to one"
            )
        labels = [int(item["labels"]) for item in items]
        if self._ids is not None:
            labels = [self._ids[label] for label in labels]
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

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
