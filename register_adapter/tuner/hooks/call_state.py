"""What a thread has asked of a register layer, and what its running forward pass knows of itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..registers import Segment

__all__ = ["CallState", "MethodCall", "RecordPairs"]

#: Called with a block's index, keys and values ``(B, H, N, d)``.
RecordPairs = Callable[[int, torch.Tensor, torch.Tensor], None]


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


class CallState(threading.local):
    """What one thread has asked of a layer, and what its running forward pass needs to remember.

    Every thread has values of its own, so that passes in several threads do not see each other's. Plain attributes
    that are set in ``__init__``: the graph compiler guards those, as it would not guard a context variable in every
    supported torch.

    Attributes:
        images: Adapter of each image of the batches, ``"__base__"`` for none; ``None`` for the active adapters.
        without: Names of adapters that take no part.
        whole_attentions: Attention maps keep the columns of key/value pairs.
        record: Gets the keys and values of every block.
        segments: What takes part in the running pass; ``None`` outside of one.
        frame: Where that pass runs, as long as it does; ``None`` where nobody needs to ask.
        trains: The running pass has gradients, so that parts of it may be computed again.
        entered: Number of registers that were put into the sequence of the running pass.
        length: Number of other tokens in that sequence, as an eager hook saw it; 0: none has.
        left: They have come out again.
        method: The running method that is called past the tower's forward, if it counts registers.
        methods: Places of the running methods whose registers are cut out when they return.
        kept: ``without`` as it is after the pass of a replica, whose own was asked for by another thread.
        visible: ``(B, N)`` bool, what a register sees in the running block; ``None`` without a mask.
        rotary: Rotary tables as the blocks were given them, a number of registers, and the tables with rows for these.
    """

    def __init__(self) -> None:
        self.images: list[str] | None = None
        self.without: frozenset[str] = frozenset()
        self.whole_attentions: bool = False
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
