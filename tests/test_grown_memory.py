"""What the benchmark of outliers' memory reads and exchanges, where the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_helpers import ROOT

from register_adapter.testbed.grown import MosaicTask, Recipe, build
from register_adapter.testbed.grown.mosaics import summary_of

TASK = MosaicTask(grid=5, icons=3, asking=3, background=(4, 6), summary=4, summary_at="asking")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grown_memory  # type: ignore[import-not-found, unused-ignore]

    return grown_memory


@pytest.mark.parametrize("holder", ["outliers", "contents"])
def test_a_summary_is_read_where_it_is(memory: Any, holder: str) -> None:
    rng = torch.Generator().manual_seed(0)
    parts = []
    for seed in (1, 2):
        drawn = TASK.draw(400, seed)
        large = drawn.is_background & (drawn.is_background.cumsum(1) <= 2)
        tokens = torch.randn(400, 25, 32, generator=rng)
        kinds = memory._kinds(drawn, torch.where(large, 9.0, 1.0))
        contents = drawn.targets[..., :24]
        wanted = {"mean": contents.mean(1), "summary": summary_of(TASK, contents)}
        wanted["rest"] = wanted["summary"]
        holds = kinds[holder][..., None] & (torch.arange(32) < 4)
        tokens = torch.where(holds, 3 * wanted["summary"].repeat(1, 8)[:, None], tokens)
        parts.append((tokens, kinds, wanted))
        assert torch.equal(kinds["outliers"], large)
    read = memory.read_out(*parts)
    assert read[holder]["summary"] > 0.85
    assert all(values["summary"] < 0.1 for kind, values in read.items() if kind != holder)


def test_an_exchange_moves_what_tokens_hold(memory: Any) -> None:
    recipe = Recipe(task=TASK, width=32, blocks=2, heads=2)
    model, drawn = build(recipe, 0).eval(), TASK.draw(6, 3)
    with torch.no_grad():
        nothing = memory.exchanged(model, TASK, drawn, 1)
        assert all(row == nothing["nothing"] for row in nothing.values())  # an untrained model has no outliers
        model.backbone.embeddings.position_embeddings[:, :4] *= 200
        changed = memory.exchanged(model, replace(TASK, summary_at="every"), drawn, 1)
    assert changed["outliers of the next image"] != changed["nothing"]
    assert changed["mean outlier"] != changed["outliers of the next image"]
    assert changed["others of the next image"] != changed["nothing"]
