"""The part of a tower that is frozen and comes first: what it says of an image is kept, and not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..towers.calls import hidden_states_of
from ..towers.tower import Tower
from ..tuner.layer import RegisterLayer

__all__ = ["check_prefix", "continued_from"]


def check_prefix(tower: Tower, layer: RegisterLayer | None, block: int) -> None:
    """Refuse to keep the sequence before a block if something that comes before it changes in training.

    Args:
        tower: The tower of the model that is trained.
        layer: Its register layer, if it has one.
        block: Index k of the first block that is run.

    Raises:
        ValueError: ``block`` is not 1 to the last one, registers enter or neurons are shifted before it, or a parameter
            before it is trained.
    """
    blocks: nn.ModuleList = tower.part("blocks")
    if not 0 < block < len(blocks):
        raise ValueError(f"the sequence can be kept before the blocks 1 to {len(blocks) - 1}, got {block}")
    late: list[nn.Module] = list(blocks[block:])
    if layer is not None:
        late.append(layer.register_adapter_tokens)
        first = min(min([layer.placements[name].insert_layer, *layer.tokens(name).slices]) for name in layer.names)
        if first < block:
            raise ValueError(
                f"registers take part from block {first} on, so that the sequence before block {block} changes with "
                f"them; train with --insert-layer {block}, or keep no prefix"
            )
    late += [part for part in tower.module.modules() if isinstance(part, AuxiliaryTrainingWrapper)]
    if tower.anatomy.final_norm is not None:
        late.append(tower.part("final_norm"))
    free = {id(parameter) for part in late for parameter in part.parameters()}
    moved = [name for name, value in tower.module.named_parameters() if value.requires_grad and id(value) not in free]
    if moved:
        raise ValueError(
            f"{moved[0]} is trained and comes before block {block}, so that the sequence there changes; keep no "
            "prefix, or let only later parts move"
        )


@contextmanager
def continued_from(tower: Tower, block: int, sequence: torch.Tensor) -> Iterator[None]:
    """Within the context, a forward pass of the tower begins at a block, with this sequence.

    The embedding layer still runs; the blocks in between are passed by.

    Args:
        tower: The tower.
        block: Index k of the first block that is run, at least 1.
        sequence: ``(B, N, D)``: what comes out of block k - 1 without registers.
    """
    blocks: nn.ModuleList = tower.part("blocks")
    with ExitStack() as stack:
        for index in range(block):
            replacement = sequence if index == block - 1 else None
            stack.enter_context(_passed_by(blocks[index], replacement))
        yield


@contextmanager
def _passed_by(block: Any, sequence: torch.Tensor | None) -> Iterator[None]:
    """A block gives back what came in, or this sequence in its dtype."""
    before: Callable[..., Any] | None = block.__dict__.get("forward")
    as_tuple = _returns_tuple(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = hidden_states_of(args, kwargs)
        result = hidden_states if sequence is None else sequence.to(hidden_states)
        return (result,) if as_tuple else result

    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _returns_tuple(block: nn.Module) -> bool:
    """Whether a block gives a tuple (transformers 4), by what it says of itself."""
    said = str(getattr(type(block).forward, "__annotations__", {}).get("return", ""))
    return "tuple" in said.lower()
