"""A watch over the loss and the gradient: no step is taken with one that is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ...utils.text import first_few

__all__ = ["LossGuard"]


class LossGuard:
    """Knows the batches of the optimiser step that is being made; every process has one.

    They are looked at together, before the step, so that a device is waited for once a step.

    Args:
        accelerator: The run's accelerator.
        dataset: The training images, which are asked for the names of those of a batch.
    """

    def __init__(self, accelerator: Accelerator, dataset: Any) -> None:
        self.accelerator, self.dataset = accelerator, dataset
        self._batches: list[tuple[torch.Tensor | None, torch.Tensor]] = []

    def add(self, batch: Any, loss: torch.Tensor) -> None:
        """Note a batch, with ``index`` ``(B,)`` if it has that, and its loss."""
        index = batch.get("index") if hasattr(batch, "get") else None
        self._batches.append((index, loss.detach().float()))

    def check(self, norm: Any = None) -> tuple[str, str] | None:
        """What is wrong with the step and on which images, ``None`` if nothing; on every process the same.

        Args:
            norm: The gradient's norm; ``None`` where a scaler of fp16 sees to it, which skips such steps.
        """
        batches, self._batches = self._batches, []
        losses = torch.stack([loss for _, loss in batches])
        wrong = ~torch.isfinite(torch.cat([losses, _whole(norm, losses)]))
        if not bool(self.accelerator.reduce(wrong.any().float(), "sum")):
            return None
        pairs = [(value, _numbers(index)) for value, (index, _) in zip(losses.tolist(), batches, strict=True)]
        everywhere: list[tuple[float, list[int]]] = gather_object(pairs)
        guilty = [pair for pair in everywhere if not math.isfinite(pair[0])]
        what = f"the loss is {guilty[0][0]}" if guilty else "the gradient is not finite"
        return what, self._named([number for _, numbers in guilty or everywhere for number in numbers])

    def _named(self, numbers: list[int]) -> str:
        """Images of a batch, those alone that are not finite themselves if there are such; "" without numbers."""
        numbers = list(dict.fromkeys(numbers))
        broken = {number: fault for number in numbers if (fault := _fault(self.dataset, number))}
        listed = [self._name(number) + broken.get(number, "") for number in numbers if number in broken or not broken]
        return first_few(listed)

    def _name(self, number: int) -> str:
        data = self.dataset
        while data is not None:
            if hasattr(data, "name_of"):
                return str(data.name_of(number))
            data = getattr(data, "dataset", None)
        return f"item {number}"


def _whole(norm: Any, like: torch.Tensor) -> torch.Tensor:
    """The norm ``(1,)``, of FSDP's shards too, on the device of ``like``; zero for ``None``."""
    if norm is None:
        return torch.zeros(1, device=like.device)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
    return whole.detach().to(like.device, torch.float32).reshape(1)


def _numbers(index: torch.Tensor | None) -> list[int]:
    return [] if index is None else [int(number) for number in index.tolist()]


def _fault(dataset: Any, number: int) -> str:
    """What of an item is not finite, as the end of its name; nothing if all is."""
    try:
        item = dataset[number]
    except Exception:  # it is about another fault
        return ""
    names = [
        name
        for name, value in item.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    return f" (its {', '.join(names)} not finite)" if names else ""
