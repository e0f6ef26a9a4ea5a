"""Reading what a vision transformer does inside: hidden states, attention maps, registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..towers.calls import first_of, hidden_states_of
from ..towers.tower import Tower, find_tower
from ..tuner.layer import find_register_layer
from .attention_maps import record_attention_maps
from .threads import in_this_thread

__all__ = ["Trace", "capture"]


class Trace:
    """What the last forward pass left behind; see :func:`capture`.

    Attributes:
        prefix: Number of tokens before the registers (CLS, distillation token, native registers).
        num_registers: Number R of the adapters' registers in the sequence as it leaves the last block, 0 without any.
    """

    def __init__(self, tower: Tower, num_registers: int) -> None:
        self.prefix = tower.prefix
        self.num_registers = num_registers
        self._tower = tower
        self._counts: dict[int, int] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._attentions: dict[int, torch.Tensor] = {}

    def __repr__(self) -> str:
        """How much was recorded, and of what shape."""
        hidden, maps = list(self._hidden.values()), list(self._attentions.values())
        states = f"{len(hidden)} hidden states {tuple(hidden[-1].shape)}" if hidden else "no hidden states"
        attentions = f"{len(maps)} attention maps {tuple(maps[-1].shape)}" if maps else "no attention maps"
        return f"<Trace: {states}, {attentions}, {self.prefix} tokens before {self.num_registers} registers>"

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...]:
        """``(B, prefix + R + patches, D)`` each: the input of the first block, then the output of every block.

        R is 0 up to the block where registers enter, see :meth:`num_registers_at`.
        All of them stand before the final LayerNorm; entry ``i + 1`` is the output of block ``i``.
        """
        return tuple(self._hidden[index] for index in sorted(self._hidden))

    @property
    def attentions(self) -> tuple[torch.Tensor, ...]:
        """``(B, H, N, N)`` each, N with registers, one entry a block; empty if not asked for."""
        return tuple(self._attentions[index] for index in sorted(self._attentions))

    @property
    def registers(self) -> torch.Tensor:
        """``(B, R, D)``: the registers as the model would return them, behind the same LayerNorm as its patch tokens.

        Raises:
            RuntimeError: No forward pass has been made inside the context.
        """
        if not self._hidden:
            raise RuntimeError("nothing captured yet: call the model inside `with capture(model) as trace:` first")
        cut = self._hidden[max(self._hidden)][:, self.prefix : self.prefix + self.num_registers]
        return self._tower.normed(cut)

    def num_registers_at(self, layer: int) -> int:
        """Number of the adapters' registers in ``hidden_states[layer]``."""
        return self._counts[sorted(self._hidden)[layer]]

    def patches(self, layer: int = -1) -> torch.Tensor:
        """``(B, patches, D)``: the patch tokens of ``hidden_states[layer]``, before the final LayerNorm."""
        return self.hidden_states[layer][:, self.prefix + self.num_registers_at(layer) :]


@contextmanager
def capture(model: nn.Module, hidden_states: bool = True, attentions: bool = True) -> Iterator[Trace]:
    """Record hidden states, attention maps and registers of every forward pass made inside the context.

    Works with and without registers. For attention maps the tower runs under the eager implementation inside the
    context; the implementation in use before, and every hook, are restored on the way out, also after an exception.
    A second forward pass overwrites the first. Passes of other threads, and of other coroutines, are not recorded.

    Args:
        model: A base model, or one with registers.
        hidden_states: Record hidden states (needed for ``trace.registers``).
        attentions: Record attention maps, which takes ``B * H * N * N`` floats per block.

    Yields:
        The :class:`Trace`.

    Raises:
        UnsupportedModelError: The model has no vision tower, or several.

    Example:
        >>> with capture(model) as trace:
        ...     model(pixel_values=pixel_values)
        >>> trace.registers.shape, len(trace.hidden_states), trace.attentions[0].shape
    """
    layer = find_register_layer(model)
    tower = layer.tower if layer is not None else find_tower(model)
    trace = Trace(tower, layer.num_active if layer is not None else 0)

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace.num_registers = layer.num_active if layer is not None else 0
        trace._attentions.clear()

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        trace._hidden.clear()
        keep(0, hidden_states_of(args, kwargs))

    def keep(index: int, hidden: torch.Tensor) -> None:
        trace._hidden[index] = hidden
        # Entry i is what block i - 1 returns; the first one is what enters block 0.
        trace._counts[index] = layer.count_at(max(index - 1, 0)) if layer is not None else 0

    def block(index: int, module: nn.Module, args: Any, output: Any) -> None:
        keep(index + 1, first_of(output))

    with ExitStack() as stack:
        blocks: nn.ModuleList = tower.part("blocks")
        stack.callback(tower.module.register_forward_pre_hook(in_this_thread(start), with_kwargs=True).remove)
        if hidden_states:
            stack.callback(blocks[0].register_forward_pre_hook(in_this_thread(first), with_kwargs=True).remove)
            for index, module in enumerate(blocks):
                stack.callback(module.register_forward_hook(in_this_thread(partial(block, index)), prepend=True).remove)
        if attentions:
            if layer is not None:
                stack.enter_context(layer.call.keeping_pairs())
            stack.enter_context(record_attention_maps(tower, trace._attentions.__setitem__))
        yield trace
