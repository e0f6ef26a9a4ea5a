"""Which tokens of which layer are read from a pass, under the names that users know them by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, cast, get_args

import torch

from ...errors import UnsupportedModelError
from ...towers.tower import Tower
from ...tuner.layer import RegisterLayer
from ..grid import PatchGrid, patch_tokens, watch_patches
from ..layout import TokenLayout, find_layout
from ..passes import Batch, keep_layer, resolve_layer
from ..projections import PROJECTIONS, Projection, keep_projection

__all__ = ["KINDS", "Kind", "TokenReader", "kinds_of"]

Kind = Literal["patch", "mean", "cls", "registers", "keys", "queries", "values"]
#: What can be read of an image.
KINDS: tuple[Kind, ...] = get_args(Kind)


def kinds_of(what: str | Sequence[str]) -> tuple[Kind, ...]:
    """What is asked for, as a tuple, each kind once.

    Raises:
        ValueError: It is nothing, or there is no such kind.
        TypeError: It is neither a name nor a series of them.
    """
    if not isinstance(what, Iterable):
        raise TypeError(f"what={what!r}, expected one or some of {', '.join(KINDS)}")
    asked = (what,) if isinstance(what, str) else tuple(dict.fromkeys(what))
    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown or not asked:
        raise ValueError(f"what={unknown[0] if unknown else what!r}, expected some of {', '.join(KINDS)}")
    return cast("tuple[Kind, ...]", asked)


class TokenReader:
    """Reads tokens of one layer; see :class:`~register_adapter.features.passes.Consumer`.

    Args:
        tower: The tower.
        registers: Its register layer, if it has one.
        layer: Index into ``hidden_states``, may count from the end.
        kinds: What is read.
        norm: Tokens of the last layer go through the final LayerNorm, as where the model returns them.

    Attributes:
        tensors: Of the last batch, by kind: ``(B, P, D)`` patches, keys, queries or values, ``(B, R, D)`` registers,
            ``(B, D)`` CLS or mean; float32 on the CPU.
        grid: ``(h, w)`` of its patches; ``None`` where it is not known, or not asked for.

    Raises:
        ValueError: There is no such layer, it has no registers, or it is no block's that could have keys.
        UnsupportedModelError: The model has no CLS token.
    """

    def __init__(
        self, tower: Tower, registers: RegisterLayer | None, layer: int, kinds: Sequence[Kind], norm: bool = True
    ) -> None:
        self.tower, self.layer = tower, resolve_layer(tower, layer)
        self._registers, self._kinds = registers, tuple(kinds)
        self._norm = norm and self.layer == len(tower.part("blocks"))
        self._check(find_layout(tower, registers, self.layer))
        self._hidden: list[torch.Tensor] = []
        self._projected: dict[Projection, list[torch.Tensor]] = {}
        self._patches: PatchGrid | None = None
        self.tensors: dict[Kind, torch.Tensor] = {}
        self.grid: tuple[int, int] | None = None

    def _check(self, layout: TokenLayout) -> None:
        name = type(self.tower.module).__name__
        if "cls" in self._kinds and not layout.num_cls:
            raise UnsupportedModelError(f"{name} has no CLS token; what='mean' is the mean of its patch tokens")
        if "registers" in self._kinds and not layout.num_native + layout.num_adapter:
            adapters = self._registers.names if self._registers is not None else []
            why = (
                f"those of its adapters ({', '.join(adapters)}) enter at a later block, are key/value pairs and no "
                "tokens, or are not active"
                if adapters
                else "neither the model nor an adapter has any; add_registers gives it some"
            )
            raise ValueError(f"{name} has no registers at layer {self.layer}: {why}")
        projected = [kind for kind in self._kinds if kind in PROJECTIONS]
        if projected and not self.layer:
            blocks = len(self.tower.part("blocks"))
            raise ValueError(
                f"layer=0 is the input of the first block and has no {projected[0]}; those of block i are at layer "
                f"i + 1, from 1 to {blocks}"
            )

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Record what is needed of every forward pass inside the context."""
        with ExitStack() as stack:
            self._hidden = stack.enter_context(keep_layer(self.tower, self.layer))
            for what in PROJECTIONS:
                if what in self._kinds:
                    self._projected[what] = stack.enter_context(keep_projection(self.tower, self.layer - 1, what))
            self._patches = stack.enter_context(watch_patches(self.tower))
            yield

    def take(self, batch: Batch) -> None:
        """Read the tokens of the batch that went through the tower.

        Raises:
            UnsupportedModelError: Where the patches lie is not known, or images have several sequences each.
        """
        hidden = self._hidden[0]
        if len(hidden) != batch.size:
            raise UnsupportedModelError(
                f"{type(self.tower.module).__name__} makes {len(hidden)} sequences of {batch.size} images, so that "
                "features cannot be told apart by image"
            )
        layout = find_layout(self.tower, self._registers, self.layer)
        self.grid = None
        # Copied: a view would keep the whole sequence for as long as somebody keeps one token.
        self.tensors = {
            kind: self._read(kind, hidden, layout, batch).to("cpu", torch.float32, copy=True) for kind in self._kinds
        }

    def _read(self, kind: Kind, hidden: torch.Tensor, layout: TokenLayout, batch: Batch) -> torch.Tensor:
        if kind == "cls":
            norm = self.tower.part("final_norm") if self._norm else None
            token = hidden[:, :1]
            # Past the hooks on the norm, which belong to the model's own passes.
            return (token if norm is None else norm.forward(token))[:, 0]
        if kind == "registers":
            return self._normed(hidden[:, layout.num_cls : layout.first_patch])
        assert self._patches is not None
        whole = self._projected[kind][0] if kind in self._projected else hidden
        patches = whole[:, layout.first_patch :]
        if self._patches.seen(batch.size):  # otherwise a video, or patches that were cut before
            patches, self.grid = patch_tokens(self.tower, whole, layout, self._patches, batch.inputs)
        if kind in self._projected:
            return patches
        return self._normed(patches) if kind == "patch" else self._normed(patches).float().mean(1)

    def _normed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tower.normed(tokens) if self._norm else tokens
