"""The control arm of every table: random, untrained registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..tuner.config import RegisterConfig
from ..tuner.model import RegisterModel

__all__ = ["random_registers"]


@contextmanager
def random_registers(model: nn.Module, num_registers: int, std: float = 0.02, seed: int = 0) -> Iterator[nn.Module]:
    """Give ``model`` random, untrained registers for the length of the context (the control arm of every table).

    Args:
        model: A base model; it is as before afterwards.
        num_registers: Number of registers; 0 changes nothing.
        std: Standard deviation of the random values.
        seed: Seed of the random values.

    Yields:
        The same model, with registers.
    """
    if num_registers == 0:
        yield model
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = RegisterModel(model, RegisterConfig(num_registers=num_registers, init_std=std), "random")
    try:
        yield model
    finally:
        tuner.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
