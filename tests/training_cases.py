"""A tiny model and image folders in no time, and training in this process as the command line runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from pyarrow import parquet
from training_helpers import write_vit

from register_adapter.training.launch import main

CLASSES = ("cat", "dog")
#: Eleven images are three batches, and two optimiser steps an epoch.
RUN = ("--num-train-epochs", "4", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2")
RUN += ("--learning-rate", "0.02", "--logging-steps", "3")
STEPS = 8


def write_case(folder: Path) -> Path:
    """``vit``, with dropout, and ``train`` and ``validation`` with images of noise."""
    write_vit(folder / "vit", ["a", "b"])
    noise = np.random.default_rng(0)
    for part, counts in {"train": (6, 5), "validation": (3, 4)}.items():
        for label, count in zip(CLASSES, counts, strict=True):
            (folder / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (40, 36, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{index}.png")
    return folder


def flags(case: Path, out: Path, *more: str) -> list[str]:
    words = ["--model-name-or-path", str(case / "vit"), "--train-dir", str(case / "train"), "--use-cpu"]
    return [*words, "--validation-dir", str(case / "validation"), "--output-dir", str(out), *more]


def start(argv: list[str]) -> dict[str, Any]:
    """A run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(argv)


def stopped(argv: list[str]) -> int:
    """The exit status of a run that does not come to its end."""
    with pytest.raises(SystemExit) as stop:
        start(argv)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def results_of(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
    return results


def relabel(file: Path, item: int, label: int) -> None:
    """Give an item in a parquet file another label, which ``datasets`` would not write."""
    table = parquet.read_table(file)
    labels = table.column("label").to_pylist()
    labels[item] = label
    place, field = table.column_names.index("label"), table.schema.field("label")
    parquet.write_table(table.set_column(place, field, pyarrow.array(labels, field.type)), file)
