"""The dry run of an anatomy that a user described by hand: does it fit the model, and if not, what does not?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...towers.modes import evaluating
from ...towers.tower import Tower
from ..config import RegisterConfig
from ..layer import RegisterLayer

__all__ = ["check_anatomy"]

_BATCH = 2
#: What two anatomies of one tower must have in common: sizes, ways, places in the tower and in a block.
_VALUES = ("prefix", "hidden_size")
_FIELDS = ("insert_at", "remove_from", "rotary")
_PLACES = ("embeddings", "remove", "blocks", "position_bias", "positions_between")
_BLOCK_PLACES = ("attention", "mlp_out")


def check_anatomy(tower: Tower, config: RegisterConfig) -> None:
    """Run two blank images through a tower, without and with registers, and compare every shape.

    Nothing of the tower is changed: its mode, its statistics and torch's random state are as before.

    Args:
        tower: A tower with an anatomy described by hand.
        config: The config of the registers to come.

    Raises:
        UnsupportedModelError: The anatomy does not fit; the message says which part and what was found.
    """
    name = f"the anatomy {tower.anatomy.family!r} does not fit {type(tower.module).__name__}"
    layer = getattr(tower.module, "registers", None)
    if isinstance(layer, RegisterLayer):  # the first adapter on the tower was tried, and says where registers are
        _check_places(layer.tower, tower, name)
        return
    shape = _input_shape(tower, name)
    weight = next((weight for weight in tower.module.parameters() if weight.is_floating_point()), None)
    if weight is None or weight.is_meta:
        return
    pixels = torch.zeros(_BATCH, *shape, device=weight.device, dtype=weight.dtype)
    with evaluating(tower.module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the config come when the registers are really made
        seen: dict[str, tuple[int, ...]] = {}
        with _watched(tower, seen):
            expected = _shapes(
                _call(tower, pixels, f"{name}: it does not run on an input of shape {shape} (input_shape=)")
            )
        _check_sequence(tower, seen, name)
        actual = _shapes(_with_registers(tower, config, pixels, name))
    if actual != expected:
        raise UnsupportedModelError(
            f"{name}: with registers its outputs have the shapes {actual}, without {expected}. They must leave before "
            f"anything reads the sequence: 'remove' is {tower.anatomy.remove!r} ({tower.anatomy.remove_from})."
        )


def _check_places(used: Tower, given: Tower, name: str) -> None:
    """Another adapter's anatomy of a tower that has registers leads to the same places."""
    other = [field for field in _VALUES if getattr(used, field, None) != getattr(given, field, None)]
    other += [field for field in _FIELDS if getattr(used.anatomy, field) != getattr(given.anatomy, field)]
    other += [field for field in _PLACES if given.part(field) is not used.part(field)]
    blocks = range(len(given.part("blocks"))) if "blocks" not in other else ()
    other += [
        field
        for field in _BLOCK_PLACES
        if any(given.block_part(block, field) is not used.block_part(block, field) for block in blocks)
    ]
    if other:
        raise UnsupportedModelError(
            f"{name} as the registers that are there use it ({used.anatomy.family!r}): they differ in "
            f"{', '.join(other)}. Adapters on one tower share its hooks: give both the same anatomy."
        )


def _with_registers(tower: Tower, config: RegisterConfig, pixels: torch.Tensor, name: str) -> Any:
    layer: Any = RegisterLayer(tower)
    layer.update_layer("check_anatomy", config)
    layer.set_adapter(["check_anatomy"])
    layer.eval()
    try:
        layer.attach()
        return _call(tower, pixels, f"{name}: with {config.num_registers} registers in the sequence it does not run")
    finally:
        layer.detach()


def _call(tower: Tower, pixels: torch.Tensor, trouble: str) -> Any:
    try:
        return tower.module(pixels)
    except Exception as error:
        raise UnsupportedModelError(f"{trouble}: {type(error).__name__}: {error}") from error


