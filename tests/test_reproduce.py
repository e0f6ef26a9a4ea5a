"""Every command of ``docs/reproduce.md`` runs to its end on tiny models of the classes that it names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from command_line import run_here
from reproduce_cases import (
    BLOCKS,
    DOCUMENT,
    MODELS,
    QUICK,
    SWEEP,
    commands,
    made_small,
    python_blocks,
    write_data,
    write_models,
)

from register_adapter.commands.runs import tasks
from register_adapter.testbed import plant

pytestmark = pytest.mark.slow

COMMANDS = commands()
#: What a task measures, in rows for each model.
SETTINGS = {
    "knn": ["k = 3"],
    "linear": ["CLS, last block", "CLS + patch mean, last block"],  # the last 4 blocks are not there
    "segmentation": ["linear, last block"],
    "depth": ["bins, last block"],
    "zero-shot": None,
    "discovery": ["lost, reference", "lost, swept", "tokencut, reference", "tokencut, swept"],
}


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def target(words: list[str]) -> str:
    """Where a command writes."""
    return value(words, "--output-dir" if words[0] == "train" else "--out")


def adapters(words: list[str]) -> list[str]:
    return [word for flag, word in pairwise(words) if flag == "--adapter"]


class _Place:
    """A folder with models and data, in which commands run once, each after those whose adapters it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._makers = {target(words): words for words in COMMANDS}
        self._done: set[str] = set()

    def run(self, words: list[str]) -> Path:
        out = target(words)
        if out in self._done:
            return self.folder / out
        for adapter in adapters(words):
            self.run(self._makers[adapter])
        AcceleratorState._reset_state(reset_partial_state=True)
        run_here(*made_small(words))
        self._done.add(out)
        return self.folder / out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plant, "_VIEWS", plant._VIEWS[:2])
        for task, run in QUICK.items():
            patch.setitem(tasks.TASKS, task, tasks.TASKS[task]._replace(run=run))
        patch.setattr(tasks, "Sweep", lambda: SWEEP)
        write_models(folder / "models")
        write_data(folder / "data")
        patch.chdir(folder)
        for code in python_blocks():
            exec(code, {})
        yield _Place(folder)


def _audited(words: list[str], out: Path) -> None:
    report = json.loads((out / "audit.json").read_text("utf-8"))
    (written,) = report["reports"]
    assert len(written["layers"]) == BLOCKS + 1


def _fitted(words: list[str], out: Path) -> None:
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert config["register_neurons"]


def _trained(words: list[str], out: Path) -> None:
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert math.isfinite(results["metrics"]["eval_loss"])
    assert list(out.glob("**/adapter_model.safetensors"))


def _evaluated(words: list[str], out: Path) -> None:
    written = json.loads((out / "eval.json").read_text("utf-8"))
    task, model = words[1:3]
    names = [MODELS[model], *(Path(name).name for name in adapters(words))]
    settings = SETTINGS[task] or [written["rows"][0]["setting"]]
    rows = [(row["setting"], row["model"]) for row in written["rows"]]
    assert rows == [(setting, name) for setting in settings for name in names]
    assert all(math.isfinite(row["score"]["value"]) for row in written["rows"])
    assert "index.html" in {path.name for path in out.iterdir()}
    if task == "discovery":
        kinds = {row["chosen"]["features"] for row in written["rows"] if "reference" in row["setting"]}
        assert kinds == {value(words, "--features")}


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "audit": _audited,
    "fit": _fitted,
    "train": _trained,
    "eval": _evaluated,
}


@pytest.mark.parametrize("words", COMMANDS, ids=target)
def test_a_command_runs_to_its_end(words: list[str], place: Any) -> None:
    CHECKS[words[0]](words, place.run(words))


def test_the_page_says_that_nothing_was_run() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert "Nothing on this page was run" in text[:300]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    heads = [number for number, line in enumerate(rows) if line.endswith("| ours |")]
    assert len(heads) >= 8
    for head in heads:
        for row in rows[head + 2 :]:
            if row in (rows[number] for number in heads) or not row.endswith("not run here |"):
                break
    assert text.count("not run here |") >= 35


def test_every_model_has_every_question() -> None:
    said = {(words[0], model) for words in COMMANDS for model in MODELS if model in words}
    missing = {(command, model) for command in CHECKS for model in MODELS if not model.startswith("hf-hub:")} - said
    assert not missing
    assert len({target(words) for words in COMMANDS}) == len(COMMANDS), "two commands write into one folder"
