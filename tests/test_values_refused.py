"""Values that do not fit, handed in past a loader: the adapter keeps its own, and a loader's base has no adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import Snapshot, assert_identical, run
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from register_adapter import AdapterFileError, RegisterConfig, add_registers

NAME = "vit-classifier"
HEAD = "base_model.model.classifier.weight"
#: Configs that the user hands to a loader in the place of the file's, which has two registers and no head.
OTHERS: dict[str, dict[str, Any]] = {
    "more registers": {"num_registers": 3},
    "pairs": {"num_registers": 2, "key_value": True},
    "by block": {"num_registers": 2, "deep": True},
    "a gate": {"num_registers": 2, "gate": -1.0},
    "neurons": {"num_registers": 2, "init": "test_time", "register_neurons": {0: [1]}},
    "a head": {"num_registers": 2, "modules_to_save": ["classifier"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    add_registers(build(NAME), 2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("other", OTHERS)
def test_another_config(other: str, saved: Path) -> None:
    base = build(NAME)
    snapshot = Snapshot(base, make_inputs(NAME))
    with pytest.raises(AdapterFileError, match=r"Nothing was changed\."):
        PeftModel.from_pretrained(base, saved, config=RegisterConfig(**OTHERS[other]))
    snapshot.check()


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "head of another width": lambda values: values.update({HEAD: torch.zeros(3, 7)}),
    "head without a bias": lambda values: values.pop(HEAD.replace("weight", "bias")),
    "head of other classes": lambda values: values.update({HEAD: torch.zeros(9, 32)}),
    "registers of another width": lambda values: values.update(dict.fromkeys(list(values)[:1], torch.zeros(4, 7))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_at_work_keeps_its_values(fault: str) -> None:
    model = add_registers(build(NAME), modules_to_save=["classifier"]).eval()
    values = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    expected = run(model, make_inputs(NAME))
    FAULTS[fault](values)
    with pytest.raises((AdapterFileError, RuntimeError)):
        set_peft_model_state_dict(model, values)
    assert_identical(run(model, make_inputs(NAME)), expected)
    whole = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, whole)
    assert_identical(get_peft_model_state_dict(model), whole)
