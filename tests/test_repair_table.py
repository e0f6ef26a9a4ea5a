"""The tables of the repair benchmark: means and ranges over seeds, and how many there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from training_helpers import ROOT

FIELDS = ["arm", "labels", "trained", "model", "seed", "outlier_share_before", "outlier_share", "cosine_planted"]
FIELDS += ["cosine_other", "accuracy", "accuracy_twin", "cls_drift", "parameters", "seconds"]


@pytest.fixture
def write_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("repair_table", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from repair_table import write_table  # type: ignore[import-not-found, unused-ignore]

    return write_table


def row(seed: int, share: float) -> dict[str, Any]:
    values: list[Any] = ["LoRA alone", False, True, "ViT", seed, 0.02, share, 0.9, 0.95, 0.8, 0.96, 0.1, 512, 3.0]
    return dict(zip(FIELDS, values, strict=True))


def test_means_and_ranges_stand_between_the_comments(write_table: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text("before\n<!-- repair: made by benchmarks/repair.py -->\nold\n<!-- /repair -->\nbehind\n", "utf-8")
    report = {"config": {"steps": 60, "batch": 16, "images": 256}, "rows": [row(0, 0.001), row(1, 0.003)]}
    for _ in range(2):
        write_table(report, path)
    text = path.read_text("utf-8")
    assert text.startswith("before\n<!-- repair")
    assert text.endswith("<!-- /repair -->\nbehind\n")
    assert "old" not in text
    assert text.count("| LoRA alone | 0.20 (0.10…0.30) | 0.900 | 0.950 | 80.0 | 0.100 | 512 | 3 | 2 |") == 1


def test_a_line_names_its_steps_and_machines(write_table: Any, tmp_path: Path) -> None:
    rows = [row(0, 0.001) | {"steps": 60, "hardware": "B"}, row(1, 0.001) | {"steps": 60, "hardware": "A"}]
    page = tmp_path / "results.md"
    page.write_text("<!-- repair: made -->\n<!-- /repair -->\n", "utf-8")
    write_table({"config": {"steps": 100, "batch": 16, "images": 256}, "rows": rows}, page)
    assert "| 2 | 60 | A, B |" in page.read_text("utf-8")


def test_every_row_of_the_committed_report_has_what_is_promised() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "repair.json").read_text("utf-8"))
    assert {"versions", "hardware", "config"} <= set(report)
    assert all({*FIELDS, "steps", "hardware"} <= set(entry) for entry in report["rows"])
    assert len({(entry["arm"], entry["model"], entry["seed"]) for entry in report["rows"]}) == len(report["rows"])


def test_every_row_of_the_downstream_report_has_every_task() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "downstream.json").read_text("utf-8"))
    tasks = {"knn", "linear", "linear_mean", "segmentation", "depth", "lost", "tokencut"}
    assert {"versions", "hardware", "config"} <= set(report)
    assert all({"arm", "seed", *tasks} <= set(entry) for entry in report["rows"])
    assert len({(entry["arm"], entry["seed"]) for entry in report["rows"]}) == len(report["rows"])
    clean, planted = (
        {row["seed"]: row for row in report["rows"] if row["arm"] == name} for name in ("clean twin", "planted model")
    )
    for seed in clean.keys() & planted.keys():
        assert all(planted[seed][task] < clean[seed][task] for task in tasks - {"depth"}), "a planted model is hurt"
