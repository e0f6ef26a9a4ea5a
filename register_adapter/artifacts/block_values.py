"""The values of a block's attention, handed on once the block is done, to those who saw its map before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..features.projections import keep_projection
from ..features.threads import in_this_thread
from ..towers.tower import Tower

__all__ = ["BlockValues"]

#: Called with the values ``(B, N, W)`` of a block.
Take = Callable[[torch.Tensor], None]


class BlockValues:
    """Values of all blocks of a tower, block by block; none is kept.

    Args:
        tower: The tower.

    Attributes:
        missing: Why there are none, ``""`` where there are.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.missing = ""
        self._waiting: dict[int, list[Take]] = {}

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Record values inside; where a block has none of a known name, say so and record nothing."""
        blocks: nn.ModuleList = self.tower.part("blocks")
        with ExitStack() as stack:
            try:
                with ExitStack() as hooks:
                    for index, block in enumerate(blocks):
                        values = hooks.enter_context(keep_projection(self.tower, index, "values"))
                        # Some attentions give their values only at their end, behind the map.
                        hook = in_this_thread(partial(self._after, index, values))
                        hooks.callback(block.register_forward_hook(hook, prepend=True).remove)
                    stack.push(hooks.pop_all())
            except UnsupportedModelError as error:
                self.missing = str(error)
            try:
                yield
            finally:
                self._waiting.clear()

    def hand(self, block: int, take: Take) -> None:
        """Call ``take`` with the values of a block once it is done, if there are any."""
        if not self.missing:
            self._waiting.setdefault(block, []).append(take)

    @torch.no_grad()
    def _after(self, block: int, values: list[torch.Tensor], module: nn.Module, args: Any, output: Any) -> None:
        waiting = self._waiting.pop(block, [])
        if not values:
            return
        (own,) = values
        values.clear()
        for take in waiting:
            take(own)
