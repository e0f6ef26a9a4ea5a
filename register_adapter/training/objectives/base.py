"""What registers are trained on: the interface between an objective and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

__all__ = ["Batch", "Objective"]

#: What ``collate`` makes of items: name to tensor, the batch first.
Batch = dict[str, torch.Tensor]


class Objective(ABC):
    """A loss and its evaluation, and what it needs of an item; it knows neither devices nor processes.

    How the base is loaded is in ``training/bases.py``, what may move in ``training/moving.py``, and what changes during
    a run in ``training/callbacks``. A new objective is a subclass and an entry in
    :data:`register_adapter.training.OBJECTIVES`. The model that ``loss`` and ``evaluate`` get may be wrapped for
    distributed training: call it, and reach its own methods, such as ``disable_adapter()`` for a teacher, through
    ``accelerate.utils.extract_model_from_parallel(model)``.

    Attributes:
        name: As in ``--objective``.
        needs: Keys that an item must have beside ``pixel_values`` and ``index``: such as ``"labels"``.
        base: Kind of base model, a key of :data:`register_adapter.training.bases.BASES`.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    base: str = "backbone"

    @classmethod  # noqa: B027 - most objectives need no flags
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Add the objective's own flags to the command line, if it has any; only those of the chosen one are added."""

    @classmethod
    def from_arguments(cls, arguments: Namespace, labels: Sequence[str]) -> Objective:
        """Make the objective from its parsed flags and the data set's class names, in the order of their numbers."""
        return cls()

    @property
    def base_options(self) -> dict[str, Any]:
        """What the base's loader must know, such as the classes of a head."""
        return {}

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of modules of the base that are trained beside the registers."""
        return ()

    def check_base(self, base: nn.Module) -> None:  # noqa: B027 - most objectives take any base of their kind
        """Called with the base, before it gets adapters; raises ``ValueError`` if the objective cannot do with it."""

    def prepare(self, model: nn.Module, images: Any) -> None:  # noqa: B027 - most objectives need no preparation
        """Called once with the model, adapters on it, and the training images, before the first batch is made."""

    def check_items(self, items: list[dict[str, Any]]) -> None:
        """Refuse items that lack what is needed.

        Raises:
            ValueError: They do.
        """
        for name in ("pixel_values", *self.needs):
            if any(name not in item for item in items):
                hint = "; the data set's items need a number 'label'" if name == "labels" else ""
                raise ValueError(
                    f"the objective {self.name!r} needs items with {name!r}, found {sorted(items[0])}{hint}"
                )

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        """A batch of items: every tensor or number that all of them have, ``pixel_values`` ``(B, 3, H, W)`` for one.

        Raises:
            ValueError: Images have different sizes, or an item lacks what the objective needs.
        """
        self.check_items(items)
        batch = {}
        for name in items[0]:
            values = [item[name] for item in items if name in item]
            if len(values) < len(items) or not all(isinstance(value, torch.Tensor | int | float) for value in values):
                continue
            tensors = [torch.as_tensor(value) for value in values]
            shapes = {tuple(tensor.shape) for tensor in tensors}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name} of one batch has different shapes {sorted(shapes)}; the image processor must resize to one"
                )
            batch[name] = torch.stack(tensors)
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimise, and scalars to log."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """One value a sample, ``(B,)``, for each metric; the loop averages them over the whole set."""

    def details(self) -> dict[str, Any]:
        """What ``results.json`` says about the objective, ready for JSON."""
        return {"name": self.name}
