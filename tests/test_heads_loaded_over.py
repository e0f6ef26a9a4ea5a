"""Values of a file that are loaded over those of an adapter: the classes of its head come with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LOADS_HEADS, make_inputs
from helpers import Snapshot, run
from peft import LoraConfig, PeftModel
from test_composed_classes import base, names_of

from register_adapter import (
    AdapterFileError,
    PositionConfig,
    RegisterConfig,
    add_registers,
    compose,
    load_adapters,
    save_adapters,
)

HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}
OWN, FIRST = ["k", "l"], ["circle", "cross", "ring"]
#: The adapter with the head, and what is trained.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("default", {"default": RegisterConfig(**HEAD)}),
    "registers": (
        "regs",
        {"regs": RegisterConfig(**HEAD), "lora": LoraConfig(target_modules=["q_proj", "query"])},
    ),
    "lora": (
        "lora",
        {"regs": RegisterConfig(), "lora": LoraConfig(target_modules=["q_proj", "query"], **HEAD)},
    ),
    "positions": ("positions", {"positions": PositionConfig(**HEAD), "regs": RegisterConfig()}),
}


def trained(kind: str, names: list[str], seed: int, folder: Path) -> torch.Tensor:
    torch.manual_seed(seed)
    configs = copy.deepcopy(KINDS[kind][1])
    model: Any = add_registers(base(names), **HEAD) if kind == "alone" else compose(base(names), configs)
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    return run(model.eval(), make_inputs("vit"))["logits"]


def load(kind: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(base(OWN), folder) if kind == "alone" else load_adapters(base(OWN), folder)


@pytest.mark.parametrize("names", [["x", "y", "z"], ["p", "q", "r", "s"]], ids=["as many", "others"])
@pytest.mark.parametrize("part", ["whole", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_come_with_the_values(kind: str, part: str, names: list[str], tmp_path: Path) -> None:
    trained(kind, FIRST, 1, tmp_path / "first")
    logits, inputs = trained(kind, names, 2, tmp_path / "second"), make_inputs("vit")
    model, name = load(kind, tmp_path / "first"), KINDS[kind][0]
    assert names_of(model) == FIRST
    model.config.id2label, model.config.label2id = dict(enumerate("789")), {"7": 0, "8": 1, "9": 2}  # as it was
    if part == "alone" and kind != "alone":
        other = next(other for other in KINDS[kind][1] if other != name)
        model.load_adapter(tmp_path / "second" / other, other)
        assert names_of(model) == ["7", "8", "9"]
        model.load_adapter(tmp_path / "second" / name, name)
    else:
        model.load_adapter(tmp_path / "second", name)
    assert torch.equal(run(model, inputs)["logits"], logits)
    assert names_of(model) == names
    model.save_pretrained(tmp_path / "again")
    assert names_of(load(kind, tmp_path / "again")) == names
    with model.disable_adapter():
        assert names_of(model) == OWN
    assert names_of(model) == names
    assert names_of(model.unload()) == OWN


def test_weights_without_a_config_say_nothing_of_classes(tmp_path: Path) -> None:
    trained("alone", FIRST, 1, tmp_path / "first")
    logits = trained("alone", ["x", "y", "z"], 2, tmp_path / "second")
    (tmp_path / "second" / "adapter_config.json").unlink()
    model = load("alone", tmp_path / "first")
    model.load_adapter(str(tmp_path / "second"), "default")
    assert torch.equal(run(model, make_inputs("vit"))["logits"], logits)
    assert names_of(model) == FIRST


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_leaves_names_and_values(kind: str, tmp_path: Path) -> None:
    trained(kind, FIRST, 1, tmp_path / "first")
    trained(kind, ["p", "q", "r", "s"], 2, tmp_path / "second")
    model, name = load(kind, tmp_path / "first"), KINDS[kind][0]
    path = tmp_path / "second" / ("" if kind == "alone" else name) / "adapter_config.json"
    manifest = tmp_path / "second" / "adapters.json"
    wrong = {"0": "a", "2": "b"}
    if kind in ("alone", "registers"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": wrong}))
    if kind != "alone":
        entries = json.loads(manifest.read_text())
        for entry in entries["adapters"]:
            entry.pop("config_sha256")
            if entry["name"] == name and kind != "registers":
                entry["id2label"] = wrong
        manifest.write_text(json.dumps(entries))
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=r"id2label must number the classes 0, 1, 2"):
        model.load_adapter(tmp_path / "second", name)
    before.check()
    assert names_of(model) == FIRST


@pytest.mark.parametrize("own", [OWN, ["x", "y", "z"]], ids=["others", "as many"])
@pytest.mark.parametrize("kind", ["lora", "positions"])
def test_they_come_with_a_new_adapter_from_a_folder_of_several(kind: str, own: list[str], tmp_path: Path) -> None:
    logits, name = trained(kind, FIRST, 1, tmp_path), KINDS[kind][0]
    model: Any = compose(base(own), {"regs": RegisterConfig()})
    model.load_adapter(tmp_path / "regs", "regs")
    model.load_adapter(tmp_path / name, "new")
    assert names_of(model) == FIRST
    assert torch.equal(run(model.eval(), make_inputs("vit"))["logits"], logits)
    assert list(model.unload().config.id2label.values()) == own


@pytest.mark.skipif(not LOADS_HEADS, reason="these transformers forget modules_to_save, and are refused by name")
@pytest.mark.parametrize("config", [RegisterConfig(**HEAD), PositionConfig(**HEAD)], ids=["registers", "positions"])
def test_the_second_adapter_that_transformers_loads_has_its_head(config: Any, tmp_path: Path) -> None:
    made: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(["one", "two"]):
        model: Any = compose(base(OWN), {name: copy.deepcopy(config)})
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_base_model().classifier.modules_to_save[name].weight)
        save_adapters(model, tmp_path)
        made[name] = run(model.eval(), make_inputs("vit"))["logits"]
    plain = base(OWN)
    for name in made:
        plain.load_adapter(str(tmp_path / name), name)
        assert plain.active_adapters() == [name]
        assert torch.equal(run(plain, make_inputs("vit"))["logits"], made[name])
    plain.set_adapter("one")
    assert torch.equal(run(plain, make_inputs("vit"))["logits"], made["one"])


@pytest.mark.parametrize("part", ["", "lora"], ids=["whole", "alone"])
def test_a_head_is_not_loaded_into_the_base(part: str, tmp_path: Path) -> None:
    """The adapter of that name has none here, and the base's own is called as the file's."""
    for name, head in (("with", HEAD), ("without", {})):
        lora = LoraConfig(target_modules=["q_proj", "query"], **head)
        compose(base(FIRST), {"lora": lora, "regs": RegisterConfig()}).save_pretrained(tmp_path / name)
    model: Any = load_adapters(base(["k", "l", "m"]), tmp_path / "without")
    torch.nn.init.normal_(model.get_base_model().classifier.weight)
    before = Snapshot(model, make_inputs("vit"))
    with pytest.raises(AdapterFileError, match=r"would replace tensors of the base .*classifier"):
        model.load_adapter(tmp_path / "with" / part, "lora")
    before.check()
