"""What a model hands on to its blocks is a mask only if it is called one: Trainer's count of items is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import build, make_inputs
from helpers import assert_identical, run

from register_adapter import add_registers

WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"insert_layer": 1},
    "key_value": {"key_value": True, "gate": -1.0},
    "neurons": {"init": "test_time", "register_neurons": {0: [1, 4]}, "train_removal": True},
}


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return add_registers(build("vit-classifier"), num_registers=1, **WAYS[request.param]).eval()


def test_other_arguments(model: Any) -> None:
    inputs = make_inputs("vit-classifier")
    expected = run(model, inputs)
    patches = model.get_base_model().vit.embeddings.position_embeddings.shape[1]
    for value in (torch.tensor(4), torch.zeros(2, patches + 1), torch.zeros(patches + 1), torch.zeros(0, patches + 1)):
        assert_identical(run(model, inputs, num_items_in_batch=value), expected)


def test_transformers_trainer(model: Any, tmp_path: Path) -> None:
    """It hands every model whose forward takes ``**kwargs`` the number of items, a tensor without dimensions."""
    pixels = make_inputs("vit-classifier")["pixel_values"]
    items = [{"pixel_values": image, "labels": 0} for image in pixels]
    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), save_strategy="no", learning_rate=1e-2, **options)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    transformers.Trainer(model, arguments, train_dataset=items).train()
    moved = [name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)]
    assert moved
