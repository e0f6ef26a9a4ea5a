"""With ``adapter_names=`` each image has the head of its own adapter too, whichever is active, in every thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import hooks, run
from peft import LoraConfig
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, compose

NAME, NAMES = "vit-classifier", ["plain", "one", "two", "__base__"]


def with_heads(together: bool) -> Any:
    torch.manual_seed(0)
    head: dict[str, Any] = {"num_registers": 2, "init_std": 1.0, "modules_to_save": ["classifier"]}
    if together:
        model: Any = compose(
            build(NAME), {"one": RegisterConfig(**head), "lora": LoraConfig(target_modules=["q_proj", "query"])}
        )
    else:
        model = add_registers(build(NAME), adapter_name="one", **head)
    model.add_adapter("two", RegisterConfig(**head))
    model.add_adapter("plain", RegisterConfig(num_registers=2, init_std=1.0))
    for name, value in model.named_parameters():
        if ".modules_to_save." in name:
            torch.nn.init.normal_(value)
    return model.eval()


@pytest.mark.parametrize("active", ["one", "plain"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "composed"])
def test_each_image_has_its_head(together: bool, active: str) -> None:
    model = with_heads(together)
    inputs = {key: torch.cat([value, value.flip(-1)]) for key, value in make_inputs(NAME).items()}
    rows = []
    for index, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, inputs)["logits"][index])
        else:
            model.set_adapter(name)
            rows.append(run(model, inputs)["logits"][index])
    expected = torch.stack(rows)
    model.set_adapter(active)
    before, alone = hooks(model), run(model, inputs)["logits"]
    assert_close(run(model, inputs, adapter_names=NAMES)["logits"], expected)
    assert hooks(model) == before

    def turned(turn: int) -> None:
        names = NAMES[turn:] + NAMES[:turn]
        same = {key: value[:1].expand_as(value) for key, value in inputs.items()}
        every = run(model, same, adapter_names=NAMES)["logits"]
        for _ in range(3):
            assert_close(run(model, same, adapter_names=names)["logits"], every.roll(-turn, 0))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(turned, [1, 2]))
    assert_close(run(model, inputs)["logits"], alone)
