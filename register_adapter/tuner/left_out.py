"""Registers that one thread leaves out of a whole model's passes for a while, those that are added meanwhile too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import nn

from .hooks.call_state import own_variable
from .hooks.choice import EVERYONE
from .layer import RegisterLayer, attached_layers

__all__ = ["follow_contexts", "in_context", "registers_left_out", "when_back"]


@dataclass(eq=False)
class _Context:
    """A context that a thread is in: a model, what is left out of it, and what is to be done at its end."""

    model: nn.Module
    names: frozenset[str]
    ends: list[Callable[[], None]] = field(default_factory=list)
    open: bool = True


#: The contexts that a thread, or coroutine, is in, from the outermost on.
_OPEN: ContextVar[tuple[_Context, ...]] = own_variable("register_adapter_contexts", ())


def _open() -> tuple[_Context, ...]:
    return tuple(context for context in _OPEN.get() if context.open)


@contextmanager
def registers_left_out(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the context this thread's passes are without these adapters of registers.

    Args:
        model: The model.
        names: Their names; :data:`~.hooks.choice.EVERYONE` among them: all, those that come meanwhile too.
    """
    known, context = attached_layers(model), _Context(model, frozenset(names))
    with ExitStack() as stack:
        for layer in known:
            stack.enter_context(layer.without(context.names))
        _OPEN.set((*_open(), context))
        try:
            yield
        finally:
            context.open = False
            _OPEN.set(_open())
            for layer in attached_layers(model):
                if layer not in known:
                    follow_contexts(layer)
            for end in context.ends:
                end()


def in_context(base: nn.Module) -> bool:
    """Whether this thread is in a context that leaves something out of ``base``."""
    return any(part is base for context in _open() for part in context.model.modules())


def when_back(base: nn.Module, end: Callable[[], None]) -> bool:
    """Have ``end`` called when this thread leaves the outermost context that leaves everything out of ``base``.

    Returns:
        Whether it is in one.
    """
    for context in _open():
        if EVERYONE in context.names and any(part is base for part in context.model.modules()):
            context.ends.append(end)
            return True
    return False


def follow_contexts(layer: RegisterLayer) -> None:
    """Have a new layer leave out what the contexts that this thread is in leave out of its model."""
    around = (context.names for context in _open() if layer.is_in(context.model))
    layer.call.asked = frozenset().union(*around)
    layer.show_labels()
