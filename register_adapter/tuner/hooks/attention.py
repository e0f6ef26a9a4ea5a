"""Registers that live in the attention: key/value pairs, gates, and keys that some images of a batch do not have.

transformers looks its attention implementation up by name in the module's config. An :class:`AttentionConfig` stands in
for that config and names a function of ours, which adds the pairs or the bias and calls the implementation in use.
Hooks on the key and value projections could not do it: their output is viewed with the length of their input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .base import ATTACHING, LayerHooks
from .call_state import RecordPairs
from .masks import grow_block_mask, is_block_mask

if TYPE_CHECKING:
    from ...towers.tower import Tower

__all__ = [
    "AttentionConfig",
    "AttentionHooks",
    "attention_modules",
    "reads_implementation",
]

IMPLEMENTATION = "register_adapter"
#: Implementations that take an additive mask.
_MASKABLE = ("eager", "sdpa")


def reads_implementation(tower: Tower) -> bool:
    """Whether every block of a tower looks its attention implementation up, as transformers' newer models do."""
    blocks = range(len(tower.part("blocks")))
    return all(any(True for _ in attention_modules(tower, block)) for block in blocks)


def attention_modules(tower: Tower, block: int) -> Iterator[nn.Module]:
    """Modules of a block that look their attention implementation up."""
    attention: nn.Module | None = tower.block_part(block, "attention")
    for module in attention.modules() if attention is not None else ():
        source = sys.modules.get(type(module).__module__)
        if hasattr(module, "config") and hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            yield module


@cache
def _adds_mask(eager: Callable[..., Any]) -> bool:
    """Whether an eager implementation adds its mask to the logits: ViT's in transformers 4 multiplies maps by it."""
    stub: Any = nn.Identity()
    stub.num_key_value_groups = 1
    ones = torch.ones(1, 1, 1, 1, device="cpu")
    try:
        weights = eager(stub, ones, ones, ones, ones - 1, scaling=1.0, dropout=0.0)[1]
    except (AttributeError, TypeError):  # it reads more off its module, as none of those that multiply does
        return True
    return bool(weights.any())


