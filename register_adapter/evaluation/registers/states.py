"""Reading and replacing the registers' states at the input of blocks, whatever library the tower is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import UnsupportedModelError
from ...features.layout import TokenLayout, find_layout, tower_of
from ...features.threads import in_this_thread
from ...towers.anatomy import Anatomy
from ...towers.calls import first_of, hidden_states_of, with_hidden_states
from ...towers.tower import Tower
from ...tuner.composed import ComposedPeftModel
from ...tuner.hooks.choice import EVERYONE
from ...tuner.layer import RegisterLayer
from ...tuner.left_out import registers_left_out
from ...tuner.peft_model import RegisterPeftModel

__all__ = ["Kind", "Registers", "find_registers", "read_states", "replace_states", "without_adapters"]

Kind = Literal["adapter", "native"]


@dataclass(frozen=True)
class Registers:
    """Which registers of a model are looked at, and where they stand.

    Attributes:
        tower: The tower.
        layer: The adapters' layer, if there is one.
        kind: Registers of adapters, or those that the model was made with.
    """

    tower: Tower
    layer: RegisterLayer | None
    kind: Kind

    def layout(self, index: int) -> TokenLayout:
        """The layout of ``hidden_states[index]``."""
        return find_layout(self.tower, self.layer, index)

    def inside(self, block: int) -> TokenLayout:
        """The layout inside a block."""
        return self.layout(block + 1)

    def where(self, layout: TokenLayout) -> slice:
        """Their places in a sequence; those of adapters that start later are missing at the end."""
        if self.kind == "native":
            return slice(layout.num_cls, layout.num_cls + layout.num_native)
        return slice(layout.num_cls + layout.num_native, layout.first_patch)

    @property
    def count(self) -> int:
        """Number R of them behind the last block."""
        where = self.where(self.layout(self.num_blocks))
        return int(where.stop - where.start)

    def count_in(self, block: int) -> int:
        """Number of them inside a block."""
        where = self.where(self.inside(block))
        return int(where.stop - where.start)

    @property
    def num_blocks(self) -> int:
        """Number L of blocks."""
        return len(self.tower.part("blocks"))

    @property
    def names(self) -> tuple[str, ...]:
        """What to call them."""
        layout = self.layout(self.num_blocks)
        return layout.names[self.where(layout)]

    @property
    def deep(self) -> tuple[bool, ...]:
        """Of each, whether a fresh one takes its place at every block."""
        if self.kind == "native" or self.layer is None:
            return (False,) * self.count
        return tuple(adapter.placement.deep for adapter in self.layer.sequence for _ in range(adapter.count))


def find_registers(
    model: nn.Module, kind: Kind | None = None, target_modules: str | None = None, anatomy: Anatomy | None = None
) -> Registers:
    """The registers of a model.

    Args:
        model: The model.
        kind: Which; ``None`` takes those of active adapters, and native ones where there are none.
        target_modules: Name of the tower, where there are several and none has an adapter's registers.
        anatomy: Description of a model that the table does not have.

    Raises:
        UnsupportedModelError: There are none of that kind, or an adapter's are not tokens in the sequence (key_value).
        ValueError: ``kind`` is unknown.
    """
    if kind not in (None, "adapter", "native"):
        raise ValueError(f"kind must be 'adapter', 'native' or None, got {kind!r}")
    tower, layer = tower_of(model, target_modules, anatomy)
    if kind != "native" and layer is not None and any(adapter.placement.key_value for adapter in layer.segments):
        raise UnsupportedModelError(
            "registers of an adapter with key_value=True are keys and values in every block's attention, no tokens: "
            "they attend to nothing, have no state to replace, and are the same for every image. Analyse an "
            "adapter with registers in the sequence"
            + ("." if kind == "adapter" else ", or the model's own registers with kind='native'.")
        )
    for wanted in (kind,) if kind else ("adapter", "native"):
        registers = Registers(tower, layer, wanted)
        if registers.count:
            return registers
    raise UnsupportedModelError(
        f"{type(tower.module).__name__} has no {f'{kind} ' if kind else ''}registers to analyse: it was made with "
        f"{Registers(tower, layer, 'native').count}, and active adapters add "
        f"{Registers(tower, layer, 'adapter').count}. Add some with add_registers, or enable the adapter."
    )


@contextmanager
def read_states(registers: Registers, states: dict[int, torch.Tensor]) -> Iterator[None]:
    """Write the registers' states ``(B, R, D)`` into ``states``.

    Key ``i`` is the input of block ``i`` (behind whatever an adapter inserts there), key ``L`` the last block's output.
    Blocks without registers leave no entry.
    """

    def keep(index: int, hidden: torch.Tensor, layout: TokenLayout) -> None:
        where = registers.where(layout)
        if where.stop > where.start:
            states[index] = hidden[:, where]

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(index, hidden_states_of(args, kwargs), registers.inside(index))

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        last = registers.num_blocks
        keep(last, first_of(output), registers.layout(last))

    blocks: nn.ModuleList = registers.tower.part("blocks")
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            hook = partial(before, index)
            stack.callback(block.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True).remove)
        stack.callback(blocks[-1].register_forward_hook(in_this_thread(behind), prepend=True).remove)
        yield


@contextmanager
def replace_states(
    registers: Registers, values: Mapping[int, torch.Tensor], numbers: Iterable[int] | None = None
) -> Iterator[None]:
    """Replace registers at the input of blocks, behind whatever an adapter inserts there.

    Args:
        registers: The registers.
        values: By block, ``(B or 1, R, D)``.
        numbers: Which of the registers; ``None`` for all.
    """
    wanted = None if numbers is None else set(numbers)

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = hidden_states_of(args, kwargs).clone()
        where = registers.where(registers.inside(index))
        for number, place in enumerate(range(where.start, where.stop)):
            if wanted is None or number in wanted:
                hidden[:, place] = values[index][:, number].to(hidden)
        return with_hidden_states(args, kwargs, hidden)

    with ExitStack() as stack:
        for index, block in enumerate(registers.tower.part("blocks")):
            if index in values:
                hook = partial(before, index)
                stack.callback(block.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True).remove)
        yield


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The frozen base model inside, as under PEFT's ``disable_adapter``; every flag is as before afterwards.

    PEFT's own context sets ``requires_grad`` of all active adapters on its way out. Other threads keep the registers.
    """
    if isinstance(model, RegisterPeftModel | ComposedPeftModel):  # knows which threads are in, and leaves gradients
        with model.disable_adapter():
            yield
        return
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper) and not isinstance(layer, RegisterLayer)
    ]
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        with registers_left_out(model, [EVERYONE]):
            yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled
