"""Attention that tokens receive, summed block by block while no map is kept.

It is summed twice: by the bin of a patch's norm, so that a line between norms can be drawn afterwards, and by the
attention itself, so that patches that draw it are seen also where no line can be drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .patch_sketch import Array, Edges
from .report import AttentionShares, GatheredAttention
from .rules.histogram import BINS, BINS_PER_OCTAVE, accumulator_dtype

#: Takes in the values ``(B, N, W)`` of a block.
Take = Callable[[torch.Tensor], None]

__all__ = ["TIMES_EVEN", "AttentionSketch", "Layout"]

#: A patch draws attention if it receives at least so many times what it would if all tokens received the same.
TIMES_EVEN = 5.0


@dataclass(frozen=True)
class Layout:
    """Where which tokens stand in a sequence: CLS and the like, registers, patches, and what may follow them.

    Attributes:
        cls: Number of tokens of the kind of CLS, the first ones.
        start: Position of the first patch; from ``cls`` to there are registers.
        patches: Number of patches.
    """

    cls: int
    start: int
    patches: int

    @property
    def end(self) -> int:
        """Position behind the last patch."""
        return self.start + self.patches


class AttentionSketch:
    """Sums over the attention maps of one block.

    Attributes:
        patches: ``(2, H, BINS)``: attention that the patches of a bin receive, of all queries (their mean) and of CLS.
        others: ``(2, H, 2)``: the same for CLS and for registers.
        drawing: ``(2, BINS)``: number of patches that do not draw attention and of those that do, by norm.
        drawn: ``(H,)``: attention that the latter receive, of all queries.
        values: ``(4, H)``: of patches that do not draw attention, the sum of log2 of their values' norms in a head, and
            their number; the same of those that do.
        num_images: Number of images.
        has_cls: Whether there is a CLS token to ask.
    """

    def __init__(self, device: torch.device, heads: int, has_cls: bool) -> None:
        exact = accumulator_dtype(device)
        self.patches = torch.zeros(2, heads, BINS, dtype=exact, device=device)
        self.others = torch.zeros(2, heads, 2, dtype=exact, device=device)
        self.drawing = torch.zeros(2, BINS, dtype=exact, device=device)
        self.drawn = torch.zeros(heads, dtype=exact, device=device)
        self.values = torch.zeros(4, heads, dtype=exact, device=device)
        self.num_images = 0
        self.has_cls = has_cls

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [self.patches, self.others, self.drawing, self.drawn, self.values]

    def merge(self, other: AttentionSketch) -> None:
        """Add what another one has taken in."""
        for own, theirs in zip(self.tensors(), other.tensors(), strict=True):
            own += theirs.to(own)
        self.num_images += other.num_images

    def add(self, attention: torch.Tensor, bins: torch.Tensor, layout: Layout, valid: torch.Tensor | None) -> Take:
        """Take in one map.

        Args:
            attention: ``(B, H, N, N)``, rows are queries; more columns (key/value pairs) do not count.
            bins: ``(B, P)`` int64, bins of the patches' norms where the block reads them.
            layout: Of the sequence in this block.
            valid: ``(B, P)`` float32, 0 for padding, which does not count as a query; ``None``: all count.

        Returns:
            What takes in the values ``(B, N, W)`` of the same block, all heads side by side.
        """
        batch, heads = attention.shape[:2]
        if valid is None:
            from_all = attention.mean(2, dtype=torch.float32)
        else:
            asked = torch.ones(batch, attention.shape[2], device=attention.device)
            asked[:, layout.start : layout.end] = valid
            asked = asked / asked.sum(1, keepdim=True)
            from_all = torch.einsum("bhqk,bq->bhk", attention.float(), asked)
        from_cls = attention[:, :, 0].float() if self.has_cls else torch.zeros_like(from_all)
        received = torch.stack([from_all, from_cls]).to(self.patches.dtype)
        patches = received[..., layout.start : layout.end]
        index = bins.flatten().expand(2, heads, -1)
        self.patches.scatter_add_(2, index, patches.transpose(1, 2).flatten(2))
        parts = (received[..., : layout.cls], received[..., layout.cls : layout.start])
        self.others += torch.stack([part.sum((1, 3)) for part in parts], dim=-1)
        self.num_images += batch
        return self._add_drawing(from_all[..., layout.start : layout.end], bins, attention.shape[2], valid, layout)

    def _add_drawing(
        self, received: torch.Tensor, bins: torch.Tensor, tokens: int, valid: torch.Tensor | None, layout: Layout
    ) -> Take:
        """Take in what each patch receives in each head, ``(B, H, P)``, in sequences of so many tokens."""
        mean = received.mean(1)
        weights = torch.ones_like(mean) if valid is None else valid.to(mean)
        real = tokens - (1 - weights).sum(1, keepdim=True)
        draws = (mean * real >= TIMES_EVEN).to(mean.dtype)
        groups = torch.stack([weights * (1 - draws), weights * draws])
        self.drawing.scatter_add_(1, bins.flatten().expand(2, -1), groups.flatten(1).to(self.drawing))
        self.drawn += (received * draws[:, None]).sum((0, 2)).to(self.drawn)

        def take(values: torch.Tensor) -> None:
            heads = received.shape[1]
            if values.shape[:2] != (len(received), tokens) or values.shape[2] % heads:
                return
            own = values[:, layout.start : layout.end].float()
            logs = (
                torch.linalg.vector_norm(own.reshape(*own.shape[:2], heads, -1), dim=-1)
                .clamp_min(torch.finfo(torch.float32).tiny)
                .log2()
            )
            sums = torch.einsum("gbp,bph->gh", groups, logs)
            number = groups.sum((1, 2))[:, None].expand_as(sums)
            self.values += torch.stack([sums, number], 1).flatten(0, 1).to(self.values)

        return take

    def by_norm(self) -> tuple[Array, Array]:
        """``(BINS,)`` each: number of patches that do not draw attention, and of those that do, by norm."""
        usual, drawing = self.drawing.cpu().double().numpy()
        return usual, drawing

    def gathered(self) -> GatheredAttention:
        """The patches that draw attention, how much, and how large their norms and values are."""
        by_bin, drawn = self.drawing.cpu().double(), self.drawn.cpu().double()
        (usual, number) = by_bin.sum(1).tolist()
        norms = values = None
        if number and usual:
            low, high = (by_bin @ torch.arange(BINS).double() / by_bin.sum(1)).tolist()
            norms = 2 ** ((high - low) / BINS_PER_OCTAVE)
            low_sum, lows, high_sum, highs = self.values.cpu().double()
            if lows.min() and highs.min():
                ratios = high_sum / highs - low_sum / lows
                values = 2 ** float((ratios * drawn).sum() / drawn.sum())
        attention = float(drawn.mean()) / max(self.num_images, 1)
        return GatheredAttention(number / max(number + usual, 1), attention, norms, values)

    def shares(self, edges: Edges) -> AttentionShares:
        """Share of the attention by kind of token, for one threshold."""
        number = max(self.num_images, 1)
        patches = self.patches.cpu().double().numpy() / number
        others = self.others.cpu().double().numpy() / number
        outlying = edges.outlying
        both = [
            {
                "outlier": patches[row][:, outlying].sum(-1).tolist(),
                "other": patches[row][:, ~outlying].sum(-1).tolist(),
                "cls": others[row, :, 0].tolist(),
                "register": others[row, :, 1].tolist(),
            }
            for row in range(2)
        ]
        return AttentionShares(both[0], both[1] if self.has_cls else None)
