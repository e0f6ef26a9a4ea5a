"""Tensor surgery on the sequence: insert tokens, cut them out of whatever a model returns, grow an attention mask."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional as F

__all__ = [
    "cut_tokens",
    "grow_bias",
    "grow_mask",
    "grow_rotary",
    "insert_tokens",
    "pad_tokens",
    "visible_to",
]


def insert_tokens(hidden_states: torch.Tensor, tokens: list[torch.Tensor], start: int) -> torch.Tensor:
    """``(B, N, D)`` with tokens ``(B, R_i, D)`` inserted at position ``start``."""
    return torch.cat([hidden_states[:, :start], *tokens, hidden_states[:, start:]], dim=1)


def pad_tokens(hidden_states: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """``(B, N, D)`` with ``count`` zero tokens at position ``start``."""
    zeros = hidden_states.new_zeros(hidden_states.shape[0], count, hidden_states.shape[2])
    return insert_tokens(hidden_states, [zeros], start)


def cut_tokens(value: Any, start: int, count: int, length: int, attentions: bool = True) -> Any:
    """Take ``count`` tokens at ``start`` out of everything that is ``length`` tokens long.

    Args:
        value: A tensor, or a tuple, list or ``ModelOutput`` of such; the latter is changed in place.
        start: Position of the first token to cut.
        count: Number of tokens to cut.
        length: Length of an uncut sequence; tensors of another length are left alone.
        attentions: Cut attention maps ``(B, H, N, N)`` too.

    Returns:
        The same structure: hidden states ``(B, length, D)`` become ``(B, length - count, D)``, attention maps lose rows
        and columns.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim == 3 and value.shape[1] == length:
            return torch.cat([value[:, :start], value[:, start + count :]], dim=1) if start else value[:, count:]
        if attentions and value.ndim == 4 and value.shape[2] == length and value.shape[3] == length:
            rows = torch.cat([value[:, :, :start], value[:, :, start + count :]], dim=2)
            return torch.cat([rows[..., :start], rows[..., start + count :]], dim=3)
        return value
    if isinstance(value, dict):
        for key, item in list(value.items()):
            cut = cut_tokens(item, start, count, length, attentions)
            # A ModelOutput is slow to assign to.
            if not isinstance(item, torch.Tensor) or cut is not item:
                value[key] = cut
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(cut_tokens(item, start, count, length, attentions) for item in value)
    return value


def grow_mask(mask: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Make room for ``count`` registers in an attention mask; every token may see them.

    A register sees what the token before it (CLS) sees, or the first token where there is none. A row that sees
    everything, or what any token sees, would let padding leak into valid tokens through the registers: rows of padding
    are often open, lest their softmax is one over nothing.

    Args:
        mask: ``(B, N)`` with 1 or ``True`` for valid tokens, or ``(B, 1 or H, 1 or Q, K)``, boolean or additive.
        start: Position of the first register.
        count: Number of registers.

    Raises:
        ValueError: The mask has another number of dimensions.
    """
    if mask.ndim == 2:
        return torch.cat([mask[:, :start], mask.new_ones(mask.shape[0], count), mask[:, start:]], dim=1)
    if mask.ndim != 4:
        raise ValueError(f"an attention mask must be (B, N) or (B, heads, Q, K), got shape {tuple(mask.shape)}")
    keys = F.pad(mask[..., :start], (0, count), value=float(mask.dtype == torch.bool))
    mask = torch.cat([keys, mask[..., start:]], dim=-1)
    if mask.shape[2] == 1:
        return mask
    row = mask[:, :, max(start - 1, 0)].unsqueeze(2).expand(-1, -1, count, -1)
    return torch.cat([mask[:, :, :start], row, mask[:, :, start:]], dim=2)


def visible_to(query: int, hidden_states: torch.Tensor, arguments: list[Any]) -> torch.Tensor | None:
    """Which tokens the one at position ``query`` sees, by the mask among a block's arguments.

    Args:
        query: Position of the token that looks.
        hidden_states: ``(B, N, D)``, the block's sequence.
        arguments: Those of the block's other arguments that may be masks: ``(B, N)``, or ``(B or 1, H or 1, N or 1,
            N)``, boolean or additive, or flex attention's.

    Returns:
        ``(B, N)`` bool, seen in any head; ``None`` without a mask.
    """
    batch, length = hidden_states.shape[:2]
    for value in arguments:
        if hasattr(value, "mask_mod"):
            images = torch.arange(batch, device=hidden_states.device)[:, None]
            keys = torch.arange(length, device=hidden_states.device)[None]
            zero = torch.zeros_like(keys)
            return cast(torch.Tensor, value.mask_mod(images, zero, zero + query, keys)).expand(batch, length)
        if not isinstance(value, torch.Tensor) or value.shape[-1:] != (length,):
            continue
        if value.ndim == 4:
            row = value[:, :, min(query, value.shape[2] - 1)]
            seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
            return seen.any(1).expand(batch, length)
        if value.ndim == 2 and value.shape[0] == batch:
            return value.bool()
    return None


def grow_rotary(tables: Any, start: int, count: int) -> Any:
    """Rotary tables with ``count`` rows that turn by no angle.

    Args:
        tables: ``(cos, sin)``, each ``(..., N, d)``, with a row for every token, or timm's ``(..., P, 2 d)``, sines
            before cosines, with rows for the tokens that stand behind position ``start`` alone.
        start: Position of the first register.
        count: Number of registers.
    """
    if isinstance(tables, torch.Tensor):
        width = tables.shape[-1] // 2
        rows = tables.new_zeros(*tables.shape[:-2], count, 2 * width)
        rows[..., width:] = 1.0
        return torch.cat([rows, tables], dim=-2)

    def grow(table: torch.Tensor, value: float) -> torch.Tensor:
        rows = table.new_full((*table.shape[:-2], count, table.shape[-1]), value)
        return torch.cat([table[..., :start, :], rows, table[..., start:, :]], dim=-2)

    cos, sin = tables
    return type(tables)([grow(cos, 1.0), grow(sin, 0.0)])


def grow_bias(bias: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """A relative position bias ``(..., N, N)`` with ``count`` rows and columns of zeros at ``start``.

    Registers have no position, so nothing is near or far for them.
    """
    columns = torch.cat([F.pad(bias[..., :start], (0, count)), bias[..., start:]], dim=-1)
    rows = F.pad(columns[..., :start, :], (0, 0, 0, count))
    return torch.cat([rows, columns[..., start:, :]], dim=-2)
