"""Whether what a checkpoint says of optimiser and schedule is what this run's can go on from.

torch takes whatever is loaded into them, and fails in the first step, or goes on with other numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...utils.arguments import check_mapping, check_number

__all__ = ["check_like", "check_optimizer"]

#: What AdamW keeps of a parameter.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
#: Of these, what is never below 0.
_COUNTS = ("step", "exp_avg_sq")


def check_optimizer(optimizer: Any, state: Any) -> None:
    """AdamW's moments are the parameters', and its groups have the settings of this run's.

    Args:
        optimizer: This run's, as it is before the first step.
        state: What its ``state_dict()`` was.

    Raises:
        KeyError: Something is missing.
        TypeError: Something is of another type.
        ValueError: Moments have another shape, are complex, not finite or below 0, or there are other groups.
    """
    check_like("the optimiser's groups", optimizer.state_dict()["param_groups"], state["param_groups"])
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        values = state["state"].get(number)
        if values is None:  # it had no gradient yet
            continue
        if missing := sorted(_MOMENTS - set(values)):
            raise KeyError(f"the optimiser's {', '.join(missing)} of a parameter {list(parameter.shape)}")
        for name, value in values.items():
            shapes = {"step": [()], "exp_avg": [parameter.shape], "exp_avg_sq": [parameter.shape]}
            fits = tuple(value.shape) in shapes.get(name, [parameter.shape, ()])
            if value.is_complex() or not value.isfinite().all() or not fits or (name in _COUNTS and (value < 0).any()):
                raise ValueError(
                    f"the optimiser's {name} of a parameter {list(parameter.shape)} is {list(value.shape)} of "
                    f"{value.dtype}, which is another shape, complex, not finite, or below 0 where it cannot be"
                )


def check_like(name: str, own: Any, saved: Any) -> None:
    """Saved settings are of the same kinds as one's own; switches that one side lacks are of another version of torch.

    Args:
        name: What they are called in an error.
        own: One's own: dictionaries, lists, numbers, switches and ``None``.
        saved: What stands in the checkpoint.

    Raises:
        KeyError: A number is missing.
        TypeError: Something is of another type.
        ValueError: A number is not finite, or there are more or fewer.
    """
    if isinstance(own, dict):
        check_mapping(name, saved, "by name")
        for key, value in own.items():
            if key in saved:
                check_like(f"{name}: {key}", value, saved[key])
            elif value is not None and not isinstance(value, bool):
                raise KeyError(f"{key} of {name}")
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"{name} should be {len(own)} values, got {saved!r:.100}")
        for value, other in zip(own, saved, strict=True):
            check_like(name, value, other)
    elif own is None or isinstance(own, bool):
        if saved is not None and not isinstance(saved, bool | dict):
            raise TypeError(f"{name} is {saved!r:.100}")
    elif isinstance(own, int | float):
        check_number(name, saved)
        if not math.isfinite(saved):
            raise ValueError(f"{name} is {saved}")
    elif isinstance(own, torch.Tensor) and not isinstance(saved, torch.Tensor):
        raise TypeError(f"{name} is {saved!r:.100}")
