"""What attention maps say about each patch, and nothing else: no norm, no hidden state, no pixel.

Every map ``(B, H, N, N)`` is reduced as soon as its block has made it, so that a map never outlives the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...features.attention_maps import record_attention_maps
from ...features.grid import PatchGrid, watch_patches
from ...features.layout import adapters_stay, native_registers, tower_of
from ...features.passes import Batch, PassOptions, open_pass
from ...features.threads import in_this_thread

__all__ = ["KINDS", "AttentionFeatures", "attention_features", "reduce_map", "shape_of_attention"]

#: What is read from a patch's row (what it gives) and column (what it gets), in this order.
KINDS: tuple[str, ...] = ("from_patches", "from_cls", "to_itself", "to_prefix", "entropy")

# Added to an attention in units of the uniform one, before the logarithm: bfloat16 maps have many exact zeros.
_FLOOR = 1e-3


def reduce_map(attention: torch.Tensor, num_cls: int, first: int, patches: int) -> torch.Tensor:
    """Five values per patch and head from one attention map.

    Shares of attention are logarithms of multiples of the uniform share ``1 / N``, floored at 0.001: 0 is "as much as
    any other token".

    Args:
        attention: ``(B, H, N, N)``, rows are queries; more columns than rows (key/value pairs) do not count.
        num_cls: Number of tokens of the kind of CLS, the first ones. CLS itself is token 0.
        first: Place of the first patch; everything before it is CLS or a register.
        patches: Number P of patches.

    Returns:
        ``(B, P, H, K)`` float32, K by :data:`KINDS`: what a patch gets from the other patches (their mean), from CLS,
        what it gives to itself, to CLS and registers together, and the entropy of what it gives to the patches, in
        nats, less that of a uniform row. ``from_cls`` is missing without a CLS, ``to_prefix`` without any prefix.
    """
    maps = attention.float()
    uniform = maps.shape[-2]
    inside = maps[..., first : first + patches, first : first + patches]
    itself = inside.diagonal(dim1=-2, dim2=-1)
    values = [_log((inside.sum(-2) - itself) * (uniform / max(patches - 1, 1)))]
    if num_cls:
        values.append(_log(maps[..., 0, first : first + patches] * uniform))
    values.append(_log(itself * uniform))
    if first:
        values.append(_log(maps[..., first : first + patches, :first].sum(-1) * (uniform / first)))
    rows = inside / inside.sum(-1, keepdim=True).clamp_min(1e-12)
    values.append(torch.special.entr(rows).sum(-1) - math.log(patches))
    return torch.stack(values, -1).transpose(1, 2)


def _log(share: torch.Tensor) -> torch.Tensor:
    return (share.clamp_min(0) + _FLOOR).log()


def kinds_of(num_cls: int, first: int) -> tuple[str, ...]:
    """Names of what :func:`reduce_map` returns."""
    absent = {"from_cls": not num_cls, "to_prefix": not first}
    return tuple(kind for kind in KINDS if not absent.get(kind, False))


def shape_of_attention(model: nn.Module) -> tuple[int, tuple[str, ...]]:
    """Number of blocks of a model's vision tower, and the kinds of values that it has (of :data:`KINDS`).

    Raises:
        UnsupportedModelError: The model has no vision tower, or several and none has registers.
    """
    tower, layer = tower_of(model)
    blocks = len(tower.part("blocks"))
    num_cls = tower.prefix - native_registers(tower)
    # Registers that enter later: one kind for all blocks, or maps of different blocks could not stand side by side.
    with adapters_stay(layer):  # those that are read
        fewest = tower.prefix + (min(layer.count_at(block) for block in range(blocks)) if layer is not None else 0)
    return blocks, kinds_of(num_cls, fewest)


class _Reduced:
    """Takes maps in and keeps what they say."""

    def __init__(self, model: nn.Module) -> None:
        self.maps: dict[int, torch.Tensor] = {}
        self.tower, self.layer = tower_of(model)
        self.num_cls = self.tower.prefix - native_registers(self.tower)
        _, self.kinds = shape_of_attention(model)
        self.grid: tuple[int, int] = (0, 0)
        self.watched: PatchGrid | None = None
        self.inputs: Any = None

    def keep(self, block: int, attention: torch.Tensor) -> None:
        first = self.tower.prefix + (self.layer.count_at(block) if self.layer is not None else 0)
        if not self.maps and self.watched is not None:
            self.grid = self.watched.shape(len(attention), attention.shape[-2] - first, self.inputs)
        reduced = reduce_map(attention, self.num_cls, first, self.grid[0] * self.grid[1])
        if len(self.kinds) < reduced.shape[-1]:
            reduced = reduced[..., [kinds_of(self.num_cls, first).index(kind) for kind in self.kinds]]
        self.maps[block] = reduced


class AttentionFeatures:
    """Attention values of every patch, from the maps of each forward pass; a consumer of a pass over images.

    Args:
        model: A base model, or one with registers, whose patches lie on a grid.
        on_features: Gets ``(B, h, w, L, H, K)`` float32 on the model's device after each forward pass, for L blocks
            and H heads; see :func:`reduce_map` for K.
    """

    def __init__(self, model: nn.Module, on_features: Callable[[torch.Tensor], None]) -> None:
        self._maps, self._on_features = _Reduced(model), on_features

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Hooks that read and reduce the attention maps."""
        tower = self._maps.tower

        def start(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._maps.maps.clear()
            self._maps.inputs = dict(kwargs)

        handle = tower.module.register_forward_pre_hook(in_this_thread(start), with_kwargs=True)
        try:
            with watch_patches(tower) as grid, record_attention_maps(tower, self._maps.keep):
                self._maps.watched = grid
                yield
        finally:
            handle.remove()

    def take(self, batch: Batch) -> None:
        """Hand on what the maps of the last forward pass say.

        Raises:
            UnsupportedModelError: Blocks have different numbers of heads.
        """
        maps = self._maps.maps
        blocks = [maps[index].to(maps[0].device) for index in sorted(maps)]
        if len(shapes := {tuple(part.shape[2:]) for part in blocks}) != 1:
            raise UnsupportedModelError(
                f"blocks of {type(self._maps.tower.module).__name__} have different numbers of heads: (heads, kinds) "
                f"{sorted(shapes)}"
            )
        stacked = torch.stack(blocks, 2)
        self._on_features(stacked.view(len(stacked), *self._maps.grid, *stacked.shape[2:]))


def attention_features(
    model: nn.Module,
    images: Any,
    *,
    image_processor: Any = None,
    batch_size: int = 32,
    max_images: int | None = None,
    progress: bool = False,
) -> Iterator[torch.Tensor]:
    """Attention values of every patch, batch by batch.

    The model runs in evaluation mode and without gradients; its mode, its attention implementation, its hooks and
    torch's random state are restored after each batch, also after an exception.

    Args:
        model: A base model, or one with registers, whose patches lie on a grid.
        images: Images or batches, see :func:`register_adapter.artifacts.audit`.
        image_processor: As for the audit.
        batch_size: Images per batch; ready batches stay as they are.
        max_images: Use at most this many images, the first ones.
        progress: Show a bar.

    Yields:
        ``(B, h, w, L, H, K)`` float32 on the model's device, for L blocks and H heads; see :func:`reduce_map` for K.

    Raises:
        UnsupportedModelError: No vision tower, no attention maps, places of the patches are not known, or blocks with
            different numbers of heads.
        ValueError: No images, or no image processor.
    """
    options = PassOptions(
        image_processor=image_processor, batch_size=batch_size, max_images=max_images, progress=progress
    )
    opened = open_pass(model, images, options, title="reading attention")
    features: list[torch.Tensor] = []
    consumer = AttentionFeatures(model, features.append)
    with closing(opened):
        for batch in opened:
            with opened.attached(consumer):  # for this batch alone: callers run what they like before the next one
                opened.feed(batch, consumer)
            yield features.pop()
