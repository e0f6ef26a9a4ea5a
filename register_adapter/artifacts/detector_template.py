"""What the most surprising patches have in common: the second step of a detector, still without a label.

Corners of objects surprise too, each in its own way. Artifacts all do the same, so their surprises point in one
direction. That direction is found as in self-training: take the most surprising patches, average them, rank all patches
by how far they go that way, and repeat. Which patches surprise most can be asked in many ways, over all attention or
that of one block or one kind; every answer is a start. A direction is kept only if patches then fall into two kinds by
a rule, and do so on pictures held out as well; on a model without artifacts they do not, wherever the start is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from .detector import AttentionDetector, along
from .rules import Rule, apply_rule

__all__ = ["fit_template"]

#: How many artifacts there are is not known. An average over few patches, the purest, is the start, and it grows:
#: shares of the patches, and the least number of them.
SHARES, LEAST = (0.003, 0.006, 0.01, 0.02, 0.04), 20
#: The shares that are begun with, and how often patches are chosen anew at each.
STARTS, ROUNDS = (0.003, 0.01, 0.02), 2
# Patches a value, at least: in fewer a direction that separates some of them is always found. And patches, at most.
_PATCHES_A_VALUE, _MAX_PATCHES = 10, 60_000
# Pictures at a time.
_CHUNK = 32
# Median absolute deviation of a normal distribution, in units of its standard deviation.
_NORMAL = 1.4826


@torch.no_grad()
def fit_template(
    detector: AttentionDetector, features: torch.Tensor, held_out: torch.Tensor, rule: str | Rule = "auto"
) -> bool:
    """Give a detector its template, or none.

    Args:
        detector: A trained one; its ``template`` and ``typical`` are changed in place.
        features: ``(M, h, w, L, H, K)`` attention values of the pictures that it was trained on; ten patches for each
            of the L · H · K values, or there will be no template.
        held_out: The same of other pictures, ``(M', h, w, L, H, K)``.
        rule: Says whether there are two kinds of patches; a name out of
            :data:`register_adapter.artifacts.rules.RULES`, or such a function.

    Returns:
        Whether there is a template.
    """
    detector.template.zero_()
    detector.typical.zero_()
    if features.shape[:3].numel() < _PATCHES_A_VALUE * detector.config.channels:
        return False
    surprises, others = _surprises(detector, features), _surprises(detector, held_out)
    values, checked = _values(detector, surprises), _values(detector, others)
    best: _Direction | None = None
    for ranking, start in product(_rankings(surprises), STARTS):
        current = ranking
        for share in [share for share in SHARES if share >= start]:
            count = min(max(round(share * len(values)), LEAST), len(values) - 1)
            for _ in range(ROUNDS):
                chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
                chosen[current.topk(count).indices] = True
                found = _direction(values, chosen)
                current = found.ranking
            # Once more with as many patches as there are beyond the line.
            beyond = found.beyond(rule)
            if not beyond.any():
                continue
            found = _direction(values, beyond)
            better = best is None or found.distance > best.distance
            if better and found.beyond(rule).any() and found.on(checked).beyond(rule).any():
                best = found
    if best is None:
        return False
    detector.template.copy_(best.template)
    detector.typical.copy_(best.typical)
    return True


def _surprises(detector: AttentionDetector, features: torch.Tensor) -> torch.Tensor:
    """``(n, L, H, K)``, of every so many-th patch where there are very many."""
    step = -(-features.shape[:3].numel() // _MAX_PATCHES)
    return torch.cat([detector.surprise(part).flatten(0, 2)[::step] for part in torch.split(features, _CHUNK)])


def _values(detector: AttentionDetector, surprises: torch.Tensor) -> torch.Tensor:
    """``(n, C)``: surprises as templates compare them."""
    return detector.bounded(surprises[:, None, None])[:, 0, 0]


def _rankings(surprises: torch.Tensor) -> Iterator[torch.Tensor]:
    """How surprising ``(n, L, H, K)`` are, ``(n,)`` each: over all, either way and upwards; by block; by kind."""
    yield surprises.square().mean((1, 2, 3))
    excess = surprises.clamp_min(0).square()
    yield excess.mean((1, 2, 3))
    blocks = excess.mean((2, 3))
    yield blocks.amax(1)
    yield from blocks.unbind(1)
    yield from excess.mean((1, 2)).unbind(1)


class _Direction(NamedTuple):
    """A template ``(C,)``, where it starts ``(C,)``, all patches along it ``(n,)``, and how far those chosen go."""

    template: torch.Tensor
    typical: torch.Tensor
    ranking: torch.Tensor
    distance: float

    def beyond(self, rule: str | Rule) -> torch.Tensor:
        """``(n,)`` bool: patches beyond the rule's line, none where there is one kind of patch."""
        cut = apply_rule(rule, self.ranking)
        return (self.ranking > cut.high) & cut.separated

    def on(self, values: torch.Tensor) -> _Direction:
        """The same direction with the patches of other pictures ``(n', C)``."""
        return self._replace(ranking=along(values, self.typical, self.template))


def _direction(values: torch.Tensor, chosen: torch.Tensor) -> _Direction:
    """The way from the mean of the others to that of the chosen, in units of the others' usual deviation along it."""
    weights = chosen.float()
    inside, number = weights @ values, weights.sum()
    typical = (values.sum(0) - inside) / (len(values) - number)
    template = inside / number - typical
    way = (values - typical) @ template
    others = way[~chosen]
    spread = (_NORMAL * (others - others.median()).abs().median()).clamp_min(1e-12)
    template = template / spread
    return _Direction(template, typical, along(values, typical, template), float(way[chosen].mean() / spread))
