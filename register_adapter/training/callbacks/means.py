"""The means of loss and metrics that a run logs, the same wherever it was resumed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ...utils.arguments import check_number
from .base import Callback

__all__ = ["RunningMeans"]


class RunningMeans(Callback):
    """Means over the batches since they were last taken; those of an optimiser step count once it is done.

    Args:
        accelerator: The run's accelerator.

    Attributes:
        last: What was last taken, empty before that.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.last = accelerator, dict[str, float]()
        self._sums: dict[str, Any] = defaultdict(float)
        self._count = 0
        self._step: list[dict[str, torch.Tensor]] = []

    def __bool__(self) -> bool:
        """Whether there is something to take."""
        return self._count > 0

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Note what a batch gave, scalars by name."""
        self._step.append({name: value.detach().float() for name, value in values.items()})

    def on_step_end(self, model: nn.Module) -> None:
        """Count the batches of this step; those of one that is not taken are seen again by whoever goes on."""
        for values in self._step:
            for name, value in values.items():
                self._sums[name] += value
        self._count += len(self._step)
        self._step = []

    def take(self) -> dict[str, float]:
        """The means over all processes, by name, and begin anew; every process calls it."""
        means = {name: value / self._count for name, value in self._sums.items()}
        self.last = {name: float(self.accelerator.reduce(mean, "mean")) for name, mean in means.items()}
        self._sums.clear()
        self._count = 0
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process, and what was last taken."""
        own = {"count": self._count, "sums": {name: value.cpu() for name, value in self._sums.items()}}
        return {"processes": gather_object([own]), "last": self.last}

    def load_state_dict(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; older releases gave nothing.

        Raises:
            TypeError: A mean is no number.
            ValueError: A sum is no finite scalar.
        """
        if "processes" not in state:
            return
        own, device = state["processes"][self.accelerator.process_index], self.accelerator.device
        for name, value in own["sums"].items():
            if value.shape or value.is_complex() or not value.isfinite():
                raise ValueError(f"the sum of {name} is {value}, and no finite number")
        for name, value in state["last"].items():
            check_number(f"the mean of {name}", value)
        self._count, self.last = int(own["count"]), dict(state["last"])
        self._sums.update({name: value.to(device) for name, value in own["sums"].items()})
