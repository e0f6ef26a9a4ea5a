"""Recording the attention maps of a vision tower, whatever library it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from ..towers.tower import Tower
from .eager import eager_in_this_thread
from .threads import in_this_thread

__all__ = ["record_attention_maps"]

#: Called with a block's index and its attention map ``(B, H, N, N)``.
OnMap = Callable[[int, torch.Tensor], None]


@contextmanager
def record_attention_maps(tower: Tower, on_map: OnMap) -> Iterator[None]:
    """Hand every attention map of this thread's forward passes to a function while the context lasts.

    Fused attention returns no maps: transformers' is eager in this thread's passes, that of other libraries is computed
    a second time. Passes of other threads use what was in use before.

    Args:
        tower: The tower.
        on_map: Called with a block's index and its map ``(B, H, N, N)``, block by block.

    Raises:
        UnsupportedModelError: A block has no attention module where the anatomy says, or, in the forward pass, one that
            computes its attention outside PyTorch (xformers).
    """
    parts = [tower.block_part(index, "attention") for index in range(len(tower.part("blocks")))]
    if None in parts:
        raise UnsupportedModelError(
            f"block {parts.index(None)} of {type(tower.module).__name__} has no attention at "
            f"{tower.anatomy.attention!r}; say in the Anatomy where it is, or capture with attentions=False"
        )
    with ExitStack() as stack:
        stack.enter_context(_RECORDERS[tower.anatomy.attention_maps](tower, parts, on_map))
        yield


@contextmanager
def _from_output(tower: Tower, parts: list[nn.Module], on_map: OnMap) -> Iterator[None]:
    """transformers: the second output under the eager implementation."""

    def ask(module: nn.Module, args: Any, kwargs: Any) -> Any:
        # Older models return a map only where the block asks for one.
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if "output_attentions" not in names:
            return None
        place = names.index("output_attentions")
        if place < len(args):
            return (*args[:place], True, *args[place + 1 :]), kwargs
        return args, {**kwargs, "output_attentions": True}

    def keep(index: int, module: nn.Module, args: Any, output: Any) -> None:
        # Between the output and the map there may be a position bias.
        maps = [value for value in output[1:] if isinstance(value, torch.Tensor) and value.ndim == 4]
        if not maps:
            raise UnsupportedModelError(
                f"{type(module).__name__} returns no attention map; load the model with attn_implementation='eager', "
                "or capture with attentions=False"
            )
        on_map(index, maps[-1])

    with ExitStack() as stack:
        stack.enter_context(eager_in_this_thread(tower))
        for index, part in enumerate(parts):
            stack.callback(part.register_forward_pre_hook(in_this_thread(ask), with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(in_this_thread(partial(keep, index))).remove)
        yield


@contextmanager
def _from_weights(tower: Tower, parts: list[nn.Module], on_map: OnMap) -> Iterator[None]:
    """``nn.MultiheadAttention``: its second output, if asked for it head by head."""
    if not all(isinstance(part, nn.MultiheadAttention) for part in parts):  # OpenCLIP has blocks with one of its own
        with _from_dropout(tower, parts, on_map):
            yield
        return

    def ask(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(index: int, module: nn.Module, args: Any, output: Any) -> None:
        on_map(index, output[1])

    with ExitStack() as stack:
        for index, part in enumerate(parts):
            stack.callback(part.register_forward_pre_hook(in_this_thread(ask), with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(in_this_thread(partial(keep, index))).remove)
        yield


@contextmanager
def _from_dropout(tower: Tower, parts: list[nn.Module], on_map: OnMap) -> Iterator[None]:
    """For timm and DINOv2's own code: what goes into the dropout on the attention, or comes out of fused attention."""
    seen: set[int] = set()

    def take(index: int, attention: torch.Tensor) -> None:
        seen.add(index)
        on_map(index, attention)

    def keep(index: int, module: nn.Module, args: Any) -> None:
        take(index, args[0])

    def check(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if index not in seen:
            raise UnsupportedModelError(
                f"{type(module).__name__} of block {index} computes its attention outside PyTorch, so there is no map "
                "to record (xformers? switch it off with XFORMERS_DISABLED=1); or capture with attentions=False"
            )

    with ExitStack() as stack:
        for index, part in enumerate(parts):
            watch = _FusedAttention(partial(take, index))
            stack.callback(part.register_forward_pre_hook(in_this_thread(watch.start)).remove)
            stack.callback(part.register_forward_hook(in_this_thread(watch.stop), always_call=True).remove)
            stack.callback(part.register_forward_hook(in_this_thread(partial(check, index))).remove)
            if isinstance(dropout := getattr(part, "attn_drop", None), nn.Module):
                stack.callback(dropout.register_forward_pre_hook(in_this_thread(partial(keep, index))).remove)
        yield


class _FusedAttention(TorchFunctionMode):
    """Computes the map that ``scaled_dot_product_attention`` does not return, between ``start`` and ``stop``."""

    def __init__(self, keep: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.keep = keep

    def start(self, module: nn.Module, args: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.keep(_map(*args, **kwargs))
        return func(*args, **kwargs)


def _map(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The softmax ``(B, H, N, N)`` inside ``scaled_dot_product_attention``, before dropout; its own arguments."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
    return logits.softmax(dim=-1)


_Recorder = Callable[[Tower, list[nn.Module], OnMap], AbstractContextManager[None]]
_RECORDERS: dict[str, _Recorder] = {"output": _from_output, "weights": _from_weights, "dropout": _from_dropout}
