"""Registers that one thread leaves out of a whole model's passes for a while, those that are added meanwhile too."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .layer import RegisterLayer, attached_layers

__all__ = ["follow_contexts", "registers_left_out"]


class _Contexts(threading.local):
    """The contexts that a thread is in: a model, and what is left out of it."""

    def __init__(self) -> None:
        self.open: list[tuple[nn.Module, frozenset[str]]] = []


_contexts = _Contexts()


@contextmanager
def registers_left_out(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the context this thread's passes are without these adapters of registers.

    Args:
        model: The model.
        names: Their names; :data:`~.hooks.choice.EVERYONE` among them: all, those that come meanwhile too.
    """
    known, context = attached_layers(model), (model, frozenset(names))
    with ExitStack() as stack:
        for layer in known:
            stack.enter_context(layer.without(context[1]))
        _contexts.open.append(context)
        try:
            yield
        finally:
            _contexts.open = [other for other in _contexts.open if other is not context]
            for layer in attached_layers(model):
                if layer not in known:
                    follow_contexts(layer)


def follow_contexts(layer: RegisterLayer) -> None:
    """Have a new layer leave out what the contexts that this thread is in leave out of its model."""
    around = (names for model, names in _contexts.open if layer.is_in(model))
    layer.call.without = frozenset().union(*around)
    layer.show_labels()
