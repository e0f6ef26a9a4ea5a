"""Adapters of a kind that is there already are added and deleted by one thread while others run the model."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from families import build, make_inputs
from helpers import run
from torch.testing import assert_close

from register_adapter import RegisterConfig, add_registers, find_register_layer

WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"num_registers": 3},
    "insert_layer": {"num_registers": 2, "insert_layer": 1},
    "key_value": {"num_registers": 2, "key_value": True, "gate": -1.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_while_it_runs(way: str) -> None:
    torch.manual_seed(0)
    model = add_registers(build("vit"), init_std=1.0, **WAYS[way]).eval()
    inputs = make_inputs("vit")
    expected, failed, switching = run(model, inputs), [], sys.getswitchinterval()

    def come_and_go() -> None:
        try:
            for _ in range(6):
                model.add_adapter("guest", RegisterConfig(**WAYS[way]))
                model.delete_adapter("guest")
        except Exception as error:  # in a thread nobody sees it
            failed.append(error)

    thread = threading.Thread(target=come_and_go)
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        while thread.is_alive():
            assert_close(run(model, inputs), expected)
    finally:
        thread.join()
        sys.setswitchinterval(switching)
    assert not failed
    assert find_register_layer(model).names == ["default"]


@pytest.mark.parametrize("way", WAYS)
def test_hooks_stay_where_they_are(way: str) -> None:
    model = add_registers(build("vit"), **WAYS[way])
    layer: Any = find_register_layer(model)
    before = list(layer._handles)
    model.add_adapter("guest", RegisterConfig(**WAYS[way]))
    assert list(map(id, layer._handles)) == list(map(id, before))
    model.add_adapter("late", RegisterConfig(num_registers=1, register_neurons={0: [1]}, init="test_time"))
    assert list(map(id, layer._handles)) != list(map(id, before))


def test_two_threads_add_adapters() -> None:
    model, inputs = add_registers(build("vit"), init_std=1.0).eval(), make_inputs("vit")
    expected, failed, switching = run(model, inputs), [], sys.getswitchinterval()

    def add(name: str) -> None:
        for number, way in enumerate((*WAYS, *WAYS)):
            try:
                model.add_adapter(f"{name}{number}", RegisterConfig(**WAYS[way]))
            except Exception as error:
                if "dictionary changed size" not in str(error):  # PEFT's own, for LoRA too
                    failed.append(error)

    threads = [threading.Thread(target=add, args=(name,)) for name in "pq"]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
    finally:
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switching)
    assert not failed
    assert_close(run(model, inputs), expected)
    assert set(model.peft_config) <= set(find_register_layer(model).names)


@pytest.mark.parametrize("walk", ["modules", "named_parameters", "eval"])
@pytest.mark.parametrize("adding", [True, False])
def test_whoever_walks_over_a_model_is_not_disturbed(walk: str, adding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As readings and saves do; another thread may come in at any step of it."""
    model = add_registers(build("vit"), 2).eval()
    if not adding:
        model.add_adapter("guest", RegisterConfig(num_registers=2))
    before = [type(module) for module in model.modules()]
    came = []

    def come_or_go() -> None:
        if not came:
            came.append(True)
            if adding:
                model.add_adapter("guest", RegisterConfig(num_registers=2))
            else:
                model.delete_adapter("guest")

    layer = find_register_layer(model)
    assert layer is not None
    if walk == "eval":
        tokens = type(layer.tokens("default"))
        monkeypatch.setattr(tokens, "train", lambda self, mode: (come_or_go(), torch.nn.Module.train(self, mode))[1])
        model.eval()
    elif walk == "modules":
        seen = []
        for module in model.modules():
            seen.append(type(module))
            if module is layer.tokens("default"):
                come_or_go()
        assert seen == before
    else:
        for name, _ in model.named_parameters():
            if "register_adapter_tokens.default" in name:
                come_or_go()
    assert came
    assert ("guest" in layer.names) == adding
