"""What is looked at: a model, or one adapter of a PEFT model; and every state that looking changes, put back."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from peft import PeftModel
from torch import nn

from ..towers.modes import evaluating
from ..tuner.config import RegisterConfig
from ..tuner.fields import check_string
from ..tuner.hooks.call_state import modes_around
from ..tuner.layer import RegisterLayer, find_register_layer, register_layers

__all__ = ["Subject", "Subjects", "keeping_adapters", "looking_at", "named_subjects", "names_at_work"]

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

#: A model as it is, or a PEFT model with one of its adapters (``None``: with its adapters disabled).
Subject = nn.Module | tuple[nn.Module, str | None]
#: One model, or several by the name to show above their images.
Subjects = nn.Module | Mapping[str, Subject]


def named_subjects(models: Subjects) -> dict[str, Subject]:
    """Names and subjects; a single PEFT model with several register adapters is its base and each of them.

    Raises:
        ValueError: ``models`` is empty.
    """
    if isinstance(models, Mapping):
        if not models:
            raise ValueError("no model to look at: models is empty")
        return dict(models)
    layer = find_register_layer(models)
    if not isinstance(models, PeftModel) or layer is None:
        return {type(models).__name__: models}
    return {"base": (models, None), **{f"+ {name}": (models, name) for name in layer.names}}


def keeping_adapters(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Have a function, or method, that reads models, its first argument, see the registers active when it is called.

    Its passes, each in :func:`adapters_stay`, have the same then, whatever other threads set meanwhile; ``(model,
    name)`` has its own, or none where adapters are switched off at the call.
    """
    names = list(inspect.signature(function).parameters)
    first = int(names[0] == "self")

    @wraps(function)
    def kept(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        given: Any = args[first] if len(args) > first else kwargs.get(names[first])
        subjects = given.values() if isinstance(given, Mapping) else [given]
        models = [subject[0] if isinstance(subject, tuple) and subject else subject for subject in subjects]
        with ExitStack() as stack:
            for model in models:
                for layer in register_layers(model) if isinstance(model, nn.Module) else ():
                    stack.enter_context(layer.starting())
            return function(*args, **kwargs)

    return kept


@contextmanager
def looking_at(subject: Subject) -> Iterator[nn.Module]:
    """The model of a subject, without gradients, in evaluation mode, its adapter active; all is put back afterwards.

    Raises:
        ValueError: The subject names an adapter that the model does not have, or the model is not a PEFT model.
    """
    model, adapter = subject if isinstance(subject, tuple) else (subject, "")
    with ExitStack() as stack:
        stack.enter_context(modes_around())
        if isinstance(subject, tuple):
            stack.enter_context(_adapter(model, adapter))
        stack.enter_context(evaluating(model, seed=None))
        yield model


@contextmanager
def _adapter(model: Any, name: str | None) -> Iterator[None]:
    """``model`` with one adapter active, or with none."""
    if not isinstance(model, PeftModel):
        lacks = "adapters to disable" if name is None else f"adapter {name!r} to look at"
        raise ValueError(f"{type(model).__name__} is not a PeftModel, so it has no {lacks}: give the model alone")
    if name is not None:
        check_string(name)
    if name is not None and name not in model.peft_config:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(sorted(model.peft_config))}")
    layers = register_layers(model)
    if layers and _registers_only(model):
        with _staying(layers, [] if name is None else [name]):  # other threads may look at another one
            yield
        return
    with _turn(model, name) as active, _staying(layers, active):
        yield


class _Turns:
    """Threads that each have an adapter of one model active for all, and what the first of them found.

    Attributes:
        open: An object for each, and the name of its adapter; the last has its own active.
    """

    def __init__(self, model: PeftModel) -> None:
        self.open: list[tuple[object, str | None]] = []
        self._before, self._kept = list(model.active_adapters), model.active_adapter
        # PEFT makes the parameters of an active adapter trainable.
        self._gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def end(self, model: PeftModel, mine: object) -> bool:
        """One of them ends: the adapter of another is active again, or at last everything as it was.

        Returns:
            Whether others go on.
        """
        was_last = bool(self.open) and self.open[-1][0] is mine
        self.open = [turn for turn in self.open if turn[0] is not mine]
        if self.open:
            following = self.open[-1][1]
            if was_last and following in model.peft_config:
                model.set_adapter(following)
            return True
        before = [name for name in self._before if name in model.peft_config]
        if self._before and not before:  # deleted meanwhile; PEFT has chosen others
            return False
        if list(model.active_adapters) != before:
            _activate(model, before)
        if model.active_adapter != self._kept and self._kept in model.peft_config:
            model.active_adapter = self._kept
        for parameter, wanted in self._gradients:
            parameter.requires_grad_(wanted)
        return False


_TURNS: weakref.WeakKeyDictionary[nn.Module, _Turns] = weakref.WeakKeyDictionary()
_TURNING = threading.RLock()


@contextmanager
def _turn(model: PeftModel, name: str | None) -> Iterator[list[str]]:
    """An adapter, or none, active for all threads; the names of those that are."""
    mine = object()
    try:
        with _TURNING:
            _TURNS.setdefault(model, _Turns(model)).open.append((mine, name))
            if name is not None:
                model.set_adapter(name)
            active = [] if name is None else list(model.active_adapters)
        with model.disable_adapter() if name is None else nullcontext():
            yield active
    finally:
        with _TURNING:
            if model in _TURNS and not _TURNS[model].end(model, mine):
                del _TURNS[model]


@contextmanager
def _staying(layers: Iterable[RegisterLayer], names: list[str]) -> Iterator[None]:
    """This thread's passes have these adapters."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.staying(names))
        yield


def names_at_work(model: PeftModel) -> list[str]:
    """Names of the adapters that this thread looks at: those of its subject, or the active ones."""
    layer = find_register_layer(model)
    return layer.names_at_work if layer is not None and _registers_only(model) else list(model.active_adapters)


def _registers_only(model: PeftModel) -> bool:
    """Whether no adapter has a part that is every thread's: a head, or another method's layers."""
    return all(
        isinstance(config, RegisterConfig) and not config.modules_to_save for config in model.peft_config.values()
    )


def _activate(model: PeftModel, names: list[str]) -> None:
    if len(names) == 1:
        model.set_adapter(names[0])
    else:  # a PeftModel keeps the name of one, its tuner those of all
        model.base_model.set_adapter(names)
