"""Attention sinks, summed block by block by the bin of a patch's norm, while no map and no value is kept."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import UnsupportedModelError
from ..features.projections import output_map
from .attention_sketch import TIMES_EVEN, Layout
from .block_values import BlockValues
from .patch_sketch import Edges
from .rules.histogram import BINS, accumulator_dtype
from .sink_report import BROADCAST, GIVEN, LOW_RANK, NO_OP, HeadSinks, Sinks, head_kind

__all__ = ["SinkRecorder", "SinkSketch"]

# What is summed of every sink: 1, its attention, log2 of its value ratio, the stable rank, whether it is of a kind.
_FIGURES = 6
# 90 % of the queries, as whole numbers, so that 9 of 10 are enough.
_OF_TEN = 9
# 75 %, for several tokens together.
_OF_FOUR = 3
# Ratios are kept finite: a value may be exactly zero.
_RATIOS = (2.0**-20, 2.0**20)


class SinkSketch:
    """Sums over the sinks of one block; what a sink is and all its figures: see ``SINK_DEFINITION``.

    Attributes:
        patches: ``(6, H, BINS)``: of the sinks that are patches with norms of a bin, their number, and the sums of
            the attention that they receive, of log2 of their value ratio, of the stable rank of the head's update in
            their image, and the numbers of those that are no-op and that are broadcast.
        others: ``(6, H, 2)``: the same for CLS and for registers.
        ranks: ``(H,)`` sum over all images of the stable rank of a head's update.
        num_images: Number of images.
        projected: Whether the output projection was known.
    """

    def __init__(self, device: torch.device, heads: int) -> None:
        exact = accumulator_dtype(device)
        self.patches = torch.zeros(_FIGURES, heads, BINS, dtype=exact, device=device)
        self.others = torch.zeros(_FIGURES, heads, 2, dtype=exact, device=device)
        self.ranks = torch.zeros(heads, dtype=exact, device=device)
        self.num_images = 0
        self.projected = True

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [self.patches, self.others, self.ranks]

    def merge(self, other: SinkSketch) -> None:
        """Add what another one has taken in."""
        for own, theirs in zip(self.tensors(), other.tensors(), strict=True):
            own += theirs.to(own)
        self.num_images += other.num_images
        self.projected &= other.projected

    def add(
        self,
        attention: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor | None,
        bins: torch.Tensor,
        layout: Layout,
        valid: torch.Tensor | None,
    ) -> None:
        """Take in one batch.

        Args:
            attention: ``(B, H, N, N)``, rows are queries; more columns (key/value pairs) do not count.
            values: ``(B, N, W)``, all heads side by side; several heads may share theirs.
            output: ``(H * d, D)``, the layer behind the heads; ``None``: values are taken as they are.
            bins: ``(B, P)`` int64, bins of the patches' norms where the block reads them.
            layout: Of the sequence in this block; tokens behind the patches are queries, and sinks of no kind.
            valid: ``(B, P)`` float32, 0 for padding, which is neither query nor sink; ``None``: all count.
        """
        batch, heads, tokens = attention.shape[:3]
        attention = attention[..., :tokens].float()
        real = torch.ones(batch, tokens, dtype=torch.bool, device=attention.device)
        if valid is not None:
            real[:, layout.start : layout.end] = valid > 0
        asked = real[:, None, :, None]
        received = torch.where(asked, attention, 0).sum(2) / real.sum(1)[:, None, None]
        sinks = _sinks_of(attention, received, real)
        written = _written(values, heads, output)
        ratio = _ratio(torch.linalg.vector_norm(written, dim=-1), sinks, real[:, None])
        rank = _stable_rank(torch.where(asked, attention @ written, 0))
        ranks = rank[..., None].expand_as(ratio)
        broadcast = (ratio >= BROADCAST) & (ranks <= LOW_RANK)
        no_op = (ratio <= NO_OP).float()
        each = torch.stack([torch.ones_like(ratio), received, ratio.log2(), ranks, no_op, broadcast.float()])
        figures = torch.where(sinks, each, 0).to(self.patches.dtype)
        index = bins.flatten().expand(_FIGURES, heads, -1)
        self.patches.scatter_add_(2, index, figures[..., layout.start : layout.end].transpose(1, 2).flatten(2))
        parts = (figures[..., : layout.cls], figures[..., layout.cls : layout.start])
        self.others += torch.stack([part.sum((1, 3)) for part in parts], dim=-1)
        self.ranks += rank.sum(0).to(self.ranks)
        self.num_images += batch
        self.projected &= output is not None

    def heads(self, block: int, edges: Edges) -> list[HeadSinks]:
        """Every head of this block, for one threshold."""
        patches, others, ranks = (tensor.cpu().double().numpy() for tensor in self.tensors())
        outlying = edges.outlying
        by_token = {
            "cls": others[..., 0],
            "register": others[..., 1],
            "outlier": patches[..., outlying].sum(-1),
            "other": patches[..., ~outlying].sum(-1),
        }
        images = max(self.num_images, 1)
        made = []
        for head, rank in enumerate(ranks):
            tokens = {token: _sinks(sums[:, head], images) for token, sums in by_token.items() if sums[0, head]}
            made.append(HeadSinks(block, head, head_kind(tokens), float(rank) / images, tokens))
        return made


def _sinks(sums: np.ndarray[tuple[int, ...], np.dtype[np.float64]], images: int) -> Sinks:
    number, *rest = sums.tolist()
    attention, ratio, rank, no_op, broadcast = (value / number for value in rest)
    return Sinks(round(number), number / images, attention, 2**ratio, rank, no_op, broadcast)


def _sinks_of(attention: torch.Tensor, received: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``(B, H, N)`` bool: which tokens are sinks, or share in being one.

    Args:
        attention: ``(B, H, N, N)``.
        received: ``(B, H, N)``, mean over queries.
        real: ``(B, N)`` bool, which tokens are no padding.
    """
    number = real.sum(1)[:, None, None]
    asked = real[:, None]
    # A token that nearly all queries give so much is a sink alone, whatever it receives in other heads.
    alone = (10 * ((attention >= GIVEN) & asked[..., None]).sum(2) >= _OF_TEN * number) & asked
    mean = received.mean(1, keepdim=True)
    gathering = (mean * number >= TIMES_EVEN) & asked
    most = torch.where(gathering, mean, 0).sum(2, keepdim=True) >= GIVEN
    draws = gathering & most & (received * number >= TIMES_EVEN)
    given = (attention @ draws[..., None].to(attention.dtype))[..., 0] >= GIVEN
    together = 4 * (given & asked).sum(2, keepdim=True) >= _OF_FOUR * number
    return alone | (draws & together)


