"""Adapters through random chains of files: between backbones and heads, by every way in, beside plain tensors.

The reference knows no adapter's file: a fresh base with the deltas of LoRA added to its weights by hand, the offsets to
its positions, the head's values copied in, and the registers' values copied into new registers.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build
from helpers import run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from register_adapter import PositionConfig, RegisterConfig, compose, find_tower, load_adapters, save_adapters
from register_adapter.tuner.composed import load_onto
from register_adapter.tuner.layer import find_register_layer

HEADS: dict[str, Any] = {
    "vit": tf.ViTForImageClassification,
    "dinov2": tf.Dinov2ForImageClassification,
    "clip-vision": tf.CLIPForImageClassification,
}
SIZES, RUNS, PIXELS = (2, 3, 5), 16, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = [["q_proj", "query"], ["fc1", "intermediate.dense"], ["q_proj", "v_proj", "query", "value"]]
PLACES: list[dict[str, Any]] = [{}, {"insert_layer": 1}, {"deep": True}, {"gate": 0.5}, {"key_value": True}]


def whole(family: str, size: int) -> Any:
    """A model with a new head for so many classes, around the family's one tower."""
    config = build("clip-classifier" if family == "clip-vision" else family).config
    config.id2label = {number: f"LABEL_{number}" for number in range(size)}
    config.label2id = {name: number for number, name in config.id2label.items()}
    model = HEADS[family](config)
    find_tower(model).module.load_state_dict(find_tower(build(family)).module.state_dict(), strict=False)
    return model.eval().requires_grad_(False)


class Chain:
    """What a chain of files hands on, as plain tensors; ``names`` are the head's classes, ``None`` without one."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.choose, self.folder = random.Random(seed), folder
        torch.manual_seed(seed)
        self.family = self.choose.choice(list(HEADS))
        self.place, self.targets = self.choose.choice(PLACES), self.choose.choice(TARGETS)
        size, methods = self.choose.choice(SIZES), ["registers", "lora", "positions"]
        self.methods = self.choose.sample(methods, self.choose.choice([2, 3]))
        self.owner = self.choose.choice([None, *self.methods])
        self.names = {number: f"class {number}" for number in range(size)} if self.owner else None
        self.log: list[Any] = [self.family, self.place, self.targets, self.methods, self.owner, size]
        self.model: Any = compose(self.base(size, self.names), self.configs())
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        self.values = {key: value.clone() for key, value in self.model.state_dict().items()}

    def base(self, size: int | None, names: dict[int, str] | None = None) -> Any:
        """A fresh model, the backbone for ``None``."""
        model = build(self.family) if size is None else whole(self.family, size)
        if names:
            model.config.id2label, model.config.label2id = dict(names), {names[key]: key for key in names}
        return model

    def configs(self, head: bool = True) -> dict[str, Any]:
        configs: dict[str, Any] = {
            "registers": RegisterConfig(num_registers=2, **self.place),
            "lora": LoraConfig(r=2, lora_alpha=4, target_modules=list(self.targets), init_lora_weights=False),
            "positions": PositionConfig(),
        }
        if head and self.owner and self.names:
            configs[self.owner].modules_to_save = ["classifier"]
        return {name: configs[name] for name in self.methods}

    def of(self, *marks: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.values.items() if all(mark in key for mark in marks)}

    @torch.no_grad()
    def expected(self, size: int | None, only: str | None) -> Any:
        """The reference, with the adapters in ``methods`` or one of them."""
        has = [only] if only else self.methods
        head = self.names if size is not None and self.owner in has else None
        model = self.base(len(head) if head else size)
        tower = find_tower(model)
        for key, down in self.of(".lora_A.").items() if "lora" in has else ():
            path = next(name for name, _ in tower.module.named_modules() if name and f".{name}.lora_A." in key)
            up = self.values[key.replace(".lora_A.", ".lora_B.")]
            tower.module.get_submodule(path).weight += 2 * up @ down
        for value in self.of("offset_positions_values").values() if "positions" in has else ():
            own = tower.part("position_embedding")
            (own.weight if isinstance(own, nn.Embedding) else own).add_(value)
        if head:
            values = self.of(f".classifier.modules_to_save.{self.owner}.")
            model.classifier.load_state_dict({key.rpartition(".")[2]: value for key, value in values.items()})
        if "registers" in has:
            model = get_peft_model(model, RegisterConfig(num_registers=2, **self.place))
            layer = find_register_layer(model)
            for name, parameter in layer.tokens("default").named_parameters():
                (value,) = self.of("register_adapter_tokens.registers.", f".{name}").values()
                parameter.copy_(value)
        return model.eval()

    def check(self, model: Any, size: int | None, only: str | None = None) -> None:
        expected, options = self.expected(size, only), {"output_hidden_states": True}
        given = run(model.eval(), {"pixel_values": PIXELS}, **options)
        wanted = run(expected, {"pixel_values": PIXELS}, **options)
        head = size is not None and self.names and only in (None, self.owner)
        assert given.keys() == wanted.keys(), self.log
        for name, value in wanted.items():
            if name.startswith("hidden_states") or (head and name == "logits"):
                assert value.shape == given[name].shape, (name, self.log)
                assert torch.allclose(value, given[name], atol=1e-4), (name, self.log)
        if head and only != "positions":  # whose config has no names; they are in the manifest of the folder
            assert model.config.id2label == self.names, self.log

    def hop(self, number: int) -> None:
        """Save, and load on another model in another way."""
        folder, size = self.folder / str(number), self.choose.choice([None, *SIZES])
        way = self.choose.choice(["all", "in turns", "over", "one", "as commands do"])
        self.log.append((way, size))
        self.choose.choice([save_adapters, lambda model, place: model.save_pretrained(place)])(self.model, folder)
        if way == "one":
            self.check_one(folder, size)
            return
        model: Any = self.base(size)
        if way == "in turns":
            for name in self.choose.sample(self.methods, len(self.methods)):
                model = load_adapters(model, folder, selected_adapters=[name])
        elif way == "over":
            model = compose(model, self.configs(head=size is not None))
            model.load_adapter(folder, self.methods[0])
        else:
            model = load_onto(model, folder) if way == "as commands do" else load_adapters(model, folder)
        self.model = model
        self.names = None if size is None else self.names
        self.check(model, size)

    def check_one(self, folder: Path, size: int | None) -> None:
        name = self.choose.choice([name for name in self.methods if name != "lora"])
        if size is not None and self.names and name == self.owner == "positions":
            size = len(self.names)  # as any method of PEFT's but registers, it wants a head of its own size
        self.check(PeftModel.from_pretrained(self.base(size), folder / name), size, name)


@pytest.mark.parametrize("seed", range(RUNS))
def test_every_model_at_the_end_of_a_chain_is_the_one_at_its_start(seed: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = Chain(seed, tmp_path)
        chain.check(chain.model, len(chain.names) if chain.names else chain.log[5])
        for number in range(3):
            chain.hop(number)
