"""Whether what an adapter does can be done: at single blocks of a tower as it is now, by heads of one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..registers import Placement
from .attention import attention_modules

if TYPE_CHECKING:
    from ...towers.tower import Tower

__all__ = ["misfit", "names_for_head"]


def names_for_head(head: ModulesToSaveWrapper, names: Iterable[str], mine: Collection[str]) -> list[str]:
    """Whose copy of a head each image of a batch goes through.

    Args:
        head: The head.
        names: An adapter's name an image.
        mine: Adapters of the method that the names are of; another method's copy that is at work stays so for images
            whose adapter has none.

    Raises:
        ValueError: They have different numbers of outputs.
    """
    copies: Any = dict(head.modules_to_save.items())
    active = [] if head.disable_adapters else head.active_adapters
    rest = next((name for name in active if name in copies and name not in mine), "__base__")
    chosen = [name if name in copies and name in mine else rest for name in names]
    used = {name: copies.get(name, head.original_module) for name in chosen}
    widths = {name: copy.out_features for name, copy in used.items() if isinstance(copy, nn.Linear)}
    if len({*widths.values()}) > 1:
        raise ValueError(
            f"adapter_names= mixes heads with different numbers of outputs ({widths}), which make no one tensor. Run "
            "one batch for each number."
        )
    return chosen


def misfit(
    tower: Tower, placement: Placement, attends: bool = False, neurons: Collection[int] = (), values: int | None = None
) -> str | None:
    """What keeps an adapter from working in the tower as it is, as a sentence; ``None`` if nothing does.

    Args:
        tower: The tower.
        placement: Of the adapter.
        attends: It has key/value pairs or gates.
        neurons: Blocks with register neurons.
        values: Number of blocks, from ``insert_layer`` on, that it has values for; ``None``: it has the same for all.
    """
    blocks = list(tower.part("blocks"))
    name, first, count = type(tower.module).__name__, placement.insert_layer, len(blocks)
    numbers = f"{name} has {count} block{'' if count == 1 else 's'} now (0 to {count - 1})"
    if first >= count:
        return f"registers enter at block {first}, and {numbers}"
    if values is not None and first + values < count:
        return f"the adapter has values for blocks {first} to {first + values - 1}, and {numbers}"
    if lost := [block for block in neurons if block >= count]:
        return f"the adapter has register neurons in block {lost[0]}, and {numbers}"
    if first or placement.deep or attends or neurons:
        for block, module in enumerate(blocks):
            if (before := _place_of(module, blocks)) < block:
                return f"blocks {before} and {block} of {name} are one module, and registers enter block by block"
    if attends and (sentence := _unfit_attention(tower, first, blocks)):
        return sentence
    parts: list[Any] = [tower.block_part(block, "mlp_out") for block in sorted(neurons)]
    for block, part in zip(sorted(neurons), parts, strict=True):
        if part is None:
            return (
                f"the adapter has register neurons in block {block} of {name}, now of class "
                f"{type(blocks[block]).__name__}, without an MLP at {tower.anatomy.mlp_out!r}"
            )
        if len({id(other) for other in parts}) < len(parts):
            return f"blocks of {name} share an MLP, and register neurons are those of one block"
    return None


def _unfit_attention(tower: Tower, first: int, blocks: list[Any]) -> str | None:
    seen: dict[int, int] = {}
    for block, module in enumerate(blocks):
        modules = list(attention_modules(tower, block))
        if block >= first and not modules:
            return (
                f"key/value pairs and gates need transformers' attention interface, and block {block} of "
                f"{type(tower.module).__name__}, of class {type(module).__name__}, does not go through it"
            )
        for attention in modules:
            if (before := seen.setdefault(id(attention), block)) < block:
                return (
                    f"blocks {before} and {block} of {type(tower.module).__name__} share one attention module, and "
                    "key/value pairs and gates are those of one block"
                )
    return None


def _place_of(module: Any, blocks: list[Any]) -> int:
    return next(place for place, other in enumerate(blocks) if other is module)
