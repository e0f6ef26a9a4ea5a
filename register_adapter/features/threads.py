"""Hooks that see the forward passes of one thread, or coroutine, and see them once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from ..tuner.hooks.call_state import own_variable
from ..tuner.hooks.recomputation import is_recomputing
from ..tuner.hooks.recording import show_hooks_to_compiler

__all__ = ["Here", "in_this_thread"]


class Here:
    """Knows again the thread, or coroutine, that makes it.

    Coroutines take turns in one thread, wherever they wait. One takes what it has made along into the tasks that it
    starts, and into ``asyncio.to_thread``. A graph compiler cannot ask for a coroutine, and goes by the thread.
    """

    def __init__(self) -> None:
        # An attribute and not the thread's number, which a graph compiler cannot ask for either.
        self._local = threading.local()
        self._local.here = True
        self._mark = weakref.ref(self)
        _HERE.set(frozenset(mark for mark in _HERE.get() if mark() is not None) | {self._mark})

    @property
    def is_here(self) -> bool:
        """Whether whoever asks runs in it."""
        if torch.compiler.is_compiling():
            return getattr(self._local, "here", False)
        return self._mark in _HERE.get()


#: What the running coroutine, or thread, has made; nothing is kept for its sake.
_HERE: ContextVar[frozenset[weakref.ref[Here]]] = own_variable("register_adapter_here", frozenset())


class _Hook:
    """A hook that goes by its thread; in a copy of the model, and in another process, one that does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook, self._here = hook, Here()

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args) if self._here.is_here and not is_recomputing() else None

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _idle, ()


def _nothing(*_: Any) -> None:
    """What is left of a hook in a copy."""


def _idle() -> Callable[..., None]:
    return _nothing


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads, or coroutines, than the one that makes it.

    They may run the same model meanwhile. Nor does it where gradient checkpointing computes blocks again, from the last
    to the first, nor in copies that are made of the model meanwhile. A model that was compiled before is compiled anew,
    with its hooks.
    """
    show_hooks_to_compiler()
    return _Hook(hook)
