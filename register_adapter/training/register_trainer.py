"""transformers' own ``Trainer`` with an objective of this package as its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from .objectives import Objective

__all__ = ["RegisterTrainer"]


class RegisterTrainer(Trainer):
    """A ``Trainer`` whose loss and metrics are an objective's; all else is transformers'.

    For classification of images transformers' ``Trainer`` itself does.

    Args:
        model: With registers, from :func:`wrap` or ``add_registers``.
        args: ``TrainingArguments``; ``remove_unused_columns`` and ``label_names`` are set to what an objective needs.
        objective: What to train on.
        train_dataset: Items with ``pixel_values`` and what the objective needs, such as a
            :class:`register_adapter.data.ProcessedDataset`.
        eval_dataset: The same; ``eval_loss`` and the objective's metrics are means over it.
        **options: For ``Trainer``.

    Raises:
        ValueError: The objective cannot do with the base, or with the images.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        args.remove_unused_columns, args.label_names = False, []  # targets and numbers of items are no model's inputs
        objective.prepare(model, train_dataset if train_dataset is not None else eval_dataset)
        self.objective, self._names = objective, list[str]()
        options = {"data_collator": objective.collate, "compute_metrics": self._means, **options}
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.model_accepts_loss_kwargs = False  # the objective's loss is a mean over its batch

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The objective's loss of a batch."""
        loss, _values = self.objective.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The mean loss of a batch, and in the place of predictions the objective's metrics ``(B, M)``."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values = self.objective.evaluate(model, inputs)
        self._names = sorted(values)
        rows = torch.stack([values[name].float() for name in self._names], 1)
        return values["loss"].float().mean(), rows, torch.zeros(len(rows), device=rows.device)

    def _means(self, prediction: EvalPrediction) -> dict[str, float]:
        means = dict(zip(self._names, prediction.predictions.mean(0).tolist(), strict=True))
        return {name: value for name, value in means.items() if name != "loss"}
