"""The training loop and the evaluation loop; neither knows what the loss is."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import find_batch_size
from torch import nn
from tqdm.auto import tqdm

from . import checkpoints
from .arguments import TrainArguments
from .checkpoints import TrainState
from .objectives import Objective

__all__ = ["Loop", "evaluate", "number_of_steps"]

logger = logging.getLogger(__name__)


class Loop:
    """One run over the data, from wherever its state is.

    Args:
        accelerator: The run's accelerator.
        args: The knobs.
        objective: What to train on.
        model: The prepared model.
        optimizer: The prepared optimiser.
        scheduler: The schedule of its learning rate, in optimiser steps.
        loader: The prepared loader of the training set.
        generator: The loader's generator; it is set anew for each epoch.
        state: Where the run is; moved on in place.
        total_steps: Optimiser steps of the whole run.
        random_state: The random states of a checkpoint; set after the first batch is read, since reading draws random
            numbers too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainArguments,
        objective: Objective,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        loader: Any,
        generator: torch.Generator,
        state: TrainState,
        total_steps: int,
        random_state: dict[str, Any] | None = None,
    ) -> None:
        self.accelerator, self.args, self.objective, self.model = accelerator, args, objective, model
        self.optimizer, self.scheduler, self.loader, self.generator = optimizer, scheduler, loader, generator
        self.state, self.total_steps, self.random_state = state, total_steps, random_state
        self.seconds, self.images = 0.0, 0
        self._sums: dict[str, Any] = defaultdict(float)
        self._count = 0

    @property
    def images_per_second(self) -> float:
        """Images of all processes per second, checkpoints included."""
        return self.images / self.seconds if self.seconds else 0.0

    def fit(self) -> dict[str, float]:
        """Train to the last step.

        Returns:
            ``train_<name>`` of the loss and the objective's metrics, means since the last logging step; empty if there
            was nothing left to do.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        metrics: dict[str, float] = {}
        began, total = time.perf_counter(), self.total_steps
        shown = self.accelerator.is_local_main_process and not self.args.quiet
        self.model.train()
        with tqdm(initial=self.state.global_step, total=total, desc="training", unit="step", disable=not shown) as bar:
            while self.state.global_step < total:
                for batch in self._batches():
                    self._step(batch)
                    if not self.accelerator.sync_gradients:
                        continue
                    bar.update()
                    self.seconds = time.perf_counter() - began
                    if self.state.global_step % self.args.logging_steps == 0 or self.state.global_step == total:
                        metrics = self._log()
                        bar.set_postfix_str(f"loss {metrics['train_loss']:.4f}, {self.images_per_second:.1f} images/s")
                    if self._checkpoint_due():
                        self._checkpoint()
                    if self.state.global_step == total:
                        break
        self.seconds = time.perf_counter() - began
        return metrics

    def _batches(self) -> Any:
        """The batches of the current epoch from the current place on, in an order that seed and epoch determine."""
        self.generator.manual_seed(self.args.seed + self.state.epoch)
        self.loader.set_epoch(self.state.epoch)
        if not self.state.step:
            return self.loader
        rest = skip_first_batches(self.loader, self.state.step)
        rest.set_epoch(self.state.epoch)  # accelerate 1.10 begins with epoch 0 again
        return rest

    def _step(self, batch: Any) -> None:
        """One batch, and an optimiser step if enough have come together."""
        if self.random_state is not None:
            checkpoints.set_random_state(self.random_state)
            self.random_state = None
        self.objective.begin_step(self.model, self.state.global_step / self.total_steps)
        with self.accelerator.accumulate(self.model):
            loss, metrics = self.objective.loss(self.model, batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.args.max_grad_norm:
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
            self.optimizer.step()
            if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        for name, value in {"loss": loss, **metrics}.items():
            self._sums[name] += value.detach().float()
        self._count += 1
        self.images += (find_batch_size(batch) or 0) * self.accelerator.num_processes
        self.state.step += 1
        if self.state.step == len(self.loader):
            self.state.epoch, self.state.step = self.state.epoch + 1, 0
        self.state.global_step += int(self.accelerator.sync_gradients)

    def _log(self) -> dict[str, float]:
        means = {name: value / self._count for name, value in self._sums.items()}
        reduced = {f"train_{name}": float(self.accelerator.reduce(mean, "mean")) for name, mean in means.items()}
        self._sums.clear()
        self._count = 0
        if not math.isfinite(reduced["train_loss"]):
            raise FloatingPointError(
                f"the loss is {reduced['train_loss']} at step {self.state.global_step}; lower the learning rate, or "
                "use bf16 in place of fp16"
            )
        rate = {"learning_rate": self.scheduler.get_last_lr()[0], "images_per_second": self.images_per_second}
        self.accelerator.log({**reduced, **rate}, step=self.state.global_step)
        return reduced

    def _checkpoint_due(self) -> bool:
        every = self.args.checkpointing_steps
        if isinstance(every, int):
            return self.state.global_step % every == 0
        return every == "epoch" and self.state.step == 0

    def _checkpoint(self) -> None:
        checkpoints.save(
            self.accelerator,
            self.model,
            self.optimizer,
            self.scheduler,
            self.state,
            str(self.args.output_dir),
            self.args.checkpoints_total_limit,
        )


def number_of_steps(args: TrainArguments, batches: int, accumulation: int) -> int:
    """Optimiser steps of a run whose epochs have ``batches`` batches per process, ``accumulation`` of them per step."""
    return args.max_train_steps or args.num_train_epochs * math.ceil(batches / accumulation)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, objective: Objective, loader: Any, progress: bool = True
) -> dict[str, float]:
    """The means of an objective's metrics over a whole set; every sample counts once, whatever the number of processes.

    Args:
        accelerator: The accelerator that prepared model and loader.
        model: The model; it is left in ``eval()`` mode.
        objective: Gives the metrics of each sample.
        loader: The prepared loader.
        progress: Show a bar.
    """
    model.eval()
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    shown = progress and accelerator.is_local_main_process
    for batch in tqdm(loader, "evaluating", unit="batch", disable=not shown):
        for name, values in accelerator.gather_for_metrics(objective.evaluate(model, batch)).items():
            sums[name] += float(values.sum())
            counts[name] += len(values)
    return {name: sums[name] / counts[name] for name in sums}
