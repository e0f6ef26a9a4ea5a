"""What a thread has asked of a register layer, and what its running forward pass knows of itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from ..registers import RegisterTokens, Segment

__all__ = ["CallState", "MethodCall", "Outside", "RecordPairs", "modes_around", "outside_of_readings", "own_variable"]

#: Called with a block's index, keys and values ``(B, H, N, d)``.
RecordPairs = Callable[[int, torch.Tensor, torch.Tensor], None]

_Value = TypeVar("_Value")
_VARIABLES: list[ContextVar[Any]] = []


def own_variable(name: str, default: _Value) -> ContextVar[_Value]:
    """A context variable of this package, which :class:`Outside` keeps apart."""
    _VARIABLES.append(variable := ContextVar(name, default=default))
    return variable


class MethodCall:
    """One call of a method that counts registers among the tower's prefix tokens.

    It runs on a stand-in for the tower: an object of the tower's class with the very same modules and parameters, but
    a count of its own. On the tower itself other threads would read it.

    Args:
        module: The tower.
        counter: Attribute with the number of its prefix tokens.
    """

    def __init__(self, module: nn.Module, counter: str) -> None:
        self.counter = counter
        self.stand_in: Any = object.__new__(type(module))
        self.stand_in.__dict__.update(module.__dict__)
        self.length = 0

    def enter(self, length: int, count: int) -> None:
        """``count`` registers enter a sequence of ``length`` tokens: from here on they count as prefix tokens.

        Not before: timm resamples its position embeddings by the same count.
        """
        self.length = length
        self.stand_in.__dict__[self.counter] += count


class _Context:
    """What a context leaves out of one layer's passes, as long as it is open."""

    def __init__(self, state: CallState, names: frozenset[str] = frozenset()) -> None:
        self.state, self.names, self.open = state, names, True


#: A coroutine has values of its own, beside others in its thread, and takes them along into ``asyncio.to_thread``.
_LEFT_OUT: ContextVar[tuple[_Context, ...]] = own_variable("register_adapter_left_out", ())
#: Contexts whose attention maps keep the columns of key/value pairs.
_KEEPING: ContextVar[tuple[_Context, ...]] = own_variable("register_adapter_keeping", ())


