"""The overhead benchmark runs, counts bytes rightly, and reports what it measured and what it left out."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import run_module

pytestmark = pytest.mark.slow

RunBenchmark = Callable[..., str]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--models", "tiny", "--sizes", "28", "--batches", "1", "--dtypes", "float32", "--devices", "cpu"]


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead

    return overhead


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    return measuring


@pytest.fixture
def run_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunBenchmark:
    """Runs the script of a benchmark in this process, and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of the documented command, run once, and what it printed."""
    tmp_path = tmp_path_factory.mktemp("overhead")
    out = tmp_path / "new folder" / "overhead.json"
    options = [*TINY, "--compile", "no", "--repeats", "3", "--min-time", "0", "--out", out]
    done = run_module(BENCHMARKS / "overhead.py", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_documented_command_writes_a_whole_report(documented: tuple[dict[str, Any], str]) -> None:
    report, _ = documented
    assert {"benchmark", "config", "versions", "hardware", "commit", "wrapping", "skipped", "targets"} < set(report)
    assert report["versions"]["torch"] == torch.__version__
    assert report["hardware"]["cores"] >= 1
    assert report["skipped"] == []
    assert [result["step"] for result in report["results"]] == ["forward", "train"]
    assert report["wrapping"][0]["ms"]["median"] > 0
    for result in report["results"]:
        assert set(result["milliseconds"]) == {"base", "adapter", "native"}
        for ratio in result["ratios"].values():
            assert 0 < ratio["p10"] <= ratio["median"] <= ratio["p90"]


def test_registers_that_enter_late_keep_less_for_the_backward_pass(documented: tuple[dict[str, Any], str]) -> None:
    (late,) = documented[0]["insert_layer"]
    assert set(late["milliseconds"]) == {"half", "start"}
    # Counted, not timed: half of the two blocks keep nothing for the backward pass.
    assert 0.3 < late["bytes"]["half"]["saved_for_backward"] / late["bytes"]["start"]["saved_for_backward"] < 0.8


def test_the_report_has_a_target_of_each_kind(documented: tuple[dict[str, Any], str]) -> None:
    targets = documented[0]["targets"]
    names = {target["target"] for target in targets}
    kinds = ("time of a step", "peak memory")
    late = {f"insert_layer at half the depth, {kind}" for kind in kinds}
    assert names == {"time of adapter / native", "peak memory, |adapter / native - 1|", *late}
    assert all(target["passed"] == (target["value"] <= target["limit"]) for target in targets)


def test_it_prints_tables(documented: tuple[dict[str, Any], str]) -> None:
    assert "| adapter / native |" in documented[1]
    assert documented[1].count("| cpu | tiny |") == 2


def test_builds_are_pooled_and_told_apart(overhead: ModuleType, tmp_path: Path) -> None:
    common = [*TINY, "--compile", "no", "--min-time", "0", "--out", str(tmp_path / "report.json")]
    report = overhead.main([*common, "--repeats", "3", "--builds", "2", "--control"])
    assert [result["step"] for result in report["results"]] == ["forward", "train"]
    for result in report["results"]:
        assert (result["builds"], result["repeats"]) == (2, 6)
        assert set(result["milliseconds"]) == set(result["bytes"]) == {"base", "adapter", "native", "again"}
        medians = result["ratios_by_build"]["again/native"]
        assert len(medians) == 2
        assert min(medians) <= result["ratios"]["again/native"]["median"] <= max(medians)


def test_every_build_has_other_weights_in_another_order(overhead: ModuleType) -> None:
    builds = [overhead.build("tiny", 28, 4, seed, control=True) for seed in range(4)]
    assert len({tuple(models) for models in builds}) > 1
    first, second = ({**models["native"].state_dict()} for models in builds[:2])
    key = "encoder.layer.0.mlp.fc1.weight"
    assert not torch.equal(first[key], second[key])
    trained = {key for key, p in builds[0]["again"].named_parameters() if p.requires_grad}
    assert trained == {"embeddings.register_tokens"}


def test_each_of_the_three_models_trains_one_parameter(overhead: ModuleType) -> None:
    models = overhead.build("tiny", 28, 4)
    trained = {
        name: {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}
        for name, model in models.items()
    }
    assert trained["base"] == {"embeddings.cls_token": (1, 1, 32)}
    assert trained["native"] == {"embeddings.register_tokens": (1, 4, 32)}
    assert list(trained["adapter"].values()) == [(4, 32)]
    pixel_values = torch.randn(1, 3, 28, 28)
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    for name, model in models.items():
        overhead.make_call(model, pixel_values, "train")()
        changed = [not torch.equal(old, new) for old, new in zip(before[name], list(model.parameters()), strict=True)]
        assert sum(changed) == 1, name


def test_what_is_left_out_is_named_with_the_reason(overhead: ModuleType, tmp_path: Path) -> None:
    common = [*TINY, "--compile", "no", "--repeats", "1", "--min-time", "0", "--out", str(tmp_path / "report.json")]
    slow = overhead.main([*common, "--budget", "0"])
    assert slow["results"] == []
    assert {case["step"] for case in slow["skipped"]} == {"forward", "train"}
    assert all("--budget 0" in case["reason"] for case in slow["skipped"])
    late = overhead.main([*common, "--max-minutes", "0"])
    assert all("--max-minutes" in case["reason"] for case in late["skipped"])
    assert len(late["skipped"]) == 3
    assert sum(case.get("what") == "insert_layer" for case in late["skipped"]) == 1


def test_a_case_that_does_not_fit_is_not_started(
    overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "free_bytes", lambda device: 10_000)
    report = overhead.main([*TINY, "--compile", "no", "--repeats", "1", "--out", str(tmp_path / "report.json")])
    assert report["results"] == []
    assert all("GiB are free" in case["reason"] for case in report["skipped"])


@pytest.mark.parametrize(
    "wrong", [["--sizes", "30"], ["--batches", "0"], ["--repeats", "0"], ["--builds", "0"], ["--models", "xxl"]]
)
def test_wrong_options_are_refused(overhead: ModuleType, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main([*TINY, *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_missed_targets_are_reported_as_missed(overhead: ModuleType) -> None:
    case = {"device": "cpu", "model": "l", "size": 224, "dtype": "float32", "batch": 1, "compiled": False}
    result: dict[str, Any] = {
        **case,
        "step": "forward",
        "ratios": {"adapter/native": {"median": 1.009}, "adapter/base": {"median": 1.031}},
        "bytes": {"adapter": {"activation_peak": 1020}, "native": {"activation_peak": 1000}},
    }
    targets = overhead.check_targets([result], [{"model": "l", "ms": {"median": 49.0}}], 4)
    assert [target["passed"] for target in targets] == [True, False, False, True]
    assert len(overhead.check_targets([result], [], 16)) == 2


def test_the_peak_is_the_most_that_was_alive_at_once(measuring: ModuleType) -> None:
    known = torch.zeros(10_000)
    with measuring.PeakBytes([known]) as counter:
        first = torch.ones(1000)
        second = first + 1
        del first
        view = second[:10]
        del second
        three = torch.ones(500)
        three.add_(1)
        known[:100].add_(1)
    assert counter.peak == 2 * 4000
    assert counter.live == 4000 + 2000
    del view, three
    assert counter.live == 0


def test_saved_bytes_count_every_storage_once(measuring: ModuleType) -> None:
    weight = torch.ones(100, requires_grad=True)
    values = torch.ones(100)

    def call() -> None:
        product = weight * values
        (product * product).sum().backward()

    # Kept: the factors of the second product are one storage; `values` and `weight` are given.
    assert measuring.saved_bytes(call, [weight, values]) == 400
    assert measuring.saved_bytes(call, [weight]) == 800


def test_ratios_are_taken_within_a_turn(measuring: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that gets slower all the time: every ratio within a turn stays at 2 (give or take the drift in a turn).
    now = [1.0]

    def clock(call: Any, device: str, calls: int = 1) -> float:
        now[0] *= 1.01
        return now[0] * call()

    monkeypatch.setattr(measuring, "clock", clock)
    measured = measuring.take_turns(
        {"one": lambda: 2.0, "other": lambda: 1.0}, [("one", "other")], "cpu", repeats=30, min_time=0, budget=1e9
    )
    assert measured["ratios"]["one/other"]["median"] == pytest.approx(2, rel=0.02)
    assert measured["milliseconds"]["one"]["p90"] > 1.2 * measured["milliseconds"]["one"]["p10"]


OTHERS = {
    "audit": (["--images", "6", "--batch", "3"], {"audit/forward", "audit, no attentions/forward"}),
    "neurons": (
        ["--images", "120", "--batch", "16", "--shift_repeats", "2"],
        {"fit/forward", "fit/published", "shift/register"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_benchmarks_write_what_they_compared(name: str, tmp_path: Path, run_benchmark: RunBenchmark) -> None:
    options, ratios = OTHERS[name]
    out = tmp_path / "new folder" / f"{name}.json"
    said = run_benchmark(name, "--model", "tiny", "--size", "112", "--repeats", "2", *options, "--out", str(out))
    report = json.loads(out.read_text())
    assert {"benchmark", "config", "versions", "hardware", "commit", "results", "targets"} <= set(report)
    measured = {key: value for result in report["results"] for key, value in result["ratios"].items()}
    assert set(measured) == ratios
    assert all(0 < ratio["p10"] <= ratio["median"] <= ratio["p90"] for ratio in measured.values())
    assert len(report["targets"]) == len(ratios)
    assert said.count("reached") + said.count("missed") == len(ratios)


def test_kernels_at_other_lengths(tmp_path: Path, run_benchmark: RunBenchmark) -> None:
    out = tmp_path / "lengths.json"
    run_benchmark(
        "lengths", "--models", "s", "--registers", "4", "--repeats", "2", "--min-time", "0", "--out", str(out)
    )
    results = json.loads(out.read_text())["results"]
    assert {(result["kernel"], result["dtype"]) for result in results} == {
        (kernel, dtype) for kernel in ("attention", "linear") for dtype in ("float32", "bfloat16")
    }
    for result in results:
        assert set(result["milliseconds"]) == {"257", "261"}
        assert result["ratios"]["261/257"]["median"] > 0
