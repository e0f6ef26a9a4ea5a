"""The same images with and without a change to the registers, and how far outputs move."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from ...features.finite import check_finite_features, subject_in_words
from ...features.passes import Batch, keep_layer, run_whole
from ..estimate import Estimate, mean_over_images
from .report import Ablation, Change
from .states import Registers, read_states, replace_states, without_adapters

__all__ = ["Arm", "Means", "Runs", "estimate_means"]

_States = dict[int, torch.Tensor]


class Means(NamedTuple):
    """What registers are on average.

    Attributes:
        states: By block, ``(1, R, D)`` float64.
        constancy: ``(L + 1, R)``, see :class:`~.register_report.RegisterReport`.
    """

    states: _States
    constancy: npt.NDArray[np.float32]


def estimate_means(registers: Registers, batches: Sequence[Batch], who: str = "the model") -> Means:
    """Mean states over all images, at the input of every block and behind the last.

    Raises:
        RegisterAdapterError: A state is not finite.
    """
    sums: _States = {}
    squares: _States = {}
    states: _States = {}
    with read_states(registers, states):
        for batch in batches:
            registers.tower.run(batch.inputs)
            for index, state in states.items():
                check_finite_features({"registers": state}, who, index)
                exact = state.double()
                sums[index] = sums.get(index, 0) + exact.sum(0, keepdim=True)
                squares[index] = squares.get(index, 0) + exact.square().sum(-1).sum(0)
    count = sum(batch.size for batch in batches)
    means = {index: total / count for index, total in sums.items()}
    constancy = np.full((registers.num_blocks + 1, registers.count), np.nan, dtype=np.float32)
    for index, mean in means.items():
        share = mean[0].square().sum(-1) / (squares[index] / count)
        constancy[index, : len(share)] = share.cpu().numpy()
    return Means(means, constancy)


class Arm(NamedTuple):
    """One ablation: its kind, and which registers are replaced at which blocks."""

    kind: str
    numbers: tuple[int, ...]
    blocks: tuple[int, ...]


class _Outputs(NamedTuple):
    """``(B, D)`` CLS, ``(B, P, D)`` patches, both behind the last block, before the final LayerNorm; ``(B,)`` hits."""

    cls: torch.Tensor | None
    patches: torch.Tensor
    hits: torch.Tensor | None


@dataclass
class _Comparison:
    """Figures of one arm, one entry an image."""

    figures: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, changed: _Outputs, clean: _Outputs) -> None:
        for name in ("cls", "patches"):
            new, old = getattr(changed, name), getattr(clean, name)
            if new is None:
                continue
            new, old = new.double(), old.double()
            moved = 1 - F.cosine_similarity(new, old, dim=-1)
            relative = (new - old).norm(dim=-1) / old.norm(dim=-1)
            self._put(name, moved.mean(1) if moved.ndim == 2 else moved)
            self._put(f"{name}_relative", relative.mean(1) if relative.ndim == 2 else relative)
        if changed.hits is not None and clean.hits is not None:
            self._put("hits", changed.hits.double())
            self._put("gained", changed.hits.double() - clean.hits.double())

    def _put(self, name: str, values: torch.Tensor) -> None:
        self.figures.setdefault(name, []).append(values.cpu())

    def get(self, name: str) -> Estimate | None:
        values = self.figures.get(name)
        return mean_over_images(torch.cat(values).numpy()) if values else None

    def change(self) -> Change:
        figures: dict[str, Any] = {
            name: self.get(name) for name in ("cls", "patches", "cls_relative", "patches_relative")
        }
        return Change(**figures)


class Runs:
    """All forward passes over the images that the report is of, batch by batch: clean, every arm, and the base.

    Args:
        model: In evaluation mode.
        registers: Its registers.
        means: What the mean ablation puts in their place.
        arms: The ablations.
        seed: Seed of the exchange between images.
    """

    def __init__(self, model: nn.Module, registers: Registers, means: Means, arms: Sequence[Arm], seed: int) -> None:
        self._model, self._registers, self._means, self._arms = model, registers, means, arms
        self._generator = torch.Generator().manual_seed(seed)
        self._compared = [_Comparison() for _ in arms]
        self._base = _Comparison()
        self._clean: list[torch.Tensor] = []
        self._similarity = torch.zeros(registers.count, registers.count, dtype=torch.float64)
        self._images = 0

    def add(self, batch: Batch) -> None:
        """Run one batch through all arms."""
        states: _States = {}
        with read_states(self._registers, states):
            clean = self._forward(batch)
        states = dict(states)
        outputs = F.normalize(states[self._registers.num_blocks].double(), dim=-1)
        self._similarity += (outputs @ outputs.transpose(1, 2)).sum(0).cpu()
        self._images += batch.size
        if clean.hits is not None:
            self._clean.append(clean.hits.double().cpu())
        donors = _derangement(batch.size, self._generator)
        for arm, compared in zip(self._arms, self._compared, strict=True):
            if arm.kind == "shuffle" and batch.size == 1:
                continue
            with self._ablated(arm, states, donors):
                compared.add(self._forward(batch), clean)
        if self._registers.kind == "adapter":
            with without_adapters(self._model):
                base = self._forward(batch)
            self._base.add(clean, base)

    def _forward(self, batch: Batch) -> _Outputs:
        tower, last = self._registers.tower, self._registers.num_blocks
        layout = self._registers.layout(last)
        hits = None
        with keep_layer(tower, last) as kept:
            if batch.labels is not None and (logits := run_whole(self._model, batch.inputs)) is not None:
                hits = logits.argmax(-1).cpu() == torch.from_numpy(batch.labels)
            if not kept:
                tower.run(batch.inputs)
        hidden = kept[0]
        check_finite_features({"hidden states": hidden}, subject_in_words(self._model), last)
        return _Outputs(hidden[:, 0] if layout.num_cls else None, hidden[:, layout.first_patch :], hits)

    def _ablated(self, arm: Arm, states: _States, donors: torch.Tensor) -> AbstractContextManager[None]:
        source = self._means.states if arm.kind == "mean" else states
        values = {block: source[block] for block in arm.blocks}
        if arm.kind == "shuffle":
            values = {block: state[donors.to(state.device)] for block, state in values.items()}
        return replace_states(self._registers, values, arm.numbers)

    def ablations(self) -> list[Ablation]:
        """One entry an arm."""
        return [
            Ablation(*arm, compared.change(), compared.get("hits"), compared.get("gained"))
            for arm, compared in zip(self._arms, self._compared, strict=True)
        ]

    def drift(self) -> Change | None:
        """Against the model without adapters; ``None`` for native registers."""
        return self._base.change() if self._base.figures else None

    def accuracy(self) -> Estimate | None:
        """With the registers as they are."""
        return mean_over_images(torch.cat(self._clean).numpy()) if self._clean else None

    def output_similarity(self) -> npt.NDArray[np.float32]:
        """``(R, R)`` cosine between registers behind the last block, mean over images."""
        similarity: npt.NDArray[np.float32] = (self._similarity / self._images).float().numpy()
        return similarity


def _derangement(count: int, generator: torch.Generator) -> torch.Tensor:
    """``(B,)``: for every image another one, each once; a random cycle through all of them."""
    order = torch.randperm(count, generator=generator)
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)
    return donors
