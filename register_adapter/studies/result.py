"""What a study says in the end: as an object, as ``study.json``, and as a page."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from ..artifacts import ArtifactReport, audit
from ..errors import UnsupportedModelError
from ..tuner.composed import load_onto
from ..utils.environment import git_commit, machine, versions
from ..utils.staging import staged
from ..viz import Example, ImageInputError, read_examples
from ..viz.page import StudyPage, Table, write_study_page
from .arms import ARMS, TEACHER, Arm
from .choice import LEAVE, NOTHING, RULE, Choice
from .images import Images
from .records import ADAPTER, Record, Records
from .ruler import DEFINITIONS
from .tasks import Task

__all__ = ["COLUMNS", "FILES", "Origin", "Outcome", "StudyResult", "write_result"]

_RESULT, _PAGE, _IMAGES = "study.json", "index.html", "images"
#: What a study writes into its folder beside its records.
FILES = (_RESULT, _PAGE)
#: Training steps of what is tried next, where nothing repairs, times those of the study.
_LONGER = 4
_SHOWN, _BATCH = 4, 16
#: Figure to its heading and how it is written.
COLUMNS = {
    "verdict": ("audit", ""),
    "outlier_share": ("outliers", ".2%"),
    "largest_ratio": ("largest / median", ".1f"),
    "attention_on_outliers": ("attention on outliers", ".0%"),
    "attention_gathered": ("attention to few patches", ".0%"),
    "drift": ("drift", ".3f"),
    "clean_kept": ("clean patches kept", ".3f"),
    "task": ("task", ".3g"),
}


class Origin(NamedTuple):
    """What a study was made of, by its names, and its settings."""

    model: str
    images: str | None
    settings: Mapping[str, Any]


class Outcome(NamedTuple):
    """What the phases of a study gave.

    Attributes:
        audit: Of the base.
        choice: What is recommended.
        arms: In the order of their cost, the base first.
        records: Name of an arm to what each seed gave.
        places: Where the base has its outliers in the images that are reported on, ``(N, P)`` bool.
        factor: Outliers are over so many medians.
    """

    audit: ArtifactReport
    choice: Choice
    arms: Sequence[Arm]
    records: Mapping[str, Sequence[Record]]
    places: torch.Tensor
    factor: float


@dataclass(frozen=True, repr=False)
class StudyResult:
    """What a study found.

    Attributes:
        verdict: The audit's, in a few words.
        headline: What to do, in a few words.
        arm: Name of the arm that does it, or of the closest one where none repairs; ``None`` to leave the model.
        adapter: Folder of its adapter, of the first seed.
        reasons: Why, in sentences.
        commands: Command lines that follow, the first one first.
        rows: A row an arm: ``name``, ``seeds``, ``why_not``, ``verdict``, and for each other one of :data:`COLUMNS` the
            mean and ``ranges``.
        task: Name of the task's figure, if a task is known.
        values: All of it, as in ``study.json``.
    """

    verdict: str
    headline: str
    arm: str | None
    adapter: str | None
    reasons: tuple[str, ...]
    commands: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    task: str | None = None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str | None:
        """The command line that follows, ``None`` if there is nothing to do."""
        return next(iter(self.commands), None)

    def __repr__(self) -> str:
        """The verdict, what to do, and why."""
        return f"<StudyResult: {self.verdict}; {self.headline}. {' '.join(self.reasons)}>"

    def to_dict(self) -> dict[str, Any]:
        """What ``study.json`` holds."""
        return self.values

    def cell(self, row: Mapping[str, Any], name: str) -> str:
        """A figure of a row in words: the mean over the seeds, and the range if there is one; ``-`` without any."""
        if name == "verdict" or row.get(name) is None:
            return str(row.get(name) or "-")
        form = ".1%" if name == "task" and self.task == "accuracy" else COLUMNS[name][1]
        mean, least, largest = (f"{value:{form}}" for value in (row[name], *row["ranges"][name]))
        return mean if least == largest else f"{mean} ({least} to {largest})"


def write_result(
    outcome: Outcome,
    origin: Origin,
    model: nn.Module,
    images: Images,
    image_processor: Any,
    task: Task | None,
    seeds: range,
    records: Records,
) -> StudyResult:
    """Write ``study.json`` and the page, and the images that a command needs, and return the result."""
    arm = next((arm for arm in outcome.arms if arm.name == outcome.choice.arm), None)
    place = records.place(arm, seeds[0]) / ADAPTER if arm is not None else None
    commands = _commands(outcome.choice, arm, origin, images, records, seeds[0]) if arm is not None else []
    rows = [_row(arm, outcome.records[arm.name]) for arm in outcome.arms]
    choice = outcome.choice
    lines = tuple(shlex.join(words) for words in commands)
    result = StudyResult(
        *(outcome.audit.summary, choice.headline, choice.arm, str(place) if place else None, choice.reasons, lines),
        *(tuple(rows), task.name if task is not None else None),
    )
    values = {
        "model": origin.model,
        "images": origin.images,
        "verdict": outcome.audit.verdict,
        "summary": result.verdict,
        "reason": outcome.audit.reason,
        "kind": outcome.audit.kind,
        "recommendation": {
            **{"headline": result.headline, "arm": result.arm, "adapter": result.adapter, "reasons": result.reasons},
            **{"commands": lines, "rule": RULE, "judged": [{**asdict(j), "repairs": j.repairs} for j in choice.judged]},
        },
        "rows": rows,
        "runs": [_run(arm, seed, record) for arm in outcome.arms for seed, record in _seeded(arm, seeds, outcome)],
        "definitions": {**DEFINITIONS, "factor": f"{outcome.factor:g}"},
        "task": result.task,
        "parts": {name: len(getattr(images, name)) for name in ("make", "choose", "report")},
        "settings": dict(origin.settings),
        "seeds": list(seeds),
        "skipped": images.skipped,
        "versions": versions(),
        "hardware": machine(next(model.parameters()).device),
        "commit": git_commit(),
    }
    result.values.update(json.loads(json.dumps(values)))
    repaired = load_onto(copy.deepcopy(model), place).eval() if place is not None else None
    examples, after = _pictures(model, repaired, outcome, images, image_processor)
    with staged(records.folder, last=[_PAGE, _RESULT]) as scratch:
        if any(str(records.folder / _IMAGES) in words for words in commands):
            (scratch / _IMAGES).mkdir()
            images.write(scratch / _IMAGES)
        write_study_page(scratch / _PAGE, _page(result, outcome, origin, after, examples, records.folder))
        (scratch / _RESULT).write_text(json.dumps(result.values, indent=1, allow_nan=False) + "\n", "utf-8")
    return result


def _seeded(arm: Arm, seeds: range, outcome: Outcome) -> list[tuple[int | None, Record]]:
    given = outcome.records[arm.name]
    return list(zip(seeds, given, strict=True)) if arm.seeded else [(None, record) for record in given]


def _run(arm: Arm, seed: int | None, record: Record) -> dict[str, Any]:
    parts = {
        name: part.to_dict() if part else None for name, part in (("choose", record.choose), ("report", record.report))
    }
    return {"arm": arm.name, "seed": seed, **parts, "why_not": record.why_not, "seconds": round(record.seconds, 1)}


def _row(arm: Arm, given: Sequence[Record]) -> dict[str, Any]:
    """Means and ranges over the seeds, on the images that are reported on."""
    measured = [record.report.to_dict() for record in given if record.report is not None]
    why_not = next((record.why_not for record in given if record.why_not), None)
    row: dict[str, Any] = {"name": arm.name, "seeds": len(measured), "why_not": why_not, "ranges": {}}
    row["verdict"] = " or ".join(sorted({figures["verdict"] for figures in measured})) or None
    for name in list(COLUMNS)[1:]:
        values = [value for figures in measured if (value := figures[name]) is not None]
        row[name] = fmean(values) if values else None
        if values:
            row["ranges"][name] = [min(values), max(values)]
    return row


def _commands(choice: Choice, arm: Arm, origin: Origin, images: Images, records: Records, seed: int) -> list[list[str]]:
    """What makes the arm's adapter from all images, and what looks at it."""
    named = origin.images is not None and (images.on_disk or arm.objective is None)
    folder = str(origin.images) if named else str(records.folder / _IMAGES)
    steps = int(origin.settings["steps"]) * (_LONGER if choice.headline == NOTHING else 1)
    teacher = next(other for other in ARMS if other.name == TEACHER)
    make = arm.command(
        *(origin.model, folder),
        steps=steps,
        seed=seed,
        rule=origin.settings["rule"],
        teacher=str(records.place(teacher, seed) / ADAPTER),
    )
    return [make, ["register-adapter", "audit", origin.model, folder, "--adapter", "repaired"]]


