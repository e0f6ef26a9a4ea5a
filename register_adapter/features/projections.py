"""Recording the queries, keys and values that a block's attention is computed from, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from ..towers.anatomy import Paths, resolve
from ..towers.calls import hidden_states_of
from ..towers.tower import Tower
from .threads import in_this_thread

__all__ = ["PROJECTIONS", "Projection", "keep_projection", "output_map"]

Projection = Literal["queries", "keys", "values"]
#: What can be recorded, in the order in which a fused layer has them.
PROJECTIONS: tuple[Projection, ...] = ("queries", "keys", "values")

# Below a block's attention; the first form is below the block part of BEiT's kind in older versions.
_SEPARATE: dict[Projection, Paths] = {
    "queries": ("q_proj", "query", "attention.query"),
    "keys": ("k_proj", "key", "attention.key"),
    "values": ("v_proj", "value", "attention.value"),
}
_FUSED: Paths = ("qkv",)
# The layer behind the heads, below a block's attention, or below the block where the attention module has none.
_OUTPUT: Paths = ("o_proj", "out_proj", "projection_layer", "projection", "proj", "output")
_OUTPUT_OF_BLOCK: Paths = ("attention.output.dense",)
# Inputs of this size keep a bias from being rounded together with the weights in half precision.
_SCALE = 256.0


@contextmanager
def keep_projection(tower: Tower, block: int, what: Projection) -> Iterator[list[torch.Tensor]]:
    """A list with the queries, keys or values ``(B, N, D)`` of one block in the last forward pass.

    They are what the block's linear layer gives, all heads side by side, with its bias; before a norm over heads or a
    rotation by position, where the model has them.

    Args:
        tower: The tower.
        block: Index of the block.
        what: ``"queries"``, ``"keys"`` or ``"values"``.

    Raises:
        UnsupportedModelError: The block's attention has neither separate nor fused layers of a known name.
    """
    kept: list[torch.Tensor] = []
    part = tower.block_part(block, "attention")
    inner = getattr(part, "base_layer", part)  # an adapter's layer around it, which merges itself in during the pass
    with ExitStack() as stack:
        if isinstance(getattr(inner, "in_proj_weight", None), torch.Tensor):
            stack.enter_context(_packed(inner, what, kept))
        elif isinstance(layer := resolve(part, _SEPARATE[what]), nn.Module):
            stack.enter_context(_output(layer, kept, torch.clone))
        elif isinstance(layer := resolve(part, _FUSED), nn.Module):
            stack.enter_context(_fused(part, layer, what, kept))
        else:
            names = [] if part is None else [name for name, _ in part.named_children()]
            raise UnsupportedModelError(
                f"block {block} of {type(tower.module).__name__} has no layer for {what}: its attention has "
                f"{', '.join(names) or 'no layers'}, and {', '.join((*_SEPARATE[what], *_FUSED))} were looked for; "
                "use tokens"
            )
        yield kept


@contextmanager
def _output(layer: nn.Module, kept: list[torch.Tensor], part: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        kept[:] = [part(output)]

    handle = layer.register_forward_hook(in_this_thread(keep))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _fused(attention: nn.Module, layer: nn.Module, what: Projection, kept: list[torch.Tensor]) -> Iterator[None]:
    """A layer that gives queries, keys and values side by side."""
    place = PROJECTIONS.index(what)
    called: list[bool] = []

    def part(output: torch.Tensor) -> torch.Tensor:
        called[:] = [True]
        return output.chunk(3, dim=-1)[place].clone()  # EVA adds its biases in place

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        called.clear()
        kept[:] = [hidden_states_of(args, kwargs)]

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        bias = [getattr(module, name, None) for name in ("q_bias", "k_bias", "v_bias")][place]
        if not called:  # timm's EVA reads the weight without calling the layer
            weight: Any = layer.weight
            kept[:] = [F.linear(kept[0], weight.chunk(3)[place], bias)]
        elif bias is not None:
            kept[:] = [kept[0] + bias]

    with ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(in_this_thread(start), with_kwargs=True).remove)
        stack.enter_context(_output(layer, kept, part))
        stack.callback(attention.register_forward_hook(in_this_thread(stop)).remove)
        yield


@contextmanager
def _packed(attention: nn.Module, what: Projection, kept: list[torch.Tensor]) -> Iterator[None]:
    """``nn.MultiheadAttention`` and its like: the weights are one parameter, which no layer is called with."""
    place = PROJECTIONS.index(what)

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][: len(PROJECTIONS)]
        source = given[place] if isinstance(module, nn.MultiheadAttention) else given[0]
        bias = None if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[place]
        kept[:] = [F.linear(source, module.in_proj_weight.chunk(3)[place], bias)]

    handle = attention.register_forward_pre_hook(in_this_thread(keep), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def output_map(tower: Tower, block: int, like: torch.Tensor) -> torch.Tensor | None:
    """What the layer behind a block's heads makes of them: a linear map ``(H * d, D)``, float32, without its bias.

    It is asked, not read off a weight, so an adapter on the layer and quantised weights count. A norm between the heads
    and the layer, and a LayerScale behind it, do not.

    Args:
        tower: The tower.
        block: Index of the block.
        like: Of the dtype and on the device of the layer's inputs.

    Returns:
        The map, ``None`` where the layer has none of the known names.
    """
    part = tower.block_part(block, "attention")
    roots = ((getattr(part, "base_layer", part), _OUTPUT), (tower.part("blocks")[block], _OUTPUT_OF_BLOCK))
    layers: list[Any] = [resolve(root, paths) for root, paths in roots]
    layer = next((layer for layer in layers if isinstance(getattr(layer, "in_features", None), int)), None)
    if layer is None:
        return None
    width = layer.in_features
    inputs = torch.eye(width + 1, width, dtype=like.dtype, device=like.device) * _SCALE
    # Past the hooks on the layer, which belong to the model's own passes.
    outputs: torch.Tensor = layer.forward(inputs).float()
    return (outputs[:-1] - outputs[-1:]) / _SCALE
