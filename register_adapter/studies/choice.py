"""Which arm to take, by a written rule, from figures on images that are neither trained on nor reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from ..artifacts import ArtifactReport
from .arms import Arm
from .ruler import Figures
from .tasks import Task

__all__ = ["LEAVE", "NOTHING", "RULE", "Choice", "Judged", "choose", "leave"]

#: Parts of the base's outliers, and of the attention on them, that a repair leaves at most; and the least cosine of
#: clean patches.
_LEFT, _ATTENTION, _KEPT = 0.2, 0.5, 0.85
LEAVE, NOTHING = "leave it", "no repair found"
RULE = (
    "An arm repairs if on the validation images, in every seed, the audit's verdict on it is none, it leaves at most a "
    "fifth of the base's outliers and at most half of the attention on them, keeps clean patches at a mean cosine of "
    f"{_KEPT} or more, and, where a task is known, keeps the task's figure (accuracy: at most 2 points below the "
    "base's; a loss: at most a quarter above). Of the arms that repair, the first in the order of the table, which is "
    "that of their cost, is recommended; where a task is known, the first that is no worse than the best of them by "
    "more than those limits. Controls are never recommended; what they repair is said."
)


@dataclass(frozen=True)
class Judged:
    """What the rule says about an arm.

    Attributes:
        arm: Its name.
        clean: Whether the audit finds no artifacts, as all below: in every seed.
        outliers: Whether it leaves few enough outliers.
        attention: Whether it takes enough attention off them.
        kept: Whether clean patches are kept.
        task: Whether the task's figure is; ``None`` where no task is known.
    """

    arm: str
    clean: bool
    outliers: bool
    attention: bool
    kept: bool
    task: bool | None

    @property
    def repairs(self) -> bool:
        """Whether all of it holds."""
        return self.clean and self.outliers and self.attention and self.kept and self.task is not False

    @property
    def missing(self) -> list[str]:
        """What does not hold, in words."""
        said = {"clean": "the audit still sees artifacts", "outliers": "outliers are left"}
        said["attention"] = "attention stays where it was"
        said |= {"kept": "clean patches change", "task": "the task suffers"}
        return [words for name, words in said.items() if getattr(self, name) is False]


class Choice(NamedTuple):
    """What is recommended.

    Attributes:
        headline: In a few words.
        arm: Name of the arm; the closest one if none repairs; ``None`` for a model to leave as it is.
        reasons: Why, in sentences.
        judged: Every arm but the base.
    """

    headline: str
    arm: str | None
    reasons: tuple[str, ...]
    judged: tuple[Judged, ...]


_Runs = Mapping[str, Sequence[Figures]]


def leave(report: ArtifactReport) -> Choice:
    """What is recommended for a model without artifacts."""
    reasons = [f"The audit's verdict is “{report.summary}”.", report.reason]
    if report.unexplained:
        reasons.append("Look at the attention maps, and audit by a rule that draws a line in any case (--rule sigma).")
    return Choice(LEAVE, None, tuple(reasons), ())


def choose(arms: Sequence[Arm], runs: _Runs, base: Figures, task: Task | None) -> Choice:
    """Apply :data:`RULE`.

    Args:
        arms: Those that were made, in the order of their cost.
        runs: Name of an arm to its figures on validation images, one a seed.
        base: Those of the model as it is.
        task: What the model is for, if that is known.
    """
    judged = {arm.name: _judge(arm.name, runs[arm.name], base, task) for arm in arms if arm.kind != "base"}
    wanted = [arm for arm in arms if arm.recommended]
    repairing = [arm for arm in wanted if judged[arm.name].repairs]
    also = [name for name, verdict in judged.items() if verdict.repairs and name not in {arm.name for arm in wanted}]
    if not repairing:
        # What is trained may get there with more steps; a fit will not.
        tried = [arm for arm in wanted if arm.kind == "train"] or wanted
        closest = min(tried, key=lambda arm: len(judged[arm.name].missing), default=None)
        reasons = ["No arm that could be recommended repairs the model by the rule.", *_near(closest, judged)]
        name = closest.name if closest is not None else None
        return Choice(NOTHING, name, (*reasons, *_controls(also)), tuple(judged.values()))
    chosen = repairing[0]
    if task is not None:
        means = {arm.name: _mean(runs[arm.name], lambda figures: figures.task) for arm in repairing}
        best = (max if task.greater_is_better else min)(means.values())
        chosen = next(arm for arm in repairing if not task.better(best, means[arm.name]))
    reasons = [_said(chosen, runs[chosen.name], base, task)]
    others = [arm.name for arm in repairing if arm is not chosen]
    if others:
        reasons.append(f"By the rule these repair it too: {', '.join(others)}.")
    return Choice(chosen.does, chosen.name, (*reasons, *_controls(also)), tuple(judged.values()))


def _near(closest: Arm | None, judged: Mapping[str, Judged]) -> Iterator[str]:
    if closest is not None:
        yield f"Closest is “{closest.name}”: {' and '.join(judged[closest.name].missing)}."
    if closest is not None and closest.kind == "train":
        yield "The command below trains it for longer, on all of the images."


def _controls(also: Sequence[str]) -> list[str]:
    words = "So do controls, so that what is recommended may not be what does it" if also else ""
    return [f"{words}: {', '.join(also)}."] if also else []


def _judge(name: str, runs: Sequence[Figures], base: Figures, task: Task | None) -> Judged:
    def holds(test: Callable[[Figures], bool]) -> bool:
        return all(test(figures) for figures in runs)

    before = base.attention_on_outliers
    return Judged(
        name,
        holds(lambda figures: figures.verdict == "none"),
        holds(lambda figures: figures.outlier_share <= _LEFT * base.outlier_share),
        holds(lambda figures: before is None or (figures.attention_on_outliers or 0.0) <= _ATTENTION * before),
        holds(lambda figures: figures.clean_kept >= _KEPT),
        None if task is None else holds(lambda figures: _keeps(task, figures, base)),
    )


def _keeps(task: Task, figures: Figures, base: Figures) -> bool:
    assert figures.task is not None
    assert base.task is not None
    return task.keeps(figures.task, base.task)


def _mean(runs: Sequence[Figures], value: Callable[[Figures], Any]) -> float:
    return fmean(value(figures) for figures in runs)


def _said(arm: Arm, runs: Sequence[Figures], base: Figures, task: Task | None) -> str:
    left = _mean(runs, lambda figures: figures.outlier_share)
    kept = _mean(runs, lambda figures: figures.clean_kept)
    words = f"On the validation images “{arm.name}” takes outliers from {base.outlier_share:.2%} to {left:.2%}"
    if base.attention_on_outliers is not None:
        attention = _mean(runs, lambda figures: figures.attention_on_outliers or 0.0)
        words += f" and attention on them from {base.attention_on_outliers:.0%} to {attention:.0%}"
    words += f"; clean patches keep a cosine of {kept:.3f}"
    if task is not None:
        value = _mean(runs, lambda figures: figures.task)
        words += f", and the {task.name} goes from {base.task:.4g} to {value:.4g}"
    return words + "."
