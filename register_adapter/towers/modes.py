"""Evaluation mode for a while: every module's own mode, and torch's random state, are as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..utils.parameters import check_module

__all__ = ["evaluating"]


@contextmanager
def evaluating(*modules: nn.Module, seed: int | None = 0) -> Iterator[None]:
    """Evaluation mode without gradients inside.

    Args:
        *modules: The modules, with all that is in them.
        seed: Seed of torch's random state inside, which is as before afterwards: a model that hides patches at random
            hides the same ones every time. ``None`` leaves the random state alone.
    """
    for module in modules:
        check_module(module)
    parts = [part for module in modules for part in module.modules()]
    modes = [(part, part.training) for part in parts]
    devices = {p.device.index or 0 for module in modules for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for module in modules:
                module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode
