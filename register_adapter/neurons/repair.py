"""How many outliers are left when so many neurons are shifted: the number is chosen by that, on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..artifacts.rules.threshold import Threshold
from ..data.batches import Batch
from ..features.threads import in_this_thread
from ..towers.calls import first_of
from ..towers.tower import Tower
from ..tuner.layer import RegisterLayer
from .scores import run_up_to
from .team import Team

__all__ = ["Repair", "order_by_block"]


def order_by_block(neurons: Sequence[Any]) -> tuple[dict[int, list[int]], torch.Tensor]:
    """Neurons in the order of rank, as a config has them, and the place of each rank in that order, ``(K,)`` int64."""
    blocks: dict[int, list[int]] = {}
    for neuron in neurons:
        blocks.setdefault(neuron.block, []).append(neuron.unit)
    blocks = {block: blocks[block] for block in sorted(blocks)}
    places = {
        (block, unit): place for place, (block, unit) in enumerate((b, u) for b, us in blocks.items() for u in us)
    }
    return blocks, torch.tensor([places[neuron.block, neuron.unit] for neuron in neurons])


class Repair:
    """Tries numbers of neurons on held-out images.

    All candidates are on the model; the strength of those that are not tried is 0, which leaves activations untouched.

    Args:
        layer: The registers, with all candidates.
        adapter_name: Name of the adapter.
        ranks: ``(K,)``: place of each candidate, the best first.
        held_out: For every view: its thresholds by layer, and this process's batches.
        team: The processes of the fit.
    """

    def __init__(
        self,
        layer: RegisterLayer,
        adapter_name: str,
        ranks: torch.Tensor,
        held_out: list[tuple[dict[int, Threshold], list[Batch]]],
        team: Team,
    ) -> None:
        self.layer, self.ranks, self.held_out, self.team = layer, ranks, held_out, team
        self.tokens = layer.tokens(adapter_name)
        #: Number of neurons to the share of patches that are still outliers, behind the block where they appear.
        self.curve: dict[int, float] = {}
        self._whole: dict[int, float] = {}
        #: Number of held-out patches, of the view that has fewest.
        self.patches = 0

    @property
    def most(self) -> int:
        """Number of candidates."""
        return len(self.ranks)

    def shift(self, number: int) -> None:
        """Have the best ``number`` candidates shifted, and no others."""
        strength = torch.zeros(self.most)
        strength[self.ranks[:number]] = 1.0
        self.tokens.strength.data.copy_(strength)

    def behind(self, number: int) -> float:
        """Share of outliers left behind the block where they appear, with the best ``number`` candidates shifted."""
        if number not in self.curve:
            self._look(number, whole=False)
        return self.curve[number]

    def left(self, number: int) -> float:
        """The same at the layer where it is largest, of all where outliers separate; takes a longer forward pass."""
        if number not in self._whole:
            self._look(number, whole=True)
        return self._whole[number]

    def _look(self, number: int, whole: bool) -> None:
        self.shift(number)
        first, largest = 0.0, 0.0
        for thresholds, batches in self.held_out:
            start = min(thresholds)
            shares, patches = self._shares(thresholds if whole else {start: thresholds[start]}, batches)
            first, largest = max(first, shares[start]), max(largest, *shares.values())
            self.patches = min(self.patches or patches, patches)
        self.curve[number] = first
        if whole:
            self._whole[number] = largest

    def _shares(self, thresholds: dict[int, Threshold], batches: list[Batch]) -> tuple[dict[int, float], int]:
        """Share of outlier patches at every layer of ``thresholds``, and the number of patches, over all processes."""
        parts = self.team.run(lambda: _counts(self.layer, thresholds, batches))
        patches = sum(seen for _, seen in parts)
        return {index: sum(counts[index] for counts, _ in parts) / max(patches, 1) for index in thresholds}, patches

    def choose(self, enough: float, scores: Sequence[float]) -> int:
        """The fewest candidates that leave at most ``enough`` of the outliers; else those that leave fewest.

        Fewer are taken if what they leave more may be chance. What is left behind the block where they appear decides,
        if it holds at the other layers too; else those do.

        Args:
            enough: Part of the outliers.
            scores: Of the candidates, the best first; the search begins where they fall off most steeply.
        """
        guess = _steepest(scores)
        # Whole passes, which say both: in the end they are needed for no candidate and for the number chosen.
        self.left(0)
        self.left(guess)
        number = self._fewest(self.behind, enough, guess)
        if self.left(number) <= self._goal(self.left, enough, number):
            return number
        return self._fewest(self.left, enough, guess)

    def _goal(self, left: Callable[[int], float], enough: float, number: int | None = None) -> float:
        """The share that may be left: a part of all, or what is not surely more than ``number`` candidates leave.

        With counts a and b it is if (a - b)² > 4 (a + b), two standard deviations of a difference of Poisson counts.
        At most a quarter of all: of a handful of outliers no number is surely more than another.
        """
        goal = enough * left(0)
        if number is None:
            return goal
        count = left(number) * self.patches
        more = (count + 2 + 2 * math.sqrt(1 + 2 * count)) / self.patches
        return max(goal, min(more, left(0) / 4))

    def _fewest(self, left: Callable[[int], float], enough: float, guess: int) -> int:
        """The fewest that reach the goal; where none do, the fewest that are not surely worse than the best."""
        number = self._search(left, self._goal(left, enough), guess)
        return self._search(left, self._goal(left, enough, number), guess)

    def _search(self, left: Callable[[int], float], goal: float, guess: int) -> int:
        """Doubles a guess until it is enough, then halves the step back; a guess that is right takes two looks."""
        low, high = 0, guess
        while left(high) > goal and high < self.most:
            low, high = high, min(2 * high, self.most)
        if left(high) > goal:
            tried = [1 << power for power in range(high.bit_length()) if 1 << power < high]
            return min([*tried, high], key=lambda number: (left(number), number))
        if high == guess:
            step = 1
            while high > step and left(high - step) <= goal:
                high, step = high - step, 2 * step
            low = max(high - step, 0)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle) <= goal else (middle, high)
        return high


def _steepest(scores: Sequence[float]) -> int:
    """How many come before the largest ratio of a score to the next one; scores near 0 are all the same."""
    least = 1e-3 * scores[0] + 1e-12
    ratios = [max(score, least) / max(after, least) for score, after in pairwise(scores)]
    return ratios.index(max(ratios)) + 1 if ratios else 1


@torch.no_grad()
def _counts(layer: RegisterLayer, thresholds: dict[int, Threshold], batches: list[Batch]) -> tuple[dict[int, int], int]:
    """Number of outlier patches at every layer of ``thresholds``, and of all patches."""
    tower: Tower = layer.tower
    counts: dict[int, Any] = dict.fromkeys(thresholds, 0)
    patches = 0

    def count(index: int, threshold: Threshold, module: nn.Module, args: Any, output: Any) -> None:
        hidden = first_of(output)
        tokens = hidden[:, tower.prefix + layer.count_at(index - 1) :]
        nonlocal patches
        patches += tokens.shape[0] * tokens.shape[1] if index == max(thresholds) else 0
        counts[index] = counts[index] + threshold.mask(tokens).sum()

    with ExitStack() as stack:
        blocks = tower.part("blocks")
        for index, threshold in thresholds.items():
            hook = partial(count, index, threshold)
            stack.callback(blocks[index - 1].register_forward_hook(in_this_thread(hook), prepend=True).remove)
        for batch in batches:
            run_up_to(tower, max(thresholds) - 1, batch)
    return {index: int(number) for index, number in counts.items()}, patches
