"""Adapters of several methods that take no part for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..hooks.choice import EVERYONE
from ..layer import RegisterLayer
from ..left_out import registers_left_out, when_back
from ..positions import find_again
from .class_names import show_classes
from .guards import SWITCHING, flags_kept

__all__ = ["Aside"]

#: Those with contexts that somebody is in.
_OPEN: list[Aside] = []


class Aside:
    """What is set aside on one model.

    Registers are set aside in one thread. PEFT's layers have one switch for all threads: they are without what any
    thread has set aside, and as before when the last one is done.

    Args:
        model: The base model, adapters on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: What each context sets aside, and what was active in the layers that they change.
        self._contexts: list[frozenset[str]] = []
        self._before: dict[Any, list[str]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Aside:
        """The one that has something set aside on ``model``, or a new one, which follows the contexts around it."""
        with SWITCHING:
            for other in _OPEN:
                if other._model is model:
                    return other
            aside, everyone = cls(model), frozenset({EVERYONE})
            if when_back(model, partial(aside._leave, everyone)):  # of a model with registers alone
                aside._enter(everyone)
            return aside

    def _enter(self, out: frozenset[str]) -> None:
        with SWITCHING:
            if not self._contexts:
                _OPEN.append(self)
            self._contexts.append(out)
            self._switch()

    def _leave(self, out: frozenset[str]) -> None:
        with SWITCHING:
            self._contexts.remove(out)
            if not self._contexts:
                _OPEN[:] = [other for other in _OPEN if other is not self]
            self._switch()

    @contextlib.contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context ``names`` take no part.

        Args:
            names: Names of adapters; with :data:`EVERYONE` among them all, those that come meanwhile too.
        """
        out = frozenset(names)
        for name, bias in self._biases(out):
            warnings.warn(  # in PEFT's words
                f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                f"output as the base model would without adaption: the biases are those that {name!r} has trained.",
                stacklevel=5,
            )
        with registers_left_out(self._model, out):
            self._enter(out)
            try:
                yield
            finally:
                self._leave(out)

    @contextlib.contextmanager
    def lifted(self, gone: Iterable[str] = ()) -> Iterator[None]:
        """What is done in the context to PEFT's layers holds when nobody sets anything aside any more.

        Args:
            gone: Names of adapters that are taken off in it.
        """
        self.leave_biases(gone)
        with SWITCHING:
            contexts, self._contexts = self._contexts, []
            self._switch()
            try:
                yield
            finally:
                self._contexts = contexts
                self._switch()

    def leave_biases(self, names: Iterable[str]) -> None:
        """Warn that what adapters have made of the base's own biases stays there when they are taken off."""
        for name, bias in self._biases(names):
            warnings.warn(
                f"the base keeps the biases that the adapter {name!r} (bias={bias!r}) has trained, and what is saved "
                "of other adapters from now on is for this changed base; load the base anew to have its own.",
                stacklevel=4,
            )

    def _biases(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Names and settings of those among ``names`` that train biases of the base, in place."""
        wanted, configs = set(names), getattr(self._model, "peft_config", {})
        said = {name: getattr(config, "bias", "none") for name, config in configs.items()}
        return [(name, said[name]) for name in said if said[name] != "none" and not wanted.isdisjoint({name, EVERYONE})]

    def settled(self, merged: Iterable[str] = ()) -> nn.Module:
        """The model, whose config names the classes of the head that is at work, or of one that was merged into it."""
        show_classes(self._model, merged)
        return self._model

    def _switch(self) -> None:
        """Have PEFT's layers do without what is set aside now."""
        self._switch_layers()
        self.settled()

    def _switch_layers(self) -> None:
        if not self._contexts and not self._before:
            return
        out: frozenset[str] = frozenset().union(*self._contexts)
        everyone = EVERYONE in out
        find_again(self._model)
        parts = (part for part in self._model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper))
        for part in parts:
            if isinstance(part, RegisterLayer) or part in self._before or part.disable_adapters:
                continue
            active = list(part.active_adapters)
            if (everyone and active) or not out.isdisjoint(active):
                self._before[part] = active
        with flags_kept(self._model):
            for part, active in self._before.items():
                left = [] if everyone else [name for name in active if name not in out]
                if part.disable_adapters != (not left and bool(active)):
                    part.enable_adapters(bool(left) or not active)
                if left and left != list(part.active_adapters):
                    part.set_adapter(left)
        if not self._contexts:
            self._before.clear()
