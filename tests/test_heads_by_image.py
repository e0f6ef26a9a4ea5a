"""With ``adapter_names=`` each image has the head of its own adapter too, whichever is active, in every thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import hooks, run
from peft import LoraConfig
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, compose, load_adapters

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


@pytest.mark.parametrize("method", ["registers", "lora"])
def test_heads_of_other_widths_are_refused_by_name(method: str, tmp_path: Path) -> None:
    head: dict[str, Any] = {"modules_to_save": ["classifier"]}
    config = {"registers": RegisterConfig(**head), "lora": LoraConfig(target_modules=["q_proj", "query"], **head)}[
        method
    ]
    wide, inputs = build(NAME), make_inputs(NAME)
    wide.classifier = torch.nn.Linear(wide.classifier.in_features, 7)
    wide.config.id2label = {index: f"class {index}" for index in range(7)}
    compose(wide, {"wide": config}).save_pretrained(tmp_path)
    model = load_adapters(build(NAME), tmp_path).eval()
    model.add_adapter("own", config)
    model.eval()
    before = hooks(model)
    for other in ("own", "__base__"):
        with pytest.raises(ValueError, match=r"different numbers of outputs .*'wide': 7.* one batch for each"):
            run(model, inputs, adapter_names=["wide", other])
    assert hooks(model) == before
    assert run(model, inputs, adapter_names=["wide"] * 2)["logits"].shape[1] == 7


@pytest.mark.parametrize("owner", ["registers", "lora"])
def test_the_head_of_another_method_stays_at_work(owner: str) -> None:
    """Also where some of the adapters that are named have heads of their own, which wait."""
    head: dict[str, Any] = {"modules_to_save": ["classifier"]}
    lora: Any = {"target_modules": ["q_proj", "query"]}
    plain = {"registers": RegisterConfig(init_std=1.0), "lora": LoraConfig(**lora)}
    headed = {"registers": RegisterConfig(init_std=1.0, **head), "lora": LoraConfig(**lora, **head)}
    named = "lora" if owner == "registers" else "registers"
    torch.manual_seed(0)
    model = compose(build(NAME), {"owner": headed[owner], "one": plain[named]}).eval()
    model.add_adapter("two", plain[named])
    model.add_adapter("waits", headed[named])
    for key, value in model.named_parameters():
        if ".modules_to_save." in key or "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3)
    inputs = {key: torch.cat([value, value[:1]]) for key, value in make_inputs(NAME).items()}
    rows = []
    for index, name in enumerate(["one", "two"]):
        model.set_adapter(name)
        rows.append(run(model, inputs)["logits"][index])
    with model.disable_adapter(["one", "two"]):
        rows.append(run(model, inputs)["logits"][2])
    names, expected = ["one", "two", "__base__"], torch.stack(rows)
    assert_close(run(model, inputs, adapter_names=names)["logits"], expected)
    assert not torch.allclose(expected, run(build(NAME), inputs)["logits"], atol=0.1)  # the head is another
    waits = run(model, inputs, adapter_names=["waits", "two", "__base__"])["logits"]
    assert_close(waits[1:], expected[1:])
    assert not torch.allclose(waits[0], expected[0], atol=0.1)
