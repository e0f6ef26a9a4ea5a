"""Checkpoints of a training run: the adapter, what surrounds it, and the place in the data; never the frozen base."""

from __future__ import annotations

from ...utils.random_states import random_state, same_random_state, set_random_state
from .folder import adapter_weights, copy_weights, load, load_adapter, put_weights, read_best, save
from .state import CheckpointError, TrainState, find, find_all, find_foreign, read_state, remove_all

__all__ = [
    "CheckpointError",
    "TrainState",
    "adapter_weights",
    "copy_weights",
    "find",
    "find_all",
    "find_foreign",
    "load",
    "load_adapter",
    "put_weights",
    "random_state",
    "read_best",
    "read_state",
    "remove_all",
    "same_random_state",
    "save",
    "set_random_state",
]