def _written(values: torch.Tensor, heads: int, output: torch.Tensor | None) -> torch.Tensor:
    """``(B, H, N, d)`` with the norms and products of what each head writes of each token, ``(B, H, N, D)``."""
    width = values.shape[-1] // heads if output is None else output.shape[0] // heads
    own = values.float().reshape(*values.shape[:2], -1, width).transpose(1, 2)
    own = own.repeat_interleave(heads // own.shape[1], dim=1)
    if output is None:
        return own
    # v W = v Rᵀ Qᵀ for Wᵀ = Q R, and Q keeps all norms and singular values.
    triangular = torch.linalg.qr(output.float().reshape(heads, width, -1).mT, mode="r").R
    written: torch.Tensor = own @ triangular.mT
    return written


def _ratio(norms: torch.Tensor, sinks: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``(B, H, N)``: norms over the (lower) median of those of real tokens that are no sinks."""
    usual = norms.masked_fill(sinks | ~real, torch.nan).nanmedian(-1, keepdim=True).values
    ratio = norms / usual.clamp_min(torch.finfo(norms.dtype).tiny)
    return ratio.nan_to_num(1.0).clamp(*_RATIOS)


def _stable_rank(updates: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius over squared spectral norm of ``(..., N, d)``; 0 where there is nothing but zeros."""
    size = torch.linalg.matrix_norm(updates, keepdim=True)
    updates = updates / size.clamp_min(torch.finfo(size.dtype).tiny)
    # Not finite values are refused, with the layer's name, once the pass is over.
    gram = (updates.mT @ updates).nan_to_num(0.0, 0.0, 0.0)
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    return torch.where(size[..., 0, 0] > 0, 1 / largest.clamp_min(0.5 / updates.shape[-1]), 0)


class SinkRecorder:
    """Sums the sinks of all blocks of a tower during its forward passes.

    Args:
        values: Hands on the values of its blocks.

    Attributes:
        sketches: By block.
        missing: Why there are none, ``""`` where there are.
    """

    def __init__(self, values: BlockValues) -> None:
        self.sketches: dict[int, SinkSketch] = {}
        self.missing = ""
        self._values = values

    def see(
        self, block: int, attention: torch.Tensor, bins: torch.Tensor, layout: Layout, valid: torch.Tensor | None
    ) -> None:
        """Keep a block's map until the block is done; see :meth:`SinkSketch.add`."""
        self.missing = self.missing or self._values.missing

        def take(values: torch.Tensor) -> None:
            tower = self._values.tower
            if values.shape[:2] != (attention.shape[0], attention.shape[2]):
                raise UnsupportedModelError(
                    f"block {block} of {type(tower.module).__name__} has values {tuple(values.shape)} for attention "
                    f"maps {tuple(attention.shape)}: they are not of the same tokens; audit it without sinks"
                )
            if block not in self.sketches:
                self.sketches[block] = SinkSketch(attention.device, attention.shape[1])
            projection = output_map(tower, block, values)
            self.sketches[block].add(attention, values, projection, bins, layout, valid)

        self._values.hand(block, take)
