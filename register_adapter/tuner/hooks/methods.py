"""Methods that users call past a tower's ``forward``: registers are cut out of what those return.

timm's ``forward_intermediates``, on which ``get_intermediate_layers`` and ``features_only`` rest, splits and reshapes
by its own count of prefix tokens, and would put registers into the feature map in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch

from ...errors import UnsupportedModelError
from ...towers.anatomy import parent
from ...towers.calls import hidden_states_of
from .base import LayerHooks
from .call_state import MethodCall
from .recording import is_recorded
from .stand_in import StandIn
from .tokens import cut_tokens

__all__ = ["MethodHooks"]

#: Keys of outputs that hold whole sequences, and the tokens before the patches.
_SEQUENCE_KEYS = ("x_prenorm",)
_PREFIX_KEYS = ("image_intermediates_prefix", "x_norm_regtokens")
_REPLICATE = "_replicate_for_data_parallel"


class MethodHooks(LayerHooks):
    """What a :class:`RegisterLayer` does to such methods; mixed into it."""

    @property
    def _methods(self) -> tuple[str, ...]:
        anatomy = self.tower.anatomy
        return (*anatomy.pass_methods, *anatomy.methods, *anatomy.counted_methods)

    def _wrap_methods(self) -> None:
        for path in self._methods:
            owner, name = parent(self.tower.module, path)
            # An attribute of the instance, which the class's method shines through again once it is gone. One that
            # the user has put there is what it calls.
            own = vars(owner).get(name)
            given: Any = (path, owner, _unbound(own, owner), frozenset())
            owner.__dict__[name] = StandIn.of(owner, name, self._call_method, *given)
            owner.__dict__[_REPLICATE] = partial(self._replicate, owner)

    def _unwrap_methods(self) -> None:
        for path in self._methods:
            owner, name = parent(self.tower.module, path)
            if not self._is_ours(vars(owner).get(name)):
                continue  # the user's, put there since
            _, _, own, _ = owner.__dict__.pop(name).args
            if own is not None:
                owner.__dict__[name] = own.args[0] if _is_free(own) else MethodType(own, owner)
            owner.__dict__.pop(_REPLICATE, None)

    def _is_ours(self, value: Any) -> bool:
        return isinstance(value, partial) and value.func == self._call_method

    def _replicate(self, owner: Any) -> Any:
        """As torch's, for DataParallel: a replica's methods are its own, and do what the thread that makes it asks."""
        replica = type(owner)._replicate_for_data_parallel(owner)
        del replica.__dict__[_REPLICATE]
        for name, value in list(vars(replica).items()):
            if self._is_ours(value):
                path, _, own, _ = value.args
                given = (path, replica, own, self.call.without)
                replica.__dict__[name] = StandIn.of(replica, name, self._call_method, *given)
        return replica

    def _call_method(self, path: str, owner: Any, own: Any, without: frozenset[str], *args: Any, **kwargs: Any) -> Any:
        """Call what has the name of a method at ``path``.

        Args:
            path: Place of the method below the tower.
            owner: The module that it is called on, which may be a replica's.
            own: What the user had put in the class's method's place, as a function of the owner; ``None`` for nothing.
            without: Adapters that take no part in a replica's passes.
            *args: The method's.
            **kwargs: The method's.
        """
        method = own or getattr(type(owner), path.rpartition(".")[2])
        if is_recorded(*args, *kwargs.values()):
            return method(owner, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.inputs.leave_all()
        self._end_if_over()
        if self.call.segments is not None:  # part of a pass
            try:
                return self._run_method(path, owner, method, args, kwargs)
            except BaseException as error:
                if not isinstance(error, Exception):  # Ctrl-C: torch calls no hook that would end the pass
                    self._end_pass()
                raise
        entered = self.call.entered  # by the embeddings, before a method that is given a sequence
        self._begin_pass(without)
        self.call.entered = 0 if path in self.tower.anatomy.pass_methods else entered
        try:
            return self._run_method(path, owner, method, args, kwargs)
        finally:
            self._end_pass()

    def _run_method(self, path: str, owner: Any, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        anatomy = self.tower.anatomy
        name = path.rpartition(".")[2]
        counts = self._counts
        if path in anatomy.pass_methods:
            output = method(owner, *args, **kwargs)
            self._check_left(counts)
            return output
        # What a user has put there may call what was there before.
        if not counts or self.call.method is not None or path in self.call.methods:
            return method(owner, *args, **kwargs)
        self._check_call(name, args)
        if path in anatomy.counted_methods:
            if _is_free(method):
                raise UnsupportedModelError(
                    f"{type(owner).__name__}.{name} was replaced by a function that is not bound to the model: in it "
                    "registers cannot be counted among the prefix tokens. Set a method: "
                    f"model.{name} = types.MethodType(function, model)."
                )
            return self._counted(owner, lambda tower: method(tower, *args, **kwargs))
        before, self.call.methods = self.call.methods, (*self.call.methods, path)
        try:
            result = method(owner, *args, **kwargs)
        finally:
            self.call.methods = before
        if isinstance(result, dict):
            whole = {key: result[key] for key in _SEQUENCE_KEYS if key in result}
            return {**result, **{key: self._cut(x, x.shape[1] - counts[-1], counts) for key, x in whole.items()}}
        # A sequence came in; perhaps somebody's own, which has no registers.
        if not self.call.entered:
            return result
        return self._cut(result, hidden_states_of(args, kwargs).shape[1] - self.count_at(0), counts)

    def _counted(self, module: Any, method: Callable[[Any], Any]) -> Any:
        """Call a method on a stand-in for the tower that counts the registers among its prefix tokens."""
        counter, count = self.tower.anatomy.method_counter, self.num_active
        assert counter is not None
        self.call.method = running = MethodCall(module, counter)
        try:
            result = method(running.stand_in)
        finally:
            self.call.method = None
        before, whole = getattr(module, counter), running.length + count
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


def _unbound(own: Any, owner: Any) -> Any:
    """What a user has put in a method's place, as a function of the owner; ``None`` for nothing."""
    if own is None:
        return None
    bound = isinstance(own, MethodType) and own.__self__ is owner
    return own.__func__ if bound else partial(_free, own)


def _free(function: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _is_free(method: Any) -> bool:
    return isinstance(method, partial) and method.func is _free


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
