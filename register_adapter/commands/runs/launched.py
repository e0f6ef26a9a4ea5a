"""Commands that a launcher starts in several processes, ``accelerate launch -m register_adapter …``."""

from __future__ import annotations

import os

from accelerate import PartialState

from ...utils.environment import has_accelerator

__all__ = ["is_main_process", "num_processes", "own_device"]


def num_processes() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this one writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: str | None) -> str:
    """This process's device, once it has found the others.

    Args:
        device: ``"cpu"``, or a kind of GPU; ``None`` takes GPUs if there are any.
    """
    return str(PartialState(cpu=device == "cpu" or not has_accelerator()).device)
