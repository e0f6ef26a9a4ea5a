"""What a study leaves in its folder on the way, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import nn

from ..artifacts import ArtifactReport
from ..artifacts.report import Verdict
from ..towers.identity import is_finite
from ..training.saving import save_adapter
from ..utils.files import checksum, parse_json, read_text
from ..utils.staging import staged, sweep, write_text
from .arms import Arm
from .ruler import Figures

__all__ = ["ADAPTER", "Record", "Records"]

_SETTINGS, _AUDIT, _FIGURES, _TIMES = "settings.json", "audit.json", "figures.json", "times.json"
_ARMS = "arms"
#: Folder of an arm's adapter, in that of the arm and its seed.
ADAPTER = "adapter"
#: Figures that a model may be without.
_MAY_LACK = {"attention_on_outliers", "task"}


class Record(NamedTuple):
    """One arm with one seed.

    Attributes:
        choose: Figures on the images that one is chosen by; ``None`` if the arm could not be made.
        report: Figures on the images that are reported on.
        why_not: Why it could not be made.
        seconds: How long making it took.
    """

    choose: Figures | None
    report: Figures | None
    why_not: str | None = None
    seconds: float = 0.0


class Records:
    """The files of a study.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, settings: Mapping[str, Any]) -> None:
        """Say what this study is, or see that the folder's is the same.

        Raises:
            ValueError: The folder has a study with other settings, or one whose settings are not there.
        """
        path = self.folder / _SETTINGS
        if not path.is_file():
            if left := [name for name in (_AUDIT, _ARMS) if (self.folder / name).exists()]:
                raise ValueError(
                    f"{self.folder} has {' and '.join(left)} of a study, and no {_SETTINGS} that says how they were "
                    "made; remove them, or name another folder with --out"
                )
            write_text(path, json.dumps(settings, indent=1) + "\n")
            return
        with _naming(path, self.folder):
            there = dict(parse_json(read_text(path)))
        differ = [name for name in {**settings, **there} if there.get(name) != settings.get(name)]
        if differ:
            said = ", ".join(f"{name} {there.get(name)!r} there, {settings.get(name)!r} here" for name in differ)
            raise ValueError(f"{self.folder} has a study with other settings ({said}); name another folder with --out")

    def audit(self) -> ArtifactReport | None:
        """The audit of the base, if it is there."""
        path = self.folder / _AUDIT
        if not path.is_file():
            return None
        with _naming(path, path):
            return ArtifactReport.load(path)

    def keep_audit(self, report: ArtifactReport) -> None:
        """Write it."""
        report.save(self.folder / _AUDIT)

    def place(self, arm: Arm, seed: int) -> Path:
        """The folder of an arm with a seed."""
        folder = self.folder / _ARMS / arm.slug
        return folder / f"seed-{seed}" if arm.seeded else folder

    def read(self, arm: Arm, seed: int) -> Record | None:
        """What is there of an arm with a seed, ``None`` if it is not whole."""
        place = self.place(arm, seed)
        if not (place / _FIGURES).is_file():
            return None
        sweep(place)  # nothing more is written there
        with _naming(place, place):
            figures, times = (parse_json(read_text(place / name)) for name in (_FIGURES, _TIMES))
            choose, report = (_figures(name, figures[name]) for name in ("choose", "report"))
            why_not, seconds = figures["why_not"], _number("seconds", times["seconds"])
            made, base = (choose is not None, report is not None), arm.kind == "base"
            if why_not is not None and not isinstance(why_not, str):
                raise ValueError(f"why_not is {why_not!r:.80}")
            if made != (why_not is None,) * 2 or (base and why_not is not None):
                raise ValueError("an arm that was made has both figures, and another says why it was not")
            if choose is not None and not base:
                if not (place / ADAPTER).is_dir():
                    return None  # somebody has removed it
                if figures.get("adapter", there := _checksums(place / ADAPTER)) != there:
                    raise ValueError("the adapter in it is not the one that its figures are of")
            return Record(choose, report, why_not, seconds)

    def keep(self, arm: Arm, seed: int, record: Record, model: nn.Module | None, facts: dict[str, Any]) -> None:
        """Write an arm, its figures last; an adapter of ``model`` is saved beside them, with ``facts`` on its card."""
        figures: dict[str, Any] = {
            "arm": arm.name,
            "seed": seed if arm.seeded else None,
            "choose": record.choose.to_dict() if record.choose else None,
            "report": record.report.to_dict() if record.report else None,
            "why_not": record.why_not,
        }
        with staged(self.place(arm, seed), last=[_FIGURES]) as scratch:
            if model is not None and hasattr(model, "peft_config"):
                saved: Any = model
                save_adapter(saved, scratch / ADAPTER, facts)
                figures["adapter"] = _checksums(scratch / ADAPTER)
            (scratch / _TIMES).write_text(json.dumps({"seconds": round(record.seconds, 1)}) + "\n", "utf-8")
            (scratch / _FIGURES).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def _checksums(folder: Path) -> dict[str, str]:
    """Names of what an adapter is loaded from, to their SHA-256; a card is for its readers to edit."""
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(files)}


def _figures(name: str, values: Any) -> Figures | None:
    """Figures of a file, ``None`` if there are none.

    Raises:
        TypeError: Others are there, or one is missing.
        ValueError: One is not what it can be.
    """
    if values is None:
        return None
    read = Figures(**values)
    if read.verdict not in get_args(Verdict):
        raise ValueError(f"verdict of {name} is {read.verdict!r:.80}")
    for item, value in read.to_dict().items():
        if item != "verdict" and not (value is None and item in _MAY_LACK):
            _number(f"{item} of {name}", value)
    return read


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not is_finite(value):
        raise ValueError(f"{name} is {value!r:.80}")
    return float(value)


@contextmanager
def _naming(place: Path, remove: Path) -> Iterator[None]:
    """Have what is wrong with the files of an earlier start name them, and what to remove.

    Raises:
        ValueError: In the place of whatever a file that was cut or edited makes go wrong.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{place} is damaged ({error}); remove {remove}, or name another folder") from error
