"""The tables of the results pages are those of the committed reports, and what `make results` compares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_helpers import ROOT

PAGES = ["results.md", "grown.md", "ablations.md"]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results  # type: ignore[import-not-found, unused-ignore]

    return results


def test_every_table_is_that_of_its_report(results: Any, tmp_path: Path) -> None:
    for page in PAGES:
        shutil.copy(ROOT / "docs" / page, tmp_path)
    results.render(tmp_path, figures=False)
    for page in PAGES:
        assert (tmp_path / page).read_text("utf-8") == (ROOT / "docs" / page).read_text("utf-8"), page


def test_what_is_computed_again_is_compared_with_a_committed_row(results: Any) -> None:
    for step in results.STEPS:
        rows = json.loads((ROOT / "benchmarks" / "results" / step.report).read_text("utf-8"))["rows"]
        assert len({results.row_key(row) for row in rows}) == len(rows)
        if "--arms" in step.command:
            wanted = step.command[step.command.index("--arms") + 1 :]
            assert set(wanted) <= {row["arm"] for row in rows if row["seed"] == 0}


def test_a_figure_that_differs_is_named(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = {"arm": "a", "model": "m", "seed": 0, "outlier_share": 0.02, "accuracy": 0.9}
    (tmp_path / "repair.json").write_text(json.dumps({"rows": [committed]}))
    (tmp_path / "new.json").write_text(json.dumps({"rows": [committed | {"accuracy": 0.8}]}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    figures = list(results.compare(results.STEPS[0], tmp_path / "new.json"))
    assert [(row["figure"], row["within"]) for row in figures] == [("outlier_share", True), ("accuracy", False)]
