"""A tracker gets an audit and two images at every evaluation, and the run learns the same with them as without."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training_cases import start
from training_helpers import adapter_bytes, write_planted

from register_adapter.training.callbacks.watch import _log_images

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads the events")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("case"), 24)


def flags(case: Path, out: Path, *more: str) -> list[str]:
    words = ["--model-name-or-path", str(case / "model"), "--train-dir", str(case / "images"), "--use-cpu", "--quiet"]
    words += ["--objective", "norm", "--output-dir", str(out), "--max-train-steps", "4", "--eval-steps", "2"]
    return [*words, "--max-train-samples", "8", "--per-device-train-batch-size", "2", "--max-eval-samples", "3", *more]


def events(out: Path) -> Any:
    (file,) = (out / "register_adapter").glob("events.*")
    return accumulators.EventAccumulator(str(file), size_guidance={"images": 0}).Reload()


TRACKED = ("--with-tracking", "--report-to", "tensorboard", "--ema-decay", "0.5")


@pytest.mark.slow
def test_every_evaluation_is_logged_with_an_audit_and_two_images(case: Path, tmp_path: Path) -> None:
    start(flags(case, tmp_path / "watched", *TRACKED))
    logged = events(tmp_path / "watched")
    shares = logged.Scalars("audit_outlier_share")
    assert [event.step for event in shares] == [2, 4]
    assert 0 < shares[0].value < 0.1
    assert logged.Scalars("audit_largest_over_median")[0].value > 3
    assert logged.Scalars("audit_present")[0].value == 1
    images = [name for name in logged.Tags()["images"] if name.startswith("artifacts_")]
    assert {name.partition("/")[0] for name in images} == {"artifacts_0", "artifacts_1"}
    for name in images:
        assert [event.step for event in logged.Images(name)] == [2, 4]
        assert min(logged.Images(name)[0].width, logged.Images(name)[0].height) > 200
    start(flags(case, tmp_path / "alone", *TRACKED, "--audit-images", "0"))
    assert adapter_bytes(tmp_path / "watched") == adapter_bytes(tmp_path / "alone")
    assert "audit_outlier_share" not in events(tmp_path / "alone").Tags()["scalars"]


@pytest.mark.slow
def test_without_matplotlib_the_run_goes_on_and_says_so(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    start(flags(case, tmp_path / "out", *TRACKED))
    assert "evaluations are logged without an audit" in capfd.readouterr().err
    assert "audit_outlier_share" not in events(tmp_path / "out").Tags()["scalars"]


def test_trackers_are_given_images_as_they_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        def __init__(self, name: str) -> None:
            self.name, self.given = name, []

        def log(self, values: Any, step: int) -> None:
            self.given.append((values, step))

    class WithImages(Tracker):
        def log_images(self, values: Any, step: int, **order: str) -> None:
            self.given.append((values, step, order))

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda image: ("image", image.shape)))
    pictures = {"artifacts_0": np.zeros((1, 4, 6, 3), np.uint8)}
    trackers = [WithImages("tensorboard"), WithImages("wandb"), Tracker("trackio"), Tracker("comet_ml")]
    for tracker in trackers:
        _log_images(tracker, pictures, 7)
    logged = {"artifacts_0": ("image", (4, 6, 3))}
    assert [tracker.given for tracker in trackers] == [
        [(pictures, 7, {"dataformats": "NHWC"})],
        [(pictures, 7, {})],
        [(logged, 7)],
        [],
    ]
