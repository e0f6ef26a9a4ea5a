"""Which tokens of the sequence are CLS, registers and patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..towers.anatomy import Anatomy, resolve
from ..towers.tower import Tower, find_tower
from ..tuner.hooks.call_state import Outside
from ..tuner.layer import RegisterLayer, find_register_layer

__all__ = ["TokenLayout", "adapters_stay", "each_outside", "find_layout", "native_registers", "tower_of"]

_Item = TypeVar("_Item")

# Where towers say how many of their prefix tokens are registers; the last is a parameter (1, R, D).
_NATIVE = ("config.num_register_tokens", "config.num_registers", "num_register_tokens", "num_reg_tokens", "reg_token")


def tower_of(
    model: nn.Module, target_modules: str | None = None, anatomy: Anatomy | None = None
) -> tuple[Tower, RegisterLayer | None]:
    """The tower that has registers, or the only one, and its register layer if there is one.

    Args:
        model: With or without registers.
        target_modules: Name of the tower, where there are several and none has registers.
        anatomy: Description of a model that the table does not have.

    Raises:
        UnsupportedModelError: The model has no vision tower, or several and none has registers.
    """
    layer = find_register_layer(model)
    return (layer.tower, layer) if layer is not None else (find_tower(model, target_modules, anatomy), None)


def native_registers(tower: Tower) -> int:
    """Number of registers that the model was made with; they stand behind CLS and before the adapters' registers."""
    if tower.anatomy.native_registers is None:
        return 0
    registers = resolve(tower.module, _NATIVE)
    count = registers.shape[1] if isinstance(registers, torch.Tensor) else registers
    return min(int(count or 0), tower.prefix)


@dataclass(frozen=True)
class TokenLayout:
    """Order of the tokens at one layer: CLS and the like, native registers, adapters' registers, patches.

    Attributes:
        num_cls: Number of CLS and distillation tokens.
        num_native: Number of native registers.
        num_adapter: Number of the adapters' registers.
    """

    num_cls: int
    num_native: int
    num_adapter: int

    @property
    def first_patch(self) -> int:
        """Place of the first patch token."""
        return self.num_cls + self.num_native + self.num_adapter

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each token before the patches."""
        cls = ("CLS", *(f"CLS {number}" for number in range(2, self.num_cls + 1)))[: self.num_cls]
        native = tuple(f"native register {number}" for number in range(self.num_native))
        return (*cls, *native, *(f"register {number}" for number in range(self.num_adapter)))


def find_layout(tower: Tower, layer: RegisterLayer | None, index: int) -> TokenLayout:
    """The layout of ``hidden_states[index]``: 0 is the first block's input, ``i + 1`` the output of block ``i``."""
    native = native_registers(tower)
    return TokenLayout(tower.prefix - native, native, layer.count_at(max(index - 1, 0)) if layer is not None else 0)


def each_outside(items: Iterable[_Item], outside: Outside | None = None) -> Iterator[_Item]:
    """What a data set gives: what the model is read with, and by, is not for passes that the data set makes itself.

    Nor is what the data set switches on or off between its images for the reading.

    Args:
        items: The data set.
        outside: Where its code runs, without the hooks of a reading; ``None`` for what is outside of the first image.
    """
    outside = outside or Outside()
    with outside():
        given = iter(items)
    while True:
        with outside():
            try:
                item = next(given)
            except StopIteration:
                return
        yield item


def adapters_stay(layer: RegisterLayer | None) -> AbstractContextManager[None]:
    """Around a pass and what is read of it: the layout stays that of the pass, whatever other threads set meanwhile."""
    return layer.staying() if layer is not None else nullcontext()
