"""Masks that come with a sequence into which registers enter: room for them in whatever form the mask has."""

from __future__ import annotations

from typing import Any

import torch

from .tokens import grow_bias, grow_mask

__all__ = ["grow_block_mask", "grow_masks", "is_block_mask"]


def is_block_mask(mask: Any) -> bool:
    """Whether a mask is flex attention's: a function of two positions, and the blocks in which it is not empty."""
    return hasattr(mask, "mask_mod") and hasattr(mask, "seq_lengths")


def grow_block_mask(mask: Any, start: int, count: int, rows: bool = True) -> Any:
    """Make room for registers in flex attention's ``BlockMask``, as :func:`~.tokens.grow_mask` does in a tensor.

    Args:
        mask: For sequences of ``N`` tokens.
        start: Position of the first register.
        count: Number of registers.
        rows: Whether they are queries too, not keys alone.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # not in every release of torch

    inner, (queries, keys) = mask.mask_mod, mask.seq_lengths

    def behind(index: torch.Tensor) -> torch.Tensor:  # a register is where the token before it is
        return torch.where(index < start + count, index.clamp(max=max(start - 1, 0)), index - count)

    def grown(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        register = (key >= start) & (key < start + count)
        place = torch.where(key < start, key, behind(key))
        asking = torch.where(query < start, query, behind(query)) if rows else query
        seen: torch.Tensor = inner(batch, head, asking, place)
        return register | seen

    batch, heads = mask.kv_num_blocks.shape[:2]
    device = mask.kv_num_blocks.device
    length = queries + count if rows else queries
    return create_block_mask(grown, batch, heads, length, keys + count, device, mask.BLOCK_SIZE)


def grow_masks(args: Any, kwargs: Any, start: int, count: int, length: int) -> Any:
    """Make room for ``count`` registers in the masks and biases that come with a sequence, now ``length`` tokens."""

    def grow(value: Any, name: str = "") -> Any:
        if is_block_mask(value) and value.seq_lengths[1] == length - count:
            return grow_block_mask(value, start, count)
        if not isinstance(value, torch.Tensor) or value.shape[-1:] != (length - count,):
            return value
        if value.ndim > 2 and "bias" in name:
            return grow_bias(value, start, count)
        return grow_mask(value, start, count) if value.ndim == 4 or (value.ndim == 2 and name == mask) else value

    mask = "attention_mask"
    # Pix2Struct in transformers 4 hands (B, N) on, to its blocks as the first argument behind the sequence.
    second = mask if len(args) > 1 and getattr(args[1], "shape", ())[:1] == args[0].shape[:1] else ""
    grown = tuple(grow(value, "" if place else second) for place, value in enumerate(args[1:]))
    return (*args[:1], *grown), {name: grow(value, name) for name, value in kwargs.items()}