def _input_shape(tower: Tower, name: str) -> tuple[int, ...]:
    """The anatomy's, or ``(C, H, W)`` of a square image with as many patches as there are position embeddings."""
    if tower.anatomy.input_shape is not None:
        return tower.anatomy.input_shape
    patches, positions = tower.part("patch_embedding"), tower.part("position_embedding")
    positions = getattr(positions, "weight", positions)
    if isinstance(patches, nn.Conv2d):
        side = 0
        if isinstance(positions, torch.Tensor):
            side = math.isqrt(max(positions.shape[-2] - tower.prefix, 0))
        elif tower.anatomy.position_embedding is None:  # none, so any size will do
            side = 4
        if side > 0:
            return (patches.in_channels, side * patches.kernel_size[0], side * patches.kernel_size[1])
    raise UnsupportedModelError(
        f"{name}, or cannot be tried: its patch embedding and position embeddings do not tell the size of an input. "
        "Give it: Anatomy(..., input_shape=(3, 224, 224))."
    )


@contextmanager
def _watched(tower: Tower, seen: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Note the shape of the sequence where registers enter, in every block, and where they leave, in this order."""

    def incoming(place: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[place] = _first_shape([*args, *kwargs.values()])

    def outgoing(place: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[place] = _first_shape(output)

    places: list[tuple[str, Any, bool]] = [
        ("embeddings", tower.part("embeddings"), tower.anatomy.insert_at == "input"),
        *((f"block {index}", block, True) for index, block in enumerate(tower.part("blocks"))),
        ("remove", tower.part("remove"), tower.anatomy.remove_from == "input"),
    ]
    with ExitStack() as stack:
        for place, module, before in places:
            handle = (
                module.register_forward_pre_hook(partial(incoming, place), with_kwargs=True)
                if before
                else module.register_forward_hook(partial(outgoing, place))
            )
            stack.callback(handle.remove)
        yield


def _first_shape(value: Any) -> tuple[int, ...]:
    """Shape of what the hooks take for the sequence: a tensor, or the first entry of a tuple or dictionary."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    first = next(iter(items), None)
    return tuple(first.shape) if isinstance(first, torch.Tensor) else ()


def _check_sequence(tower: Tower, seen: dict[str, tuple[int, ...]], name: str) -> None:
    places = ["embeddings", *(f"block {index}" for index in range(len(tower.part("blocks")))), "remove"]
    anatomy = tower.anatomy
    paths = {"embeddings": anatomy.embeddings, "remove": anatomy.remove}
    if unseen := [f"{place} ({paths[place]!r})" if place in paths else place for place in places if place not in seen]:
        raise UnsupportedModelError(f"{name}: a forward pass does not go through {', '.join(unseen)}")
    first = seen["embeddings"]
    if len(first) != 3 or first[0] != _BATCH or first[2] != tower.hidden_size or first[1] <= tower.prefix:
        turned = " It has the batch second; registers need it first." if first[1:2] == (_BATCH,) else ""
        raise UnsupportedModelError(
            f"{name}: at 'embeddings' ({anatomy.embeddings!r}, {anatomy.insert_at}) a sequence of shape (batch "
            f"{_BATCH}, more than {tower.prefix} tokens, {tower.hidden_size}) was expected, found {first}.{turned}"
        )
    if list(seen) != places:
        raise UnsupportedModelError(
            f"{name}: a forward pass comes to {', '.join(seen)} in this order; registers enter at 'embeddings' "
            f"({anatomy.embeddings!r}), go through every block, and leave at 'remove' ({anatomy.remove!r})"
        )
    if strange := {place: seen[place] for place in places if seen[place] != first}:
        raise UnsupportedModelError(
            f"{name}: the sequence has the shape {first} where registers enter, and another at {strange}; registers "
            "need one sequence of one width from the embeddings to the place where they leave"
        )


def _shapes(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return {key: _shapes(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_shapes(value) for value in output]
    return None
