"""What a task measured of a model and of its adapters, side by side, with every choice that was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resampling import bootstrap_mean, bootstrap_ratio

__all__ = ["Metric", "Score", "TaskReport", "TaskRow", "compare_means", "compare_sums"]

_Array = npt.NDArray[np.float64]
_Statistic = Callable[[_Array], _Array]


@dataclass(frozen=True)
class Metric:
    """What a figure is.

    Attributes:
        name: Such as ``"top-1 accuracy"``.
        definition: How it is computed.
        percent: Whether it is a share, shown in percent.
        higher_is_better: Otherwise lower is.
    """

    name: str
    definition: str
    percent: bool = True
    higher_is_better: bool = True

    @property
    def heading(self) -> str:
        """Name, unit and direction."""
        return f"{self.name}{' (%)' if self.percent else ''} {'↑' if self.higher_is_better else '↓'}"


@dataclass(frozen=True)
class Score:
    """A figure, or a difference of two, with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float

    @classmethod
    def of_values(cls, values: npt.ArrayLike, seed: int = 0) -> Score:
        """The mean of one value an image."""
        return cls(float(np.asarray(values, np.float64).mean()), *bootstrap_mean(values, seed=seed))

    @classmethod
    def of_sums(cls, counts: npt.ArrayLike, statistic: _Statistic, seed: int = 0) -> Score:
        """What is computed of sums over images; see :func:`~register_adapter.evaluation.resampling.bootstrap_ratio`."""
        sums = np.asarray(counts, np.float64).sum(0, keepdims=True)
        return cls(float(statistic(sums)[0]), *bootstrap_ratio(counts, statistic, seed=seed))

    def words(self, metric: Metric, signed: bool = False) -> str:
        """The figure with its interval, ``75.0 [70.1, 79.2]``."""
        factor, form = (100, ".1f") if metric.percent else (1, ".3f")
        sign = "+" if signed else ""
        low, high = (format(factor * end, sign + form) for end in (self.low, self.high))
        return f"{factor * self.value:{sign}{form}} [{low}, {high}]"

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class TaskRow:
    """One model at one setting.

    Attributes:
        model: Its name.
        setting: What is varied within the task, such as ``"k = 20"``.
        score: The figure.
        difference: Of it to the first model's at the same setting, paired by image; ``None`` in that model's rows.
        chosen: Every choice behind the row, such as C and how it was chosen.
        values: ``(images,)``, what each test image has, such as 1 where the class is right.
    """

    model: str
    setting: str
    score: Score
    difference: Score | None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "setting": self.setting,
            "score": self.score.to_dict(),
            "difference": None if self.difference is None else self.difference.to_dict(),
            "chosen": dict(self.chosen),
            "values": [round(value, 6) for value in self.values],
        }


