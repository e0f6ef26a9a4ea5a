"""One arm in a few figures, on images that it was not made with: what is left of the artifacts, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..artifacts import ArtifactReport, audit, summarise_norms
from ..artifacts.report import Verdict
from ..features.trace import capture
from ..towers.modes import evaluating
from ..training.objectives.tokens import read_tokens
from .images import Part
from .tasks import Task

__all__ = ["DEFINITIONS", "Figures", "Ruler", "outlier_factor"]

#: Norms over so many medians are outliers, at most: where the audit draws its line lower, that one is taken.
_FACTOR = 3.0
#: A patch draws attention where it receives so many times an even share, as in the audit.
_DRAWS = 5.0
DEFINITIONS = {
    "audit": "the audit's verdict on the arm",
    "outliers": "share of patch tokens whose L2 norm is over the factor times the block's median, in the block with "
    "most of them, before the final LayerNorm",
    "largest / median": "largest such norm over the median, in the block where that is largest",
    "attention on outliers": "attention that the places where the base has its outliers receive from all tokens, mean "
    "over heads, in the block with most of it",
    "attention to few patches": "the same for all patches that each receive at least five times an even share",
    "drift": "mean of 1 - cosine between the arm's output for an image (pooled, CLS, or the mean of its patches) and "
    "the base's",
    "clean patches kept": "mean cosine between the arm's patch tokens and the base's behind the final LayerNorm, where "
    "the base has no outliers",
}


@dataclass(frozen=True)
class Figures:
    """What is measured of an arm; :data:`DEFINITIONS` says how.

    Attributes:
        verdict: The audit's.
        outlier_share: Outliers.
        largest_ratio: Largest norm over the median.
        attention_on_outliers: Attention that the base's outlier places receive; ``None`` where it has none.
        attention_gathered: Attention to few patches.
        drift: Of the output.
        clean_kept: Cosine of clean patches.
        task: The task's figure; ``None`` where no task is known.
    """

    verdict: Verdict
    outlier_share: float
    largest_ratio: float
    attention_on_outliers: float | None
    attention_gathered: float
    drift: float
    clean_kept: float
    task: float | None

    def to_dict(self) -> dict[str, Any]:
        """Rounded, ready for JSON."""
        values = asdict(self).items()
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values}


def outlier_factor(report: ArtifactReport) -> float:
    """How many medians an outlier's norm is over: 3, or where the audit draws its line, if that is lower."""
    layer = report.most_outlying
    if layer is None or layer.threshold.high == float("inf"):
        return _FACTOR
    return round(min(_FACTOR, layer.threshold.high / layer.norms["patch"].quantiles["0.5"]), 3)


class _Read(NamedTuple):
    """What a model makes of a part: norms and attention received, ``(L, N, P)`` each, and outputs."""

    norms: torch.Tensor
    received: torch.Tensor
    even: torch.Tensor
    patches: torch.Tensor
    summary: torch.Tensor
    scores: torch.Tensor | None


class Ruler:
    """Measures arms on one part of the images, beside the base.

    Args:
        base: The model as it is.
        part: The images.
        rule: The audit's, for verdicts.
        factor: Outliers are over so many medians.
        task: What the model is for, if that is known.
        batch_size: Images in a pass.
        tick: Called with the number of images behind every batch.
    """

    def __init__(
        self,
        base: nn.Module,
        part: Part,
        *,
        rule: str,
        factor: float,
        task: Task | None,
        batch_size: int,
        tick: Callable[[int], None],
    ) -> None:
        self.part, self.rule, self.factor, self.task, self.tick = part, rule, factor, task, tick
        self._batches = part.batches(batch_size)
        self._model, self._base = base, self._read(base)
        shares = [summarise_norms(norms, factor).share for norms in self._base.norms]
        worst = self._base.norms[max(range(len(shares)), key=shares.__getitem__)]
        #: Where the base has its outliers, ``(N, P)`` bool: those of the worst block, or what draws attention if that
        #: is all that tells them.
        self.places = worst > factor * worst.median()
        if not self.places.any():
            gathered = self._drawn(self._base)
            self.places = gathered[gathered.float().mean((1, 2)).argmax()]

    @property
    def base(self) -> Figures:
        """The base's own figures."""
        return self._summarise(self._base, self._audited(self._model))

    def measure(self, model: nn.Module) -> Figures:
        """The figures of an arm, with its adapters as they are."""
        return self._summarise(self._read(model), self._audited(model))

    def _audited(self, model: nn.Module) -> Verdict:
        verdict = audit(model, self._batches, rule=self.rule, progress=False).verdict
        self.tick(len(self.part))
        return verdict

    def _drawn(self, read: _Read) -> torch.Tensor:
        """Patches that draw attention ``(L, N, P)`` bool."""
        return read.received >= _DRAWS * read.even[:, None, None]

    def _summarise(self, read: _Read, verdict: Verdict) -> Figures:
        summaries = [summarise_norms(norms, self.factor) for norms in read.norms]
        on_places = (read.received * self.places).sum(-1).mean(1)
        gathered = torch.where(self._drawn(read), read.received, 0).sum(-1).mean(1)
        cosine = F.cosine_similarity(read.patches, self._base.patches, dim=-1)
        drift = 1 - F.cosine_similarity(read.summary, self._base.summary, dim=-1)
        return Figures(
            verdict,
            max(summary.share for summary in summaries),
            max(summary.largest for summary in summaries),
            float(on_places.max()) if bool(self.places.any()) else None,
            float(gathered.max()),
            max(float(drift.mean()), 0.0),
            float(cosine[~self.places].mean()),
            float(read.scores.mean()) if read.scores is not None else None,
        )

    def _read(self, model: nn.Module) -> _Read:
        device = next(model.parameters()).device
        kept: list[tuple[torch.Tensor, ...]] = []
        even = torch.zeros(0)
        with evaluating(model):
            for pixels, numbers in self._numbered():
                with capture(model) as trace:
                    tokens = read_tokens(model, {"pixel_values": pixels.to(device)})
                size = tokens.patches.shape[1]
                layers = range(1, len(trace.hidden_states))
                norms = torch.stack([trace.patches(layer)[:, :size].float().norm(dim=-1).cpu() for layer in layers])
                maps = trace.attentions
                # Columns of key/value pairs stand behind those of the sequence, which has a row for each of its tokens.
                ends = [part.shape[-2] for part in maps]
                received = torch.stack(
                    [part.float().mean((1, 2))[:, end - size : end].cpu() for part, end in zip(maps, ends, strict=True)]
                )
                even = torch.tensor([1 / part.shape[-1] for part in maps])
                scores = self.task.score(tokens, numbers).cpu() if self.task is not None else torch.zeros(len(pixels))
                kept.append((norms, received, tokens.patches.float().cpu(), tokens.summary.float().cpu(), scores))
                self.tick(len(pixels))
        parts = list(zip(*kept, strict=True))
        norms, received = (torch.cat(part, 1) for part in parts[:2])
        patches, summary, scores = (torch.cat(part) for part in parts[2:])
        return _Read(norms, received, even, patches, summary, scores if self.task is not None else None)

    def _numbered(self) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
        start = 0
        for pixels in self._batches:
            yield pixels, self.part.numbers[start : start + len(pixels)]
            start += len(pixels)
