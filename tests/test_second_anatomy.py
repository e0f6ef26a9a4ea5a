"""A second adapter on a tower: it shares the first one's hooks, so its anatomy must lead to the same places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build, make_inputs
from helpers import assert_identical, run

from register_adapter import Anatomy, RegisterConfig, UnsupportedModelError, add_registers, find_tower

OWN = replace(find_tower(build("vit")).anatomy, family="mine")


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": "embeddings.dropout"},
        {"remove": "pooler"},
        {"remove_from": "output"},
        {"insert_at": "input"},
        {"prefix": 0},
        {"mlp_out": "mlp.fc1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [None, OWN], ids=["from the table", "by hand"])
def test_one_that_leads_elsewhere_is_refused(first: Anatomy | None, change: dict[str, Any]) -> None:
    model = add_registers(build("vit"), 2, anatomy=first).eval()
    expected = run(model, make_inputs("vit"))
    (field,) = change
    with pytest.raises(UnsupportedModelError, match=rf"differ in .*{field}.*share its hooks"):
        model.add_adapter("more", RegisterConfig(num_registers=2, anatomy=replace(OWN, **change)))
    assert list(model.peft_config) == ["default"]
    assert_identical(run(model, make_inputs("vit")), expected)


def test_one_that_leads_to_the_same_places_is_taken(tmp_path: Path) -> None:
    model = add_registers(build("vit"), 2, anatomy=OWN)
    model.add_adapter("more", RegisterConfig(num_registers=3, anatomy=replace(OWN, input_shape=(3, 32, 32))))
    model.set_adapter("more")
    assert run(model, make_inputs("vit"))["last_hidden_state"].shape[1] == 17
    model.save_pretrained(tmp_path)
    other = add_registers(build("vit"), 2, anatomy=OWN)
    other.load_adapter(tmp_path / "more", "more")
