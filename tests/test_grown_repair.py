"""What the benchmark of repaired grown models measures."""

from __future__ import annotations

from typing import Any

import pytest
from training_helpers import ROOT

from register_adapter.artifacts import HeadSinks, SinkReport, Sinks
from register_adapter.testbed.grown import RECIPES, load_grown


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grown_ruler

    return grown_ruler


def sinks(per_image: float, no_op: float, broadcast: float) -> Sinks:
    return Sinks(max(1, round(100 * per_image)), per_image, 0.5, 0.1, 1.2, no_op, broadcast)


def test_heads_with_sinks_are_counted_by_place_and_kind(ruler: Any) -> None:
    parked, told, rare = sinks(1, 0.9, 0), sinks(1, 0, 0.9), sinks(0.001, 1, 0)
    heads = [
        {"outlier": parked, "other": sinks(0.1, 0, 1), "register": told},
        {"other": told, "cls": parked},
        {"outlier": rare, "register": rare},
        {},
    ]
    report = SinkReport([HeadSinks(0, number, None, 1.0, tokens) for number, tokens in enumerate(heads)], [])
    counts = ruler.count_sinks(report)
    assert counts == {"patches": {"no-op": 1, "broadcast": 1}, "registers": {"broadcast": 1}}
    rows = [{"sinks": counts}, {"sinks": {"patches": {"no-op": 2}, "registers": {}}}]
    assert ruler.say_sinks(rows, "patches") == "no-op 1.5, broadcast 0.5"
    assert ruler.say_sinks(rows[1:], "registers") == "none"


@pytest.mark.slow
def test_a_twin_is_itself_and_has_its_sinks_on_registers(ruler: Any) -> None:
    grown, twin = load_grown("tiles"), load_grown("tiles", "registers")
    made = ruler.Ruler(grown, twin, RECIPES["tiles"].task, 16)
    before, after = made.measure(grown.backbone, grown.head), made.measure(twin.backbone, twin.head)
    assert after["cosine_twin"] == pytest.approx(1, abs=1e-4)
    assert before["cosine_twin"] < 0.95
    assert sum(before["sinks"]["patches"].values()) >= 3
    assert not before["sinks"]["registers"]
    assert sum(after["sinks"]["registers"].values()) >= 3
    assert not after["sinks"]["patches"]
    for row in (before, after):
        assert row["largest_ratio"] == pytest.approx(max(row["largest_ratios"]), abs=1e-3)
        assert len(row["largest_ratios"]) == len(row["outlier_shares"]) == RECIPES["tiles"].blocks
    assert before["contents_at_outliers"] < 0.6 < 0.95 < after["contents_at_outliers"]
