"""The training loop and the evaluation loop; neither knows what the loss is."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DistributedType, find_batch_size
from torch import nn
from tqdm.auto import tqdm

from ..data.streaming import StreamedBatches
from ..utils.parameters import trained_parameters
from . import checkpoints
from .arguments import TrainArguments
from .callbacks import Callback, LossGuard, RunningMeans
from .checkpoints import TrainState
from .interruption import Interrupted, Interruption
from .objectives import Objective
from .selection import Selection

__all__ = ["Loop", "evaluate"]

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
        means: What is logged of its batches, one of the callbacks.
        random_state: The random states of a checkpoint; set after the first batch is read, since reading draws random
            numbers too.
        eval_loader: The prepared loader of the evaluation set, for evaluations on the way.
        selection: What those say.
        checkpoint: The checkpoint that the run goes on from.
        interruption: Says whether the run is to stop.
        callbacks: What changes on the way.
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
        means: RunningMeans,
        random_state: dict[str, Any] | None = None,
        eval_loader: Any = None,
        selection: Selection | None = None,
        checkpoint: Path | None = None,
        interruption: Interruption | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.accelerator, self.args, self.objective, self.model = accelerator, args, objective, model
        self.optimizer, self.scheduler, self.loader, self.generator = optimizer, scheduler, loader, generator
        self.state, self.total_steps, self.means, self.random_state = state, total_steps, means, random_state
        self.eval_loader, self.checkpoint, self.interruption = eval_loader, checkpoint, interruption
        self.callbacks = callbacks
        self.selection = selection or Selection(args, state)
        self.seconds, self.images, self._evaluating = 0.0, 0, 0.0
        self.write_card: Callable[[Any, Path], None] | None = None  # says in a checkpoint's README what the run is
        self._saved = state.global_step if checkpoint else 0
        self._guard, self._first_batch = LossGuard(accelerator, loader.dataset), state.step

    @property
    def images_per_second(self) -> float:
        """Images of all processes per second, checkpoints included, evaluations not."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def stopped_early(self) -> bool:
        """Whether the run has ended before its last step because it no longer got better."""
        return self.state.global_step < self.total_steps and self.selection.is_exhausted

    def fit(self) -> dict[str, float]:
        """Train to the last step, or until the evaluations get no better.

        Returns:
            ``train_<name>`` of the loss and the objective's metrics, means since the last logging step, the same
            wherever the run was resumed.

        Raises:
            FloatingPointError: The loss or the gradient is not finite; nothing is learned from it, and a checkpoint of
                the last good step is written where there can be one.
            Interrupted: A signal came; a checkpoint is written where there can be one.
        """
        began, total = time.perf_counter(), self.total_steps
        shown = self.accelerator.is_local_main_process and not self.args.quiet
        with (
            self.interruption.deferred() if self.interruption else nullcontext(),
            tqdm(initial=self.state.global_step, total=total, desc="training", unit="step", disable=not shown) as bar,
        ):
            self._evaluate_if_due(bar)  # the run was stopped in the middle of it
            self.model.train()
            while not self._is_done:
                for batch in self._batches():
                    self._step(batch)
                    if not self.accelerator.sync_gradients:
                        continue
                    bar.update()
                    self.seconds = time.perf_counter() - began - self._evaluating
                    if self.state.global_step % self.args.logging_steps == 0 or self.state.global_step == total:
                        metrics = self._log()
                        bar.set_postfix_str(f"loss {metrics['train_loss']:.4f}, {self.images_per_second:.1f} images/s")
                    self._evaluate_if_due(bar)
                    if self._checkpoint_due():
                        self.save_checkpoint()
                    if self._is_done:
                        break
                    if self._asked_to_stop():
                        self.stop()
                else:  # of a stream the end is not known before
                    self.state.epoch, self.state.step = self.state.epoch + (self.state.step > 0), 0
            if self.means:
                self._log()
            self._tell("on_evaluate_begin")  # what is evaluated and saved from now on
        self.seconds = time.perf_counter() - began - self._evaluating
        return self.means.last

    @property
    def _is_streamed(self) -> bool:
        return isinstance(self.loader.dataset, StreamedBatches)

    @property
    def _is_done(self) -> bool:
        return self.state.global_step >= self.total_steps or self.selection.is_exhausted

    def _asked_to_stop(self) -> bool:
        return self.interruption is not None and self.interruption.is_due(self.accelerator)

    def stop(self) -> NoReturn:
        """End the run because of a signal, with a checkpoint of this step if there can be one.

        Raises:
            Interrupted: Always.
        """
        assert self.interruption is not None
        self._save_last()
        raise self.interruption.stop(f"at step {self.state.global_step} of {self.total_steps}", self.checkpoint)

    def _tell(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.model)

    def _save_last(self) -> None:
        """Write a checkpoint of the last step, if there can be one and is none."""
        self._tell("on_evaluate_end")
        possible = self.args.output_dir is not None and self.accelerator.distributed_type != DistributedType.DEEPSPEED
        if possible and self.state.global_step != self._saved:
            self.save_checkpoint()

    def _refuse(self, norm: Any = None) -> None:
        """End the run before a step whose loss or gradient is not finite is taken.

        Raises:
            FloatingPointError: It is not.
        """
        fault = self._guard.check(norm)
        if fault is None:
            return
        what, images = fault
        self.optimizer.zero_grad()
        self.state.step = self._first_batch  # whoever goes on from here sees these batches again
        checkpoints.set_random_state(self._before_step)
        self._save_last()
        kept = f"{self.checkpoint} holds what was learned before it" if self.checkpoint else "nothing is saved"
        raise FloatingPointError(
            f"{what} at step {self.state.global_step + 1}{f', on {images}' if images else ''}; the step was not taken, "
            f"{kept}. Look at the images, lower the learning rate, or use bf16 in place of fp16"
        )

    def _evaluate_if_due(self, bar: Any) -> None:
        """Evaluate the model of this step if its turn has come; nothing else about the run changes."""
        if self.eval_loader is None or not self.selection.is_due(self.total_steps):
            return
        began = time.perf_counter()
        self._tell("on_evaluate_begin")
        try:
            with checkpoints.same_random_state():
                means = self.evaluate()
        except Interrupted:
            self.stop()
        metrics = {f"eval_{name}": value for name, value in means.items()}
        best = self.selection.add(means)
        if best and self.args.load_best_model_at_end:
            self.selection.weights = checkpoints.copy_weights(self.accelerator, self.model)
        self._tell("on_evaluate_end")
        self.accelerator.log(metrics, step=self.state.global_step)
        self.model.train()
        if not bar.disable:
            listed = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            bar.write(f"step {self.state.global_step}: {listed}{' (best so far)' if best else ''}", file=sys.stderr)
        self._evaluating += time.perf_counter() - began

    def evaluate(self) -> dict[str, float]:
        """The objective's metrics of the model as it is now.

        Raises:
            Interrupted: A signal came; no checkpoint is written.
        """

        def check() -> None:
            if self.interruption is not None and self._asked_to_stop():
                raise self.interruption.stop()

        shown = not self.args.quiet
        return evaluate(self.accelerator, self.model, self.objective, self.eval_loader, shown, before_batch=check)

    def _batches(self) -> Any:
        """The batches of the current epoch from the current place on, in an order that seed and epoch determine."""
        self.generator.manual_seed(self.args.seed + self.state.epoch)
        _set_epoch(self.loader, self.state.epoch)
        if self._is_streamed:
            self.loader.dataset.start = self.state.step
            return self.loader
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
        if self.state.step == self._first_batch:
            self._before_step = checkpoints.random_state()
        for callback in self.callbacks:
            callback.on_step_begin(self.model, self.state.global_step / self.total_steps)
        with self.accelerator.accumulate(self.model):
            loss, metrics = self.objective.loss(self.model, batch)
            self._guard.add(batch, loss)
            steps, deepspeed = self.accelerator.sync_gradients, self._takes_steps_in_backward
            if steps and deepspeed:
                self._refuse()
            self.accelerator.backward(loss)
            if steps and not deepspeed:
                self._refuse(self._clip())
            self.optimizer.step()
            if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        self.means.add({"train_loss": loss, **{f"train_{name}": value for name, value in metrics.items()}})
        self.images += (find_batch_size(batch) or 0) * self.accelerator.num_processes
        self.state.step += 1
        if not self._is_streamed and self.state.step == len(self.loader):
            self.state.epoch, self.state.step = self.state.epoch + 1, 0
        if self.accelerator.sync_gradients:
            self.state.global_step += 1
            self._first_batch = self.state.step
            self._tell("on_step_end")

    @property
    def _takes_steps_in_backward(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def _clip(self) -> Any:
        """Clip the gradient; its norm before, ``None`` where a scaler of fp16 looks after it."""
        norm = self.accelerator.clip_grad_norm_(
            [*trained_parameters(self.model).values()], self.args.max_grad_norm or math.inf
        )
        scaler = self.accelerator.scaler
        return None if scaler is not None and scaler.is_enabled() else norm

    def _log(self) -> dict[str, float]:
        means = self.means.take()
        rate = {"learning_rate": self.scheduler.get_last_lr()[0], "images_per_second": self.images_per_second}
        self.accelerator.log({**means, **rate}, step=self.state.global_step)
        return means

    def _checkpoint_due(self) -> bool:
        every = self.args.checkpointing_steps
        if isinstance(every, int):
            return self.state.global_step % every == 0
        return every == "epoch" and self.state.step == 0

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step."""
        kept = [callback.state_dict() for callback in self.callbacks]
        self.checkpoint = checkpoints.save(
            *(self.accelerator, self.model, self.optimizer, self.scheduler, self.state, str(self.args.output_dir)),
            *(self.args.checkpoints_total_limit, self.selection.weights, kept, self.write_card),
        )
        self._saved = self.state.global_step


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    loader: Any,
    progress: bool = True,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The means of an objective's metrics over a whole set; every sample counts once, whatever the number of processes.

    Args:
        accelerator: The accelerator that prepared model and loader.
        model: The model; it is left in ``eval()`` mode.
        objective: Gives the metrics of each sample.
        loader: The prepared loader.
        progress: Show a bar.
        before_batch: Called before every batch; what it raises ends the evaluation.
    """
    model.eval()
    _set_epoch(loader, 0)  # every pass over it begins another one, with other texts
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    shown = progress and accelerator.is_local_main_process
    for batch in tqdm(loader, "evaluating", unit="batch", disable=not shown, leave=False):
        if before_batch is not None:
            before_batch()
        for name, values in accelerator.gather_for_metrics(objective.evaluate(model, batch)).items():
            sums[name] += float(values.sum())
            counts[name] += len(values)
    return {name: sums[name] / counts[name] for name in sums}


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell a prepared loader and its data set which epoch comes; accelerate tells the set with one process only."""
    for part in (loader, loader.dataset):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
