"""``make results`` in a folder that has an earlier run in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_helpers import ROOT


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results  # type: ignore[import-not-found, unused-ignore]

    return results


def test_reports_of_another_commit_are_forgotten(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "mine.json"
    report = tmp_path / "0" / results.STEPS[0].report
    own.write_text("{}")
    for commit, is_kept in (("a", False), ("a", True), ("b", False)):
        monkeypatch.setattr(results, "git_commit", lambda commit=commit: commit)
        report.parent.mkdir(exist_ok=True)
        report.write_text("{}")
        results.forget_others(tmp_path)
        assert report.exists() == is_kept
    assert own.exists()
