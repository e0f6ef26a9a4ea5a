"""Where a run is, as a checkpoint's ``train_state.json`` tells it, and which checkpoints a folder has."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import RegisterAdapterError
from ...utils.arguments import check_mapping, check_number, check_whole
from ...utils.files import checksum, parse_json, read_text

__all__ = ["STATE", "CheckpointError", "TrainState", "find", "find_all", "find_foreign", "read_state", "remove_all"]

logger = logging.getLogger(__name__)
#: The file of a checkpoint without which it is none.
STATE = "train_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
#: More steps than any run has.
_FARTHEST = 10**12
#: A difference here changes how long the run is, not what a step does.
_MAY_CHANGE = ("max_train_steps", "num_train_epochs")


class CheckpointError(RegisterAdapterError, ValueError):
    """A checkpoint is missing, damaged, or belongs to a run with other settings."""


@dataclass
class TrainState:
    """Where a run is, and what it was started with.

    Attributes:
        global_step: Optimiser steps done.
        epoch: Epoch that the next batch belongs to.
        step: Batches of that epoch done, per process.
        settings: What must be the same on resumption for the same result.
        evaluations: ``step`` and the metrics of each evaluation on the way.
        files: Checksum by name of the checkpoint's files but its card, this one's without ``files``; older releases
            have none.

    Raises:
        TypeError: A value is of another kind.
        ValueError: A number is negative, or no run gets that far.
    """

    global_step: int = 0
    epoch: int = 0
    step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("global_step", "epoch", "step"):
            check_whole(name, getattr(self, name), least=0)
            if getattr(self, name) > _FARTHEST:
                raise ValueError(f"{name} is {getattr(self, name)}")
        for name in ("settings", "files"):
            check_mapping(name, getattr(self, name), "by name")
        if not isinstance(self.evaluations, list) or not all(isinstance(entry, dict) for entry in self.evaluations):
            raise TypeError("evaluations must be numbers by name, 'step' among them")
        for entry in self.evaluations:
            check_whole("step of an evaluation", entry.get("step"), least=0)
            for name, value in entry.items():  # that of a run that diverged is not finite
                check_number(f"{name} of an evaluation", value)

    def checksum(self) -> str:
        """Of everything but ``files``, which it stands in: one digit more in ``epoch`` would train on other images."""
        read_again = json.loads(json.dumps(asdict(self) | {"files": {}}))
        return hashlib.sha256(json.dumps(read_again, sort_keys=True).encode()).hexdigest()


def find_all(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints in a folder, the oldest first."""
    return [path for path in _named(output_dir) if (path / STATE).is_file()]


def find_foreign(output_dir: str | Path) -> list[Path]:
    """What has the name of a checkpoint in a folder and is none of ours, such as those of transformers' Trainer."""
    others = [path for path in _named(output_dir) if not (path / STATE).is_file()]
    return [path for path in others if not path.is_dir() or any(path.iterdir())]


def _named(output_dir: str | Path) -> list[Path]:
    named = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.rpartition("-")[2]))


def find(name: str, output_dir: str | Path) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Args:
        name: A folder, or ``"latest"`` for the newest whole one in ``output_dir``.
        output_dir: The run's folder.

    Returns:
        Its path; ``None`` for ``"latest"`` in a folder without any.

    Raises:
        CheckpointError: The folder is not a checkpoint.
    """
    whole = find_all(output_dir)
    if name == "latest":
        return whole[-1] if whole else None
    path = Path(name)
    if not (path / STATE).is_file():
        others = f"{output_dir} has {[path.name for path in whole]}" if whole else f"{output_dir} has none"
        raise CheckpointError(f"{path} is not a checkpoint (there is no {STATE} in it); {others}")
    return path


def remove_all(output_dir: str | Path) -> None:
    """Remove the checkpoints of an earlier run."""
    for path in find_all(output_dir):
        shutil.rmtree(path)


def read_state(checkpoint: Path, settings: dict[str, Any]) -> TrainState:
    """Where the checkpoint's run was.

    Args:
        checkpoint: The folder.
        settings: The settings of the run that goes on.

    Returns:
        The place, with the settings of the run that goes on: its length is what later checkpoints are compared with.

    Raises:
        CheckpointError: The file is damaged, or the checkpoint was written with other settings; the result would
            neither be that of the old run nor that of a new one.
    """
    try:
        state = TrainState(**parse_json(read_text(checkpoint / STATE)))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} is damaged: {error}. {_others(checkpoint)}") from error
    for name, digest in state.files.items():
        path = checkpoint / name
        if not path.is_file() or (state.checksum() if name == STATE else checksum(path)) != digest:
            raise CheckpointError(f"{path} is not the file that the run wrote: it is damaged. {_others(checkpoint)}")
    names = sorted(set(settings) | set(state.settings))
    changed = [name for name in names if settings.get(name) != state.settings.get(name)]
    listed = "; ".join(f"{name}: {state.settings.get(name)!r}, now {settings.get(name)!r}" for name in changed)
    if any(name not in _MAY_CHANGE for name in changed):
        raise CheckpointError(
            f"{checkpoint} was written by a run with other settings ({listed}); resume with the same ones, or start "
            "anew in another output_dir"
        )
    if changed:
        logger.warning("resuming a run of another length (%s): the schedule follows the new length", listed)
    return replace(state, settings=settings)


def _others(checkpoint: Path) -> str:
    names = [path.name for path in find_all(checkpoint.parent) if path.name != checkpoint.name]
    return f"Go on from another checkpoint: {names}" if names else "Start anew in another output_dir"
