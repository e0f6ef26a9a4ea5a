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
        model: With registers, from :func:`wrap` or ``add_registers``; its forward takes ``pixel_values``, as in
            transformers (``TimmWrapperModel`` for timm's). ``None`` where ``model_init`` makes one.
        args: ``TrainingArguments``; ``remove_unused_columns`` and ``label_names`` are set to what an objective needs.
        objective: What to train on.
        train_dataset: Items with ``pixel_values`` and what the objective needs, such as a
            :class:`register_adapter.data.ProcessedDataset`.
        eval_dataset: The same; ``eval_loss`` and the objective's metrics are means over it.
        **options: For ``Trainer``. The objective is made ready for every model that ``model_init`` makes.

    Attributes:
        trained_on: The objective. ``Trainer.objective`` is a number of its search for hyperparameters.

    Raises:
        ValueError: The objective cannot do with the base, or with the images.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        args.remove_unused_columns, args.label_names = False, []  # targets and numbers of items are no model's inputs
        self.trained_on, self._names, self._sums = objective, list[str](), list[Any]()
        self._images = train_dataset if train_dataset is not None else eval_dataset
        if model is not None:
            objective.prepare(model, self._images)
        options = {"data_collator": objective.collate, "compute_metrics": self._means, **options}
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.model_accepts_loss_kwargs = False  # the objective's loss is a mean over its batch

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model of ``model_init``, as ``Trainer`` makes it, with the objective ready for it."""
        model: nn.Module = super().call_model_init(trial)
        self.trained_on.prepare(model, self._images)
        return model

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The objective's loss of a batch."""
        loss, _values = self.trained_on.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The mean loss of a batch, and in the place of predictions the objective's metrics ``(B, M)``."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values = self.trained_on.evaluate(model, inputs)
        self._names = sorted(values)
        rows = torch.stack([values[name].float() for name in self._names], 1)
        return values["loss"].float().mean(), rows, torch.zeros(len(rows), device=rows.device)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As ``Trainer`` does it; nothing is left of a loop that was interrupted."""
        self._sums.clear()
        return super().evaluation_loop(*args, **options)

    def _means(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Means over all images of a loop; given batch by batch, with ``compute_result`` true for the last."""
        rows = prediction.predictions
        if compute_result is None:
            self._sums.clear()
        for batch in rows if isinstance(rows, list) else [rows]:  # a list with eval_do_concat_batches=False
            self._sums.append((batch.sum(0), len(batch)))
        if compute_result is False:
            return {}
        total, count = (sum(values) for values in zip(*self._sums, strict=True))
        means = dict(zip(self._names, (total / count).tolist(), strict=True))
        return {name: value for name, value in means.items() if name != "loss"}
