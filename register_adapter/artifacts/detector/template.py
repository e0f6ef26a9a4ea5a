"""What the most surprising patches have in common: the second step of a detector, still without a label.

Corners of objects surprise too, each in its own way. Artifacts all do the same, so their surprises point in one
direction. It is searched for in coordinates in which all surprises are uncorrelated and vary alike, where the way from
the mean of one kind of patch to that of another is the direction of a linear discriminant. The starts are the most
skewed independent components (FastICA, Hyvarinen 1999, with skewness as its contrast: a few patches far from the others
make a direction skewed). From there it goes on as in self-training: take the patches that go farthest that way, average
them, rank all patches by how far they go the new way, and repeat. A direction is kept only if patches then fall into
two kinds by a rule, and do so on images held out as well; on a model without artifacts they do not, wherever the
start is. Patches of one texture are a kind of their own, too, and well predicted from their neighbours: most patches of
an artifact's kind must surprise more than nine in ten of the others. Of several directions that one is kept whose kinds
are farther apart on the images held out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...errors import MissingExtraError
from ..rules.rules import Rule, apply_rule
from .model import AttentionDetector, along, lifted

__all__ = ["fit_template"]

#: How many artifacts there are is not known. An average over few patches, the purest, is the start, and it grows:
#: shares of the patches, and the least number of them.
SHARES, LEAST = (0.003, 0.006, 0.01, 0.02, 0.04), 20
#: The shares that are begun with, and how often patches are chosen anew at each.
STARTS, ROUNDS = (0.003, 0.01, 0.02), 2
#: Independent components, of the most varied directions; how many of them are starts; and patches they are found on.
COMPONENTS, USED, ICA_PATCHES = 80, 10, 30_000
#: The share of the patches beyond the line may differ so much between training images and held out ones.
MAX_RATIO = 2.0
#: Beyond the line are at least so many held out patches, and half of them surprise more than this share of the others.
MIN_FOUND, SURPRISING = 10, 0.9
# Patches a value, at least: in fewer a direction that separates some of them is always found. And patches, at most.
_PATCHES_A_VALUE, _MAX_PATCHES = 40, 100_000
# Of the covariance, towards its diagonal.
_SHRINKAGE = 0.02
# Images at a time.
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
        features: ``(M, h, w, L, H, K)`` attention values of the images that it was trained on; 40 patches for each
            of the L · H · K values, or there will be no template.
        held_out: The same of other images, ``(M', h, w, L, H, K)``.
        rule: Says whether there are two kinds of patches; a name out of
            :data:`register_adapter.artifacts.rules.RULES`, or such a function.

    Returns:
        Whether there is a template.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    detector.template.zero_()
    detector.typical.zero_()
    features, held_out = _evenly(features), _evenly(held_out)
    if features.shape[:3].numel() < _PATCHES_A_VALUE * detector.config.channels:
        return False
    values, _ = _values(detector, features)
    checked, surprises = _values(detector, held_out)
    center, whitening = _whitening(values)
    white, white_checked = (values - center) @ whitening, (checked - center) @ whitening
    best: _Direction | None = None
    farthest = 0.0
    starts = list(_components(white))
    for direction in (
        direction for start in STARTS for ranking in starts for direction in _self_trained(white, ranking, start, rule)
    ):
        inside, other = direction.beyond(rule), direction.on(white_checked)
        confirmed = other.beyond(rule)
        if not inside.any() or confirmed.sum() < MIN_FOUND:
            continue
        if surprises[confirmed].median() <= surprises[~confirmed].quantile(SURPRISING):
            continue
        shares = inside.float().mean().item(), confirmed.float().mean().item()
        apart = shares[1] * other.ranking[confirmed].mean().item() ** 2
        if max(shares) <= MAX_RATIO * min(shares) and apart > farthest:
            best, farthest = direction, apart
    if best is None:
        return False
    detector.template.copy_(whitening @ best.template)
    detector.typical.copy_(values[~best.chosen].mean(0))
    return True


def _evenly(features: torch.Tensor) -> torch.Tensor:
    """Images from first to last, no more than have ``_MAX_PATCHES`` patches."""
    number = max(min(len(features), _MAX_PATCHES // features.shape[1:3].numel()), 1)
    return features[torch.linspace(0, len(features) - 1, number).long()]


def _values(detector: AttentionDetector, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprises as templates compare them ``(n, C)``, and how large they are ``(n,)``, root mean square."""
    values, sizes = [], []
    for part in torch.split(features, _CHUNK):
        surprise = detector.surprise(part)
        values.append(detector.bounded(surprise).flatten(0, 2))
        sizes.append(surprise.flatten(3).flatten(0, 2).square().mean(-1).sqrt())
    return torch.cat(values), torch.cat(sizes)


