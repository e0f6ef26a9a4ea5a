"""Methods that users call past a tower's ``forward``: registers are cut out of what those return.

timm's ``forward_intermediates``, on which ``get_intermediate_layers`` and ``features_only`` rest, splits and reshapes
by its own count of prefix tokens, and would put registers into the feature map in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...towers.anatomy import parent
from ...towers.calls import hidden_states_of
from ..tokens import cut_tokens
from .base import LayerHooks, MethodCall

__all__ = ["MethodHooks"]

#: Keys of outputs that hold whole sequences, and the tokens before the patches.
_SEQUENCE_KEYS = ("x_prenorm",)
_PREFIX_KEYS = ("image_intermediates_prefix", "x_norm_regtokens")


class MethodHooks(LayerHooks):
    """What a :class:`RegisterLayer` does to such methods; mixed into it."""

    @property
    def _methods(self) -> tuple[str, ...]:
        anatomy = self.tower.anatomy
        return (*anatomy.pass_methods, *anatomy.methods, *anatomy.counted_methods)

    def _wrap_methods(self) -> None:
        for path in self._methods:
            owner, name = parent(self.tower.module, path)
            # An attribute of the instance, which the class's method shines through again once it is gone.
            setattr(owner, name, partial(self._call_method, path))

    def _unwrap_methods(self) -> None:
        for path in self._methods:
            owner, name = parent(self.tower.module, path)
            owner.__dict__.pop(name, None)

    def _call_method(self, path: str, *args: Any, **kwargs: Any) -> Any:
        if self.call.segments is not None:  # part of a pass
            return self._run_method(path, args, kwargs)
        self._begin_pass()
        try:
            return self._run_method(path, args, kwargs)
        finally:
            self._end_pass()

    def _run_method(self, path: str, args: Any, kwargs: Any) -> Any:
        anatomy = self.tower.anatomy
        owner, name = parent(self.tower.module, path)
        method = getattr(type(owner), name)
        counts = self._counts
        if path in anatomy.pass_methods:
            output = method(owner, *args, **kwargs)
            self._check_left()
            return output
        if not counts or self.call.method is not None:
            return method(owner, *args, **kwargs)
        self._check_call(name, args)
        if path in anatomy.counted_methods:
            return self._counted(lambda tower: method(tower, *args, **kwargs))
        result = method(owner, *args, **kwargs)
        if isinstance(result, dict):
            whole = {key: result[key] for key in _SEQUENCE_KEYS if key in result}
            return {**result, **{key: self._cut(x, x.shape[1] - counts[-1], counts) for key, x in whole.items()}}
        # A sequence came in.
        return self._cut(result, hidden_states_of(args, kwargs).shape[1] - self.count_at(0), counts)

    def _counted(self, method: Callable[[Any], Any]) -> Any:
        """Call a method on a stand-in for the tower that counts the registers among its prefix tokens."""
        counter, count = self.tower.anatomy.method_counter, self.num_active
        assert counter is not None
        self.call.method = running = MethodCall(self.tower.module, counter)
        try:
            result = method(running.stand_in)
        finally:
            self.call.method = None
        before, whole = getattr(self.tower.module, counter), running.length + count
        return _without_registers(result, count, before, lambda value: cut_tokens(value, self.prefix, count, whole))

    def _check_call(self, name: str, args: Any) -> None:
        """Refuse what would give wrong numbers, or an error from deep inside."""
        kind = type(self.tower.module).__name__
        if args and isinstance(args[0], list):
            raise TypeError(
                f"{kind}.{name} was given a list of {len(args[0])} batches: registers enter one batch at a time. "
                "Call it for each of them."
            )
        # Elsewhere no placeholders stand for registers that start later.
        late = self.tower.anatomy.method_counter and self.count_at(0) < self.num_active
        if late and torch.is_grad_enabled() and getattr(self.tower.module, "grad_checkpointing", False):
            raise ValueError(
                f"{kind}.{name} with gradient checkpointing and registers that start at a later block (insert_layer): "
                "the backward pass would not know that it recomputes this method. Call set_grad_checkpointing(False), "
                "or use insert_layer=0."
            )


def _without_registers(value: Any, count: int, before: int, cut: Callable[[Any], Any], prefix: bool = False) -> Any:
    """A result without the registers that counted as prefix tokens, of which there are ``before`` without them.

    Args:
        value: The result, of any structure.
        count: Number of registers.
        before: The tower's own count of prefix tokens.
        cut: Takes the registers out of whole sequences.
        prefix: Whether ``value`` holds prefix tokens alone.
    """
    if isinstance(value, torch.Tensor):
        return cut_tokens(value, before, count, before + count) if prefix else cut(value)
    if isinstance(value, dict):
        names = [key for key in value if before or key != "image_intermediates_prefix"]
        return {key: _without_registers(value[key], count, before, cut, key in _PREFIX_KEYS) for key in names}
    if isinstance(value, list):
        return [
            _pair(item, count, before)
            if isinstance(item, tuple)
            else _without_registers(item, count, before, cut, prefix)
            for item in value
        ]
    if isinstance(value, tuple):
        return tuple(_without_registers(item, count, before, cut) for item in value)
    return value


def _pair(pair: tuple[torch.Tensor, ...], count: int, before: int) -> Any:
    """Pairs of feature map and prefix tokens, as timm makes them; maps alone if the model has no prefix tokens."""
    features, tokens = pair
    return (features, cut_tokens(tokens, before, count, before + count)) if before else features