class CallState(threading.local):
    """What one thread has asked of a layer, and what its running forward pass needs to remember.

    Every thread has values of its own, so that passes in several threads do not see each other's. Plain attributes
    that are set in ``__init__``: the graph compiler guards those, as it would not guard a context variable in every
    supported torch.

    Attributes:
        images: Adapter of each image of the batches, ``"__base__"`` for none; ``None`` for the active adapters.
        asked: Names of adapters that take no part in a replica, or in a layer that was made inside of a context.
        staying: Adapters of this thread's passes, whoever sets others; ``None``: those that are active.
        start: What ``staying`` takes where it is not told names: the adapters of a reading's start; ``None`` for none.
        off: Adapters were switched off for every thread when ``start`` was set.
        read: Registers of the adapters in ``staying`` and ``start``, by name, as they were then.
        contexts: What each open context of this thread leaves out.
        around: All of that together: what a graph goes by, which knows of no coroutines.
        keeping: Number of open contexts of this thread whose attention maps keep the columns of key/value pairs.
        whole: Those of the running pass do.
        record: Gets the keys and values of every block.
        segments: What takes part in the running pass; ``None`` outside of one.
        frame: Where that pass runs, as long as it does; ``None`` where nobody needs to ask.
        trains: The running pass has gradients, so that parts of it may be computed again.
        entered: Number of registers that were put into the sequence of the running pass.
        length: Number of other tokens in that sequence, as an eager hook saw it; 0: none has.
        left: They have come out again.
        method: The running method that is called past the tower's forward, if it counts registers.
        methods: Places of the running methods whose registers are cut out when they return.
        kept: ``asked`` as it is after the pass of a replica, whose own was asked for by another thread.
        given: ``images`` as they were given to the running pass; one inside of it has its own, or none.
        outer: What passes know of themselves inside of which this one runs, as a user's hook makes it; outermost first.
        visible: ``(B, N)`` bool, what a register sees in the running block; ``None`` without a mask.
        rotary: Rotary tables as the blocks were given them, a number of registers, and the tables with rows for these.
    """

    def __init__(self) -> None:
        self.images: list[str] | None = None
        self.asked: frozenset[str] = frozenset()
        self.staying: tuple[str, ...] | None = None
        self.start: tuple[str, ...] | None = None
        self.off: bool = False
        self.read: dict[str, RegisterTokens] = {}
        self.contexts: tuple[frozenset[str], ...] = ()
        self.around: frozenset[str] = frozenset()
        self.keeping: int = 0
        self.whole: bool = False
        self.record: RecordPairs | None = None
        self.segments: list[Segment] | None = None
        self.frame: FrameType | None = None
        self.trains: bool = False
        self.entered: int = 0
        self.length: int = 0
        self.left: bool = False
        self.method: MethodCall | None = None
        self.methods: tuple[str, ...] = ()
        self.kept: frozenset[str] | None = None
        self.given: list[str] | None = None
        self.outer: tuple[dict[str, Any], ...] = ()
        self.visible: torch.Tensor | None = None
        self.rotary: tuple[Any, int, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the pass that was noted as running has ended without a word: behind Ctrl-C torch calls no hook."""
        if self.frame is None:
            return False
        running: FrameType | None = sys._getframe()
        while running is not None and running is not self.frame:
            running = running.f_back
        return running is None

    @property
    def without(self) -> frozenset[str]:
        """Names of adapters that take no part."""
        if torch.compiler.is_compiling():
            return self.around if not self.asked else self.asked | self.around
        left_out = _LEFT_OUT.get()
        if not left_out:
            return self.asked
        return self.asked.union(*(entry.names for entry in left_out if entry.state is self and entry.open))

    @property
    def whole_attentions(self) -> bool:
        """Whether attention maps keep the columns of key/value pairs."""
        if torch.compiler.is_compiling():
            return self.keeping > 0
        return self.whole or any(entry.state is self and entry.open for entry in _KEEPING.get())

    @contextmanager
    def reading(self, **changes: Any) -> Iterator[None]:
        """A context of this thread with other values of what a reading keeps."""
        before, around = {name: vars(self)[name] for name in _OF_A_READING}, _READINGS.states
        try:
            _READINGS.states = (*around, self)
            vars(self).update(changes)
            yield
        finally:
            vars(self).update(before)
            _READINGS.states = around

    @contextmanager
    def keeping_pairs(self) -> Iterator[None]:
        """A context of this thread, or coroutine, whose attention maps keep the columns of key/value pairs."""
        entry, state = _Context(self), vars(self)
        _KEEPING.set((*(other for other in _KEEPING.get() if other.open), entry))
        state["keeping"] += 1
        try:
            yield
        finally:
            entry.open = False
            _KEEPING.set(tuple(other for other in _KEEPING.get() if other.open))
            state["keeping"] -= 1

    @contextmanager
    def leaving_out(self, names: Iterable[str]) -> Iterator[None]:
        """A context of this thread, or coroutine, without some adapters.

        Contexts of coroutines overlap in one thread, and a server may leave one in another thread than it entered it
        in: each takes back what is its own.
        """
        entry, state = _Context(self, frozenset(names)), vars(self)
        _LEFT_OUT.set((*(other for other in _LEFT_OUT.get() if other.open), entry))
        _set_contexts(state, [*state["contexts"], entry.names])
        try:
            yield
        finally:
            entry.open = False
            _LEFT_OUT.set(tuple(other for other in _LEFT_OUT.get() if other.open))
            rest = list(state["contexts"])
            rest.remove(entry.names)
            _set_contexts(state, rest)

    def begin(self) -> bool:
        """A pass begins; one inside of which it does keeps what it knows.

        Returns:
            Whether it is inside of another one.
        """
        inside = self.frame is not None and not self.is_over
        if not inside:  # one that has failed may be left
            self.outer = ()
            self.end()
        images = self.images
        self.outer = (*self.outer, {name: vars(self)[name] for name in (*_OF_A_PASS, "images")}) if inside else ()
        if inside and images is self.given:  # those of the batch around this one
            self.images = None
        vars(self).update(_OF_A_PASS, given=self.images)
        self.whole = self.whole_attentions
        return inside

    def end(self) -> None:
        """The running pass ends; the one around it, if there is one, goes on."""
        if self.kept is not None:
            self.asked = self.kept
        around = self.outer[-1] if self.outer else _OF_A_PASS
        vars(self).update(around, outer=self.outer[:-1])

    def resume(self) -> Callable[[], AbstractContextManager[None]]:
        """What has the state be as it is now, in a thread that computes a part of the running pass again."""
        # Without the frame, which holds all that is in the frames around it, and may be another thread's.
        return partial(self._as_it_was, {**vars(self), "frame": None})

    @contextmanager
    def _as_it_was(self, state: dict[str, Any]) -> Iterator[None]:
        before = dict(vars(self))
        vars(self).update(state, record=None)  # what is recorded has been
        try:
            yield
        finally:
            vars(self).update(before)

    def __deepcopy__(self, memo: Any) -> CallState:
        return CallState()

    def __reduce__(self) -> Any:
        return CallState, ()


#: Whether a thread is in inference mode, has gradients, and autocast on each kind of device.
_Modes = tuple[bool, bool, list[tuple[str, bool, torch.dtype]]]


class _Readings(threading.local):
    """The layers' states that readings of this thread have changed, the outermost's first; torch's modes around it."""

    states: tuple[CallState, ...] = ()
    modes: _Modes | None = None


_READINGS = _Readings()


@contextmanager
def modes_around() -> Iterator[None]:
    """A context of a reading that is about to switch gradients off: :class:`Outside` has them as they are now."""
    before = _READINGS.modes
    _READINGS.modes = before or _modes()
    try:
        yield
    finally:
        _READINGS.modes = before


@contextmanager
def outside_of_readings() -> Iterator[None]:
    """In the context this thread's passes, and readings, are as outside of any: code of the user's runs in it."""
    modes, _READINGS.modes = _READINGS.modes, None
    with ExitStack() as stack:
        stack.callback(setattr, _READINGS, "modes", modes)
        for state in dict.fromkeys(_READINGS.states):
            stack.enter_context(state.reading(**_OF_A_READING))
        yield


class Outside:
    """Where code of the user's runs between the steps of a reading: as outside of it, from when this is made.

    What such code switches on or off of this package's is kept for the next time, and from the reading; so are torch's
    gradients, inference mode and autocast, which ``with torch.no_grad()`` around a ``yield`` would put back in the
    midst of the reading as they were before it, and the reading's end as they were in it. All else stays as Python has
    it: whoever made an iterator may have begun it, and may go on with it, with context variables of its own, numpy's
    ``errstate`` among them, which can be put back only in the context that they were set in.
    """

    def __init__(self) -> None:
        self._values, self._modes = _values(), _READINGS.modes or _modes()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context for such code: this thread's passes, and readings, are as outside of any."""
        with outside_of_readings():
            values, modes = _values(), _modes()
            try:
                with torch.inference_mode(self._modes[0]):  # which nothing else can set
                    _set(self._values, self._modes)
                    try:
                        yield
                    finally:
                        self._values, self._modes = _values(), _modes()
            finally:
                _set(values, modes)


def _values() -> list[Any]:
    return [variable.get() for variable in _VARIABLES]


def _modes() -> _Modes:
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICES]
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast


def _set(values: list[Any], modes: _Modes) -> None:
    for variable, value in zip(_VARIABLES, values, strict=True):
        variable.set(value)
    _, gradients, autocast = modes
    torch.set_grad_enabled(gradients)
    for kind, on, dtype in autocast:
        torch.set_autocast_enabled(kind, on)
        torch.set_autocast_dtype(kind, dtype)


#: Kinds of devices that have autocast.
_DEVICES = ("cpu", "cuda", "mps", "xpu")
#: What a reading keeps, as it is outside of any.
_OF_A_READING: dict[str, Any] = {"staying": None, "start": None, "off": False, "read": {}}
#: What belongs to one pass, as it is outside of any.
_OF_A_PASS: dict[str, Any] = {"segments": None, "frame": None, "trains": False, "visible": None, "rotary": None}
_OF_A_PASS |= {"entered": 0, "length": 0, "left": False, "method": None, "methods": (), "kept": None, "given": None}
_OF_A_PASS["whole"] = False


def _set_contexts(state: dict[str, Any], contexts: list[frozenset[str]]) -> None:
    """In the state of one thread, which need not be the running one."""
    state["contexts"], state["around"] = tuple(contexts), frozenset().union(*contexts)