@dataclass(frozen=True)
class TaskReport:
    """What an evaluation measured.

    Attributes:
        task: Its name: ``"knn"``, ``"linear"``, ``"segmentation"``, ``"depth"``, ``"zero-shot"``, ``"discovery"``.
        metric: What the figures are.
        rows: Settings by model.
        num_train: Number of training images, 0 where nothing is learned.
        num_test: Number of test images.
        settings: Choices that are the same in all rows: features, seed, sizes, versions.
        models: What each model is: family, width, blocks, norm, registers.
        skipped: Bad images that were left out.
        notes: What a reader should know.
    """

    task: str
    metric: Metric
    rows: tuple[TaskRow, ...]
    num_train: int
    num_test: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, model: str, setting: str) -> TaskRow:
        """The row of a model at a setting.

        Raises:
            KeyError: There is none.
        """
        rows = {(row.model, row.setting): row for row in self.rows}
        if (model, setting) not in rows:
            raise KeyError(f"no row of {model!r} at {setting!r}; there are {sorted(rows)}")
        return rows[model, setting]

    @property
    def header(self) -> list[str]:
        """Headings of :meth:`cells`."""
        return ["setting", "model", self.metric.heading, "difference to the base"]

    def cells(self) -> list[list[str]]:
        """The rows in words."""
        return [
            [
                row.setting,
                row.model,
                row.score.words(self.metric),
                "" if row.difference is None else row.difference.words(self.metric, signed=True),
            ]
            for row in self.rows
        ]

    def choices(self) -> list[str]:
        """What was chosen in each row, a line each, without what its setting says and without what is long."""
        lines = []
        for row in self.rows:
            chosen = ", ".join(f"{key} {_short(value)}" for key, value in row.chosen.items() if key not in _LONG)
            lines += [f"{row.setting}, {row.model}: {chosen}"] if chosen else []
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "task": self.task,
            "metric": {
                "name": self.metric.name,
                "definition": self.metric.definition,
                "higher_is_better": self.metric.higher_is_better,
            },
            "num_train": self.num_train,
            "num_test": self.num_test,
            "settings": dict(self.settings),
            "models": {name: dict(values) for name, values in self.models.items()},
            "rows": [row.to_dict() for row in self.rows],
            "skipped": list(self.skipped),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A table in Markdown, and below it what was chosen."""
        lines = [f"{self.task}: {self.num_train} training images, {self.num_test} test images", ""]
        cells = [self.header, ["---"] * len(self.header), *self.cells()]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells), "", *self.choices()])


#: Choices that are no part of a line: long ones, and what the setting says.
_LONG = ("tried", "per_class", "boxes", "converged", "held_out", "patches", "depths", "k", "templates")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare_means(
    values: Mapping[tuple[str, str], npt.ArrayLike],
    chosen: Mapping[tuple[str, str], Mapping[str, Any]],
    seed: int = 0,
) -> tuple[TaskRow, ...]:
    """Rows of figures that are means over images, in the order of settings, then models.

    Args:
        values: ``(images,)`` by model and setting, of the same images in the same order; the first model is the base.
        chosen: The choices of each.
        seed: Seed of the bootstrap.
    """
    arrays = {key: np.asarray(given, np.float64) for key, given in values.items()}

    def score(array: _Array) -> Score:
        return Score.of_values(array, seed)

    return _rows(arrays, chosen, score, lambda array, base: score(array - base), lambda array: array)


def compare_sums(
    counts: Mapping[tuple[str, str], npt.ArrayLike],
    statistic: _Statistic,
    chosen: Mapping[tuple[str, str], Mapping[str, Any]],
    seed: int = 0,
) -> tuple[TaskRow, ...]:
    """The same of figures that are computed from sums over images.

    Args:
        counts: ``(images, ...)`` by model and setting.
        statistic: From sums ``(k, ...)`` to ``(k,)``.
        chosen: The choices of each.
        seed: Seed of the bootstrap.
    """
    arrays = {key: np.asarray(given, np.float64) for key, given in counts.items()}

    def difference(array: _Array, base: _Array) -> Score:
        both = np.stack([array, base], 1)
        return Score.of_sums(both, lambda sums: statistic(sums[:, 0]) - statistic(sums[:, 1]), seed)

    return _rows(arrays, chosen, lambda array: Score.of_sums(array, statistic, seed), difference, statistic)


def _rows(
    arrays: Mapping[tuple[str, str], _Array],
    chosen: Mapping[tuple[str, str], Mapping[str, Any]],
    score: Callable[[_Array], Score],
    difference: Callable[[_Array, _Array], Score],
    per_image: Callable[[_Array], _Array],
) -> tuple[TaskRow, ...]:
    models, settings = _unique(model for model, _ in arrays), _unique(setting for _, setting in arrays)
    rows = []
    for setting in settings:
        for model in models:
            if (model, setting) not in arrays:
                continue
            array, base = arrays[model, setting], arrays.get((models[0], setting))
            compared = None if model == models[0] or base is None else difference(array, base)
            values = tuple(map(float, per_image(array)))
            rows.append(TaskRow(model, setting, score(array), compared, chosen.get((model, setting), {}), values))
    return tuple(rows)


def _unique(names: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(names))