def _whitening(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``(C,)``, and ``(C, C)`` that makes what is left uncorrelated and of variance 1, the most varied first."""
    covariance = torch.cov(values.cpu().double().T)  # not every device has float64
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * covariance.diagonal().diag()
    variances, directions = torch.linalg.eigh(covariance)
    scales = variances.clamp_min(1e-6 * float(variances[-1]) + 1e-12).rsqrt()
    return values.mean(0), (directions * scales).flip(1).to(values)


def _components(white: torch.Tensor) -> Iterator[torch.Tensor]:
    """``(n,)`` each: how far patches go along the most skewed independent components, to the longer tail's side."""
    try:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise MissingExtraError("templates of detectors", "scikit-learn", "testbed") from error
    number = min(COMPONENTS, white.shape[1])
    most_varied = white[:, :number].cpu().double().numpy()
    step = -(-len(white) // ICA_PATCHES)
    search = FastICA(whiten=False, fun=_skewness, max_iter=100, tol=1e-3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any direction is a start
        search.fit(most_varied[::step])
    sources = torch.from_numpy(most_varied @ search.components_.T).to(white)
    skewness = sources.pow(3).mean(0)
    for place in skewness.abs().argsort(descending=True)[:USED].tolist():
        yield sources[:, place] * skewness[place].sign()


def _skewness(values: Any) -> tuple[Any, Any]:
    """The contrast's derivative, and the mean of its own."""
    return values**2, (2 * values).mean(-1)


class _Direction(NamedTuple):
    """A template ``(C,)``, where it starts ``(C,)``, all patches along it and those it was made of, ``(n,)`` each."""

    template: torch.Tensor
    typical: torch.Tensor
    ranking: torch.Tensor
    chosen: torch.Tensor

    def beyond(self, rule: str | Rule) -> torch.Tensor:
        """``(n,)`` bool: patches beyond the rule's line, none where there is one kind of patch."""
        threshold = apply_rule(rule, self.ranking)
        return (self.ranking > threshold.high) & threshold.separated

    def on(self, values: torch.Tensor) -> _Direction:
        """The same direction with the patches of other images ``(n', C)``."""
        return self._replace(ranking=along(values, self.typical, self.template))


def _self_trained(values: torch.Tensor, ranking: torch.Tensor, start: float, rule: str | Rule) -> Iterator[_Direction]:
    """The directions that the patches which go farthest agree on, those with patches beyond the line."""
    for share in [share for share in SHARES if share >= start]:
        count = min(max(round(share * len(values)), LEAST), len(values) - 1)
        for _ in range(ROUNDS):
            chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
            chosen[ranking.topk(count).indices] = True
            direction = _direction(values, chosen)
            ranking = direction.ranking
        # Once more with as many patches as there are beyond the line.
        beyond = direction.beyond(rule)
        if beyond.any():
            yield _direction(values, beyond)


def _direction(values: torch.Tensor, chosen: torch.Tensor) -> _Direction:
    """The way from the mean of the others to that of the chosen, in units of the others' usual deviation along it.

    ``values`` ``(n, C)`` are centred, so that those chosen say where the others are.
    """
    inside, number = values[chosen].sum(0), chosen.sum()
    typical = inside / (number - len(values))
    template = inside / number - typical
    way = values @ template - typical @ template
    others = way[~chosen]
    spread = (_NORMAL * (others - others.median()).abs().median()).clamp_min(1e-12)
    return _Direction(template / spread, typical, lifted(way / spread), chosen)
