"""One pass over images that answers two questions: what the audit says of them, and which units write the outliers.

The audit's answer takes all images, and ranking needs it. So that one pass is enough, the first images say which
outliers to expect, and the others are ranked by that while the audit goes on. Where the answer differs in the end, the
images that were kept are ranked anew.

Attention costs time, and is looked at only where the norms of the first images show nothing. Where those show artifacts
and all images do not, it is that of the images that were kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..artifacts.auditing import build_report
from ..artifacts.rules.rules import Rule
from ..artifacts.rules.threshold import Threshold
from ..artifacts.statistics import Statistics
from ..data.batches import Batch
from ..errors import NoArtifactsError, RegisterAdapterError
from ..towers.tower import Tower
from .parts import Parts
from .scores import Neuron, NeuronScores, ScoreSums, pool
from .team import Team
from .views import View

__all__ = ["ALL_THE_SAME", "Search"]

#: How a fit is told where its outliers are.
ALL_THE_SAME = "To go on all the same, give threshold= and top_block=."

#: Lines that differ by less than this factor lie in the same gap between norms.
_NEAR = 1.2
_CPU = torch.device("cpu")


class Search:
    """The search for outliers and for the units that write them.

    Args:
        tower: The vision tower, without registers.
        sizes: Sides in pixels to which images are resized, ``None`` for the images as they come.
        rule: The audit's rule.
        rule_called: Its name.
        by_hand: Layer to a threshold that is given and not found.
        top_block: Index of the last block to look at; ``None``: the one behind which outliers appear.
        most: Number of units to find.
        team: The processes of the fit.
    """

    def __init__(
        self,
        tower: Tower,
        sizes: Sequence[int | None],
        rule: Rule,
        rule_called: str,
        by_hand: dict[int, Threshold],
        top_block: int | None,
        most: int,
        team: Team,
    ) -> None:
        self.tower, self.rule, self.rule_called = tower, rule, rule_called
        self.by_hand, self.top_block, self.most, self.team = by_hand, top_block, most, team
        #: Number of images on which units are ranked, and why the first size has outliers or none.
        self.num_ranked, self._reason = 0, ""
        self._views = [View(tower, size, Statistics(tower, attentions=False)) for size in sizes]

    def run(self, parts: Parts) -> tuple[list[View], int, list[Neuron]]:
        """Look at all images.

        Returns:
            The sizes at which there are outliers, with the thresholds there; the last block to look at; and the units
            that add most to the outliers over all of them, the first first.

        Raises:
            NoArtifactsError: The audit finds no artifacts in these images, or none lies beyond the line given.
            RegisterAdapterError: It does, but norms do not tell them from other patches, or those that rank units have
                none.
            ValueError: Outliers do not separate behind the block that was chosen.
        """
        kept = [*parts.first, *parts.held_out]
        self._look(kept, {})
        self._attend(kept)
        expected = self._separating()
        scores = self._scores(expected)
        self._look(parts.others(), scores)
        parts.add_up()
        self._attend(kept)
        views = self._separating()
        if not views:
            raise self._nothing(parts)
        top = self._top(views)
        if not parts.num_others or not _as_expected(scores, views, top):
            scores = {view.size: NeuronScores(self.tower, view.threshold_behind(top), top) for view in views}
            self._rank(parts.first, views, scores)
        self.num_ranked = scores[views[0].size].num_images
        ranking = [view_scores for view_scores in scores.values() if view_scores.num_outliers]
        if not ranking:
            error: type[Exception] = NoArtifactsError if self.by_hand else RegisterAdapterError
            raise error(
                f"of {parts.num_images} images, the {self.num_ranked} on which units are ranked have no outlier behind "
                f"block {top} ({views[0].threshold_behind(top).in_words()}): give more images, or "
                f"{'another threshold' if self.by_hand else 'others first'}"
            )
        return views, top, pool([view_scores.ranked(self.most) for view_scores in ranking], self.most)

    def _separating(self) -> list[View]:
        """The views with outliers in all images so far."""
        judged = [view.judged(self.rule, self.by_hand) for view in self._views]
        self._reason = judged[0].reason
        return [view for view in judged if view.thresholds]

    def _top(self, views: list[View]) -> int:
        return self.top_block if self.top_block is not None else max(min(view.thresholds) for view in views) - 1

    def _scores(self, views: list[View]) -> dict[int | None, NeuronScores]:
        """What will rank units at each size; nothing while it is not clear what to rank by."""
        top = self._top(views) if views else -1
        return {
            view.size: NeuronScores(self.tower, view.thresholds[top + 1], top)
            for view in views
            if top + 1 in view.thresholds
        }

    def _look(self, batches: Iterable[Batch], scores: dict[int | None, NeuronScores]) -> None:
        """Run the tower over batches; what the other processes see in theirs is added."""
        alone = self.team.count == 1
        views = self._views if alone else [view.fresh() for view in self._views]

        def work() -> tuple[list[Any], dict[int | None, ScoreSums]]:
            for batch in batches:
                for view in views:
                    view.look(batch, scores.get(view.size))
            if alone:
                return [], {}
            return [view.statistics.sums(_CPU) for view in views], {size: own.sums() for size, own in scores.items()}

        outcomes = self.team.run(work)
        for sums, _ in outcomes:
            for view, added in zip(self._views, sums, strict=not alone):
                view.statistics.add_sums(added)
        _add_up(scores, [summed for _, summed in outcomes])

    def _rank(self, batches: list[Batch], views: list[View], scores: dict[int | None, NeuronScores]) -> None:
        """Rank units by these batches, which were looked at before."""

        def work() -> dict[int | None, ScoreSums]:
            for batch in batches:
                for view in views:
                    scores[view.size].add(view.resized(batch))
            return {size: own.sums() for size, own in scores.items()}

        _add_up(scores, self.team.run(work))

    def _attend(self, kept: Sequence[Batch]) -> None:
        """Where norms show nothing, as the audit does: look at the attention too."""
        if not self._separating():
            for view in self._views:
                if not view.statistics.attends:
                    seen = self.team.run(lambda view=view: view.attention(kept))  # type: ignore[misc]
                    known = [sums for sums in seen if sums is not None]
                    if len(known) == len(seen):
                        view.attend(known)

    def _nothing(self, parts: Parts) -> RegisterAdapterError:
        """Why there is nothing to fit: no artifacts, or none that norms tell from other patches."""
        statistics = self._views[0].statistics
        report = build_report(statistics, self.rule, self.rule_called, "")
        who, rest = type(self.tower.module).__name__, f"Nothing was changed. {ALL_THE_SAME}"
        if report.verdict != "none":
            return RegisterAdapterError(
                f"{who} has artifacts ({report.summary}) on {parts.num_images} images, but no line between norms tells "
                "them from other patches, so that no unit can be found that writes them. Train registers instead "
                f"(python -m register_adapter.train). {report.reason} {rest}"
            )
        said = (
            f"{who} may have artifacts that its norms do not show: the rule {self.rule_called!r} finds none"
            if report.unexplained
            else f"{who} needs no registers: the rule {self.rule_called!r} finds no artifacts"
        )
        return NoArtifactsError(f"{said} on {parts.num_images} images. {report.reason} {rest}")


def _add_up(scores: dict[int | None, NeuronScores], parts: list[dict[int | None, ScoreSums]]) -> None:
    """Have what all processes have summed."""
    for size, own in scores.items():
        if summed := [part[size] for part in parts if part]:
            own.set_sums(summed)


def _as_expected(scores: dict[int | None, NeuronScores], views: list[View], top: int) -> bool:
    """Whether units were ranked by the outliers that the audit names in the end, or by nearly those."""
    return set(scores) == {view.size for view in views} and all(
        scores[view.size].top == top
        and top + 1 in view.thresholds
        and scores[view.size].threshold.near(view.thresholds[top + 1], _NEAR)
        for view in views
    )
