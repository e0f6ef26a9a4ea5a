"""Evaluations on the way: when they are due, which model was the best, and whether to stop early."""

from __future__ import annotations

import math
from typing import Any

import torch

from .arguments import TrainArguments
from .checkpoints import CheckpointError, TrainState

__all__ = ["Selection"]


class Selection:
    """What a run's evaluations say, from the list of them in its state, so that a resumed run says the same.

    Args:
        args: The knobs.
        state: Where the run is; evaluations are added to it.

    Raises:
        CheckpointError: An evaluation in the state lacks the metric.
    """

    def __init__(self, args: TrainArguments, state: TrainState) -> None:
        self.args, self.state = args, state
        self.weights: dict[str, torch.Tensor] | None = None  # the best adapter so far
        self.metric = args.metric_for_best_model.removeprefix("eval_")
        given = args.greater_is_better
        self.greater = given if given is not None else not self.metric.endswith("loss")
        lacking = next((entry for entry in state.evaluations if self.metric not in entry), None)
        if lacking is not None:
            others = ", ".join(name for name in lacking if name != "step") or "no metric"
            raise CheckpointError(
                f"the checkpoint's evaluation of step {lacking['step']} has {others}, and not {self.metric}, which "
                "metric_for_best_model asks for; name another, or go on from another checkpoint"
            )

    def is_due(self, total_steps: int) -> bool:
        """Whether the model of this step is to be evaluated, and has not been yet."""
        every, state = self.args.evaluates_every, self.state
        if every is None or state.global_step == 0 or state.global_step == self.last_step:
            return False
        turn = isinstance(every, int) and state.global_step % every == 0
        return turn or state.step == 0 or state.global_step >= total_steps

    def check(self, names: list[str]) -> None:
        """Refuse a metric that the evaluation does not have.

        Raises:
            ValueError: It is not among ``names``.
        """
        if self.args.evaluates_every is not None and self.metric not in names:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(names)}, got {self.metric!r}")

    def add(self, metrics: dict[str, float]) -> bool:
        """Note an evaluation; whether it is the best so far."""
        self.state.evaluations.append({"step": self.state.global_step, **metrics})
        return self.best is self.state.evaluations[-1]

    @property
    def last(self) -> dict[str, float] | None:
        """The last evaluation, ``None`` before the first."""
        return self.state.evaluations[-1] if self.state.evaluations else None

    @property
    def last_step(self) -> int:
        """Its step, 0 before the first."""
        return int(self.last["step"]) if self.last else 0

    @property
    def best(self) -> dict[str, float] | None:
        """The best evaluation, the earliest of equals, ``None`` before the first; what is not finite is the worst."""
        best = None
        for evaluation in self.state.evaluations:
            if best is None or self._score(evaluation) > self._score(best):
                best = evaluation
        return best

    def _score(self, evaluation: dict[str, float]) -> float:
        value = evaluation[self.metric]
        if not math.isfinite(value):
            return -math.inf
        return value if self.greater else -value

    @property
    def is_exhausted(self) -> bool:
        """Whether the last evaluations have brought no new best for as long as the run has patience."""
        patience, best = self.args.early_stopping_patience, self.best
        if patience is None or best is None:
            return False
        return sum(evaluation["step"] > best["step"] for evaluation in self.state.evaluations) >= patience

    def describe(self) -> dict[str, Any] | None:
        """What ``results.json`` says of the best evaluation."""
        best = self.best
        if best is None:
            return None
        return {"step": int(best["step"]), "metric": f"eval_{self.metric}", "value": best[self.metric]}
