"""The hooks that shift register neurons' activations inside the blocks' MLPs, as methods of the tuner layer."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ...towers.calls import hidden_states_of
from .base import LayerHooks
from .tokens import visible_to

__all__ = ["NeuronHooks"]


class NeuronHooks(LayerHooks):
    """What a :class:`RegisterLayer` does inside MLPs; mixed into it."""

    def _neuron_hooks(self, blocks: set[int]) -> list[Any]:
        """Register the hooks for register neurons in ``blocks``; where a block has none, they do nothing.

        That block has them too: a graph of one without hooks would do for all, as torch's compiler sees it.
        """
        handles: list[Any] = []
        for block, module in enumerate(self.tower.part("blocks")) if blocks else ():
            last = self.tower.block_part(block, "mlp_out")
            if last is None:  # a pass with neurons here is refused
                continue
            handles.append(last.register_forward_pre_hook(partial(self._shift_hook, block)))
            if block in blocks:
                handles.append(module.register_forward_pre_hook(self._visible_hook, with_kwargs=True))
        return handles

    def _neuron_points(self) -> list[Any]:
        """As ``_hook_points``, for these hooks."""
        parts = self.tower.part("blocks")
        ends = [self.tower.block_part(block, "mlp_out") for block in range(len(parts))]
        return [*parts, *(end for end in ends if end is not None)]

    def _visible_hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._end_if_over()
        masks = [value for name, value in kwargs.items() if "mask" in name]
        visible = visible_to(self.prefix, hidden_states_of(args, kwargs), [*args[1:], *masks])
        # Only where it changes: an assignment is a mutation that a compiled graph has to keep.
        if visible is not self.call.visible:
            self.call.visible = visible

    def _shift_hook(self, block: int, module: nn.Module, args: Any) -> Any:
        activations = cast(torch.Tensor, args[0])
        start = self.prefix
        shifted = activations
        for segment in self.segments:
            present = not segment.placement.key_value and segment.placement.insert_layer <= block
            count = segment.count if present else 0
            shifted = segment.shift(shifted, block, start, count, self.call.visible)
            start += count
        return None if shifted is activations else (shifted, *args[1:])