def _additive(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention with a mask that is added, in the place of one that multiplies."""
    weights = (query @ key.transpose(-1, -2) * scaling + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionConfig:
    """The config of an attention module, but for the implementation it names.

    Args:
        config: The config.
        layer: The tuner layer of the tower.
        block: Index of the block.
        eager: The eager implementation of the module's family, which the table of implementations does not hold.
    """

    def __init__(self, config: Any, layer: AttentionHooks, block: int, eager: Callable[..., Any]) -> None:
        self.config, self.layer, self.block, self.eager = config, layer, block, eager
        self.adds_mask = _adds_mask(eager)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A process that unpickles a model has not attached any registers.
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)

    @property
    def _attn_implementation(self) -> str:
        return IMPLEMENTATION if self.layer.in_attention else self.implementation

    @property
    def implementation(self) -> str:
        """Name of the implementation in use."""
        return self.config._attn_implementation or "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # copying and unpickling ask before there is a config
            raise AttributeError(name)
        return getattr(self.config, name)


class AttentionHooks(LayerHooks):
    """What a :class:`RegisterLayer` does inside attention; mixed into it."""

    @property
    def in_attention(self) -> bool:
        """Whether the attention needs anything beyond the sequence."""
        self._end_if_over()
        asked = self.call.record is not None
        return asked or any(segment.placement.key_value or segment.biased for segment in self.segments)

    @contextmanager
    def recording_pairs(self, record: RecordPairs) -> Iterator[None]:
        """Have every block's index, keys and values ``(B, H, N, d)`` handed to ``record``, in this thread's passes."""
        self._enter_attention()
        before, self.call.record = self.call.record, record
        try:
            yield
        finally:
            self.call.record = before

    def _enter_attention(self) -> None:
        """Put the stand-in configs in place; once."""
        with ATTACHING:
            if self._configs:
                return
            ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
            for block in range(len(self.tower.part("blocks"))):
                for module in attention_modules(self.tower, block):
                    config: Any = module.config
                    if isinstance(config, AttentionConfig):
                        if config.layer is self:  # the module of two blocks
                            continue
                        config = config.config  # a copied block's, which belongs to a copy of this layer
                    eager = sys.modules[type(module).__module__].eager_attention_forward
                    self._configs.append((module, config))
                    stand_in: Any = AttentionConfig(config, self, block, eager)
                    module.config = stand_in
            # What is replaced later needs one too.
            self._hooked = [*self._hooked, *self._attention_points()]

    def _attention_points(self) -> list[Any]:
        """As ``_hook_points``, for the modules with stand-in configs."""
        blocks = range(len(self.tower.part("blocks")))
        parts = [self.tower.block_part(block, "attention") for block in blocks]
        return [part for part in parts if part is not None]

    def _leave_attention(self) -> None:
        for module, config in self._configs:
            module.config = config
        for module in self.tower.module.modules() if self._configs else ():
            config = vars(module).get("config")
            if isinstance(config, AttentionConfig) and config.layer is not self:  # a copied block's
                module.config = config.config
        self._configs = []

    def attend(
        self,
        block: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, Any, int]:
        """Keys and values with the pairs of ``block``, the mask to go with them, and the number of pairs.

        Args:
            block: Index of the block.
            query: ``(B, H, N, d)``.
            key: ``(B, H, N, d)``, registers in the sequence included.
            value: The same shape.
            mask: ``(B or 1, H or 1, N or 1, N)``, boolean or additive, or flex attention's.
        """
        if self.call.record is not None:
            self.call.record(block, key, value)
        here = [segment for segment in self.segments if segment.placement.insert_layer <= block]
        pairs = [segment for segment in here if segment.placement.key_value]
        length = key.shape[2]
        for segment in pairs:
            keys, values = segment.pairs(key, block)
            key, value = torch.cat([key, keys], dim=2), torch.cat([value, values], dim=2)
        added = key.shape[2] - length
        if added and is_block_mask(mask):
            mask = grow_block_mask(mask, length, added, rows=False)
        elif added and mask is not None:
            mask = F.pad(mask, (0, added), value=float(mask.dtype == torch.bool))
        if any(segment.biased for segment in here):
            tokens = [segment for segment in here if not segment.placement.key_value]
            bias = [segment.bias(query, block) for segment in tokens]
            bias.append(query.new_zeros(1, length - self.prefix - sum(segment.count for segment in tokens)))
            bias = [query.new_zeros(1, self.prefix), *bias, *(segment.bias(query, block) for segment in pairs)]
            batch = max(part.shape[0] for part in bias)
            row = torch.cat([part.expand(batch, -1) for part in bias], dim=1)[:, None, None]
            if mask is None:
                mask = row
            elif mask.dtype == torch.bool:
                mask = row.masked_fill(~mask, -torch.inf)
            else:
                mask = mask + row
        return key, value, mask, added


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The function behind :data:`IMPLEMENTATION`; arguments and result are those of any attention of transformers."""
    stand_in: Any = module.config
    layer: AttentionHooks = stand_in.layer
    name = stand_in.implementation
    padded = isinstance(attention_mask, torch.Tensor)
    if name not in _MASKABLE and (padded or any(segment.biased for segment in layer.segments)):
        raise ValueError(
            f"the attention implementation {name!r} takes no additive mask, which gates, adapter_names= with different "
            "numbers of registers, and key/value pairs beside a padding mask need; switch: "
            "model.set_attn_implementation('sdpa')"
        )
    multiplies = name == "eager" and not stand_in.adds_mask
    if multiplies and padded:
        raise ValueError(
            f"{type(module).__name__} multiplies its attention maps by a mask (head_mask), which cannot go with gates, "
            "key/value pairs and adapter_names= with different numbers of registers; leave the mask out"
        )
    key, value, mask, added = layer.attend(stand_in.block, query, key, value, attention_mask)
    inner = stand_in.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if multiplies and mask is not None:
        inner = _additive
    output, weights = inner(module, query, key, value, mask, **kwargs)
    cuts = layer._cuts_attentions and not layer.call.whole_attentions
    # What flex attention returns here is not a map.
    if added and cuts and weights is not None and weights.ndim == 4:
        weights = weights[..., :-added]
    return output, weights
