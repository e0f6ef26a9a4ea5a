"""An average of what is trained, over the steps of a run: what is evaluated and saved in place of the last step."""

from __future__ import annotations

from collections.abc import ItemsView
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ...utils.parameters import trained_parameters
from .base import Callback

__all__ = ["AverageWeights"]

#: The first steps are forgotten faster: the decay of step n is at most ``(1 + n) / (_WARM_UP + n)``.
_WARM_UP = 10


class AverageWeights(Callback):
    """An exponential moving average (EMA) of the parameters that are trained.

    After every optimiser step it is ``decay * average + (1 - decay) * weights``, where the decay of step n is at most
    ``(1 + n) / (10 + n)``, so that a short run is not an average of its initial values.

    Args:
        decay: At least 0 and below 1, such as 0.999.

    Raises:
        ValueError: It is not.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}")
        self.decay, self.steps = float(decay), 0
        self._average: dict[str, torch.Tensor] = {}
        #: The weights themselves while the model has the average in their place.
        self._weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, model: nn.Module, progress: float) -> None:
        """Begin with the initial values."""
        if not self._average:
            self._average = {name: _copy(parameter) for name, parameter in _trained(model)}

    @torch.no_grad()
    def on_step_end(self, model: nn.Module) -> None:
        """Move the average towards the weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (_WARM_UP + self.steps))
        for name, parameter in _trained(model):
            average = self._average[name]
            average.lerp_(parameter.detach().to(average.dtype), 1.0 - decay)

    @torch.no_grad()
    def on_evaluate_begin(self, model: nn.Module) -> None:
        """Give the model the average, if there is one and it has not got it yet."""
        if self._average and not self._weights:
            self._weights = {name: _copy(parameter, parameter.dtype) for name, parameter in _trained(model)}
            for name, parameter in _trained(model):
                parameter.copy_(self._average[name])

    @torch.no_grad()
    def on_evaluate_end(self, model: nn.Module) -> None:
        """Give it its own weights again."""
        for name, parameter in _trained(model) if self._weights else ():
            parameter.copy_(self._weights[name])
        self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """The average, whole and on the CPU, and the number of steps."""
        return {"steps": self.steps, "average": {name: _whole(value) for name, value in self._average.items()}}

    def load_state_dict(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            KeyError: It is of other parameters.
            ValueError: A value has another shape, is complex or not finite.
        """
        average = state["average"]
        for name, parameter in _trained(model):
            value = average[name]
            if value.shape != parameter.shape or value.is_complex() or not value.isfinite().all():
                raise ValueError(f"the average of {name} is {list(value.shape)} of {value.dtype}, or not finite")
        self.steps = int(state["steps"])
        self._average = {name: _placed(average[name], _copy(parameter)) for name, parameter in _trained(model)}

    def details(self) -> dict[str, Any]:
        """The decay."""
        return {"ema_decay": self.decay}


def _trained(model: nn.Module) -> ItemsView[str, nn.Parameter]:
    return trained_parameters(extract_model_from_parallel(model)).items()


def _copy(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return parameter.detach().to(dtype, copy=True)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, of FSDP's shards put together; every process calls it."""
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.to("cpu", copy=True)


def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value`` in the place of ``like``, and as a shard where that is one."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return like.copy_(value)
