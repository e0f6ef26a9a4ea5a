"""Hooks that see the forward passes of one thread, and see them once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..tuner.hooks.recomputation import is_recomputing

__all__ = ["in_this_thread"]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads than the one that makes it: they may run the same model meanwhile.

    Nor does it where gradient checkpointing computes blocks again, from the last to the first.
    """
    # An attribute and not the thread's number, which a graph compiler cannot ask for.
    local = threading.local()
    local.here = True

    def call(*args: Any) -> Any:
        return hook(*args) if getattr(local, "here", False) and not is_recomputing() else None

    return call