def _pictures(
    model: nn.Module, repaired: nn.Module | None, outcome: Outcome, images: Images, image_processor: Any
) -> tuple[Sequence[Example], ArtifactReport | None]:
    """Maps of a few images with outliers, before and after; and the audit after, on images that are reported on."""
    order = (~outcome.places.any(1)).long().argsort(stable=True)[:_SHOWN].sort().values
    shown = [images.report.items[place]["image"] for place in islice(order.tolist(), _SHOWN)]
    models: dict[str, nn.Module] = {"as it is": model}
    after = None
    if repaired is not None and outcome.choice.arm is not None:
        models[outcome.choice.arm] = repaired
        batches = images.report.batches(_BATCH)
        after = audit(repaired, batches, rule=outcome.audit.rule, name=outcome.choice.arm, progress=False)
    names = [f"image {images.report.numbers[place]}" for place in order.tolist()]
    try:
        return read_examples(models, shown, image_processor=image_processor, names=names), after
    except (UnsupportedModelError, ImageInputError):
        return (), after


def _page(
    result: StudyResult,
    outcome: Outcome,
    origin: Origin,
    after: ArtifactReport | None,
    examples: Sequence[Example],
    folder: Path,
) -> StudyPage:
    parts, choice = result.values["parts"], outcome.choice
    made = [f"The adapter of this study, made with half of the images, is in {result.adapter}"]
    kind = {LEAVE: "good", NOTHING: "bad"}.get(result.headline, "warn")
    headings = [heading if name != "task" else (result.task or "task") for name, (heading, _) in COLUMNS.items()]
    names = [name for name in COLUMNS if name != "task" or result.task]
    arms = Table(
        f"Arms on {parts['report']} images that nothing was made with or chosen by",
        ["arm", *headings[: len(names)], "seeds"],
        [
            [row["name"], *((row[name], result.cell(row, name)) for name in names), row["seeds"]]
            if row["why_not"] is None
            else [f"{row['name']} (not made: {row['why_not']})", *[None] * len(names), 0]
            for row in result.rows
        ],
        "Means over the seeds, in brackets the range. Drift and kept patches are compared with the model as it is.",
    )
    rule = Table(
        f"The rule, on {parts['choose']} other images",
        ["arm", "audit: none", "few outliers left", "attention off them", "clean patches kept", "task kept", "repairs"],
        [[j.arm, *map(_yes, (j.clean, j.outliers, j.attention, j.kept, j.task, j.repairs))] for j in choice.judged],
        RULE,
    )
    definitions = {**DEFINITIONS, "factor": f"{outcome.factor:g}"}
    settings = {name: result.values[name] for name in ("settings", "seeds", "parts", "versions", "hardware", "commit")}
    return StudyPage(
        f"Study: {origin.model}",
        [
            str(origin.images or "images"),
            f"{sum(parts.values()):,} images",
            f"seeds {', '.join(map(str, result.values['seeds']))}",
        ],
        *(kind, result.headline, [*choice.reasons, *(made if result.adapter else [])], list(result.commands)),
        *([outcome.audit, *([after] if after else [])], [arms, *([rule] if choice.judged else [])]),
        examples,
        definitions,
        settings,
    )


def _yes(value: bool | None) -> str:
    return {None: "–", True: "yes", False: "no"}[value]
