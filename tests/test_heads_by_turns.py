"""Random operations on a model whose adapters have heads: its config names the classes of the one at work."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import build, make_inputs
from peft import IA3Config, LNTuningConfig, LoraConfig

from register_adapter import RegisterConfig, compose, load_adapters, rename_adapter

INPUTS = make_inputs("vit")
STEPS, RUNS = 12, 16
CONFIGS: dict[str, Callable[..., Any]] = {
    "registers": lambda **head: RegisterConfig(num_registers=2, **head),
    "lora": lambda **head: LoraConfig(r=2, target_modules=["q_proj", "query"], **head),
    "norms": lambda **head: LNTuningConfig(target_modules=["layernorm_before"], **head),
    "scales": lambda **head: IA3Config(
        target_modules=["fc2", "output.dense"], feedforward_modules=["fc2", "output.dense"], **head
    ),
}
#: A number of the base's own head: every output of a head is its bias here, and so tells whose head is at work.
OWN = 0.5


def base(size: int, called: str) -> Any:
    config = build("vit").config
    config.id2label = {number: f"{called} {number}" for number in range(size)}
    config.label2id = {name: number for number, name in config.id2label.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = tf.ViTForImageClassification(config).eval()
    mark(model.classifier, OWN)
    return model


@torch.no_grad()
def mark(head: Any, value: float) -> None:
    head.weight.zero_()
    head.bias.fill_(value)


class Turns:
    """A composed model, and beside it what should be so: classes and bias of the base's head and of each adapter's."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.choose, self.folder, self.done = random.Random(seed), folder, 0
        self.size = self.choose.choice([3, 5])
        self.model: Any = compose(base(self.size, "own"), {})
        self.base = dict(self.model.config.id2label), OWN
        self.methods: dict[str, str] = {}
        self.heads: dict[str, tuple[dict[int, str], float]] = {}
        self.contexts: list[tuple[set[str] | None, AbstractContextManager[None]]] = []
        self.active: list[str] = []
        self.log: list[str] = []

    @property
    def at_work(self) -> str | None:
        """The adapter whose head is at work: one that is active, and set aside by no context."""
        if any(names is None for names, _ in self.contexts):
            return None
        aside: set[str] = set().union(*(names or set() for names, _ in self.contexts))
        active = self.active if self.contexts else self.model.active_adapters
        return next((name for name in active if name in self.heads and name not in aside), None)

    @torch.no_grad()
    def check(self) -> None:
        names, value = self.heads[self.at_work] if self.at_work else self.base
        config = self.model.config
        logits = self.model(**INPUTS).logits
        assert logits.shape[1] == len(names) == config.num_labels, self.log
        assert torch.equal(logits, torch.full_like(logits, value)), self.log
        assert config.id2label == names, self.log
        assert config.label2id == {name: number for number, name in names.items()}, self.log
        assert self.model(**INPUTS, labels=torch.full(logits.shape[:1], len(names) - 1)).loss.isfinite(), self.log

    def new(self) -> str:
        self.done += 1
        return f"a{self.done}"

    def other(self) -> tuple[str, Path, tuple[dict[int, str], float]]:
        """A folder of another model, with one adapter that has a head for another number of classes."""
        method, called, value = self.choose.choice(list(CONFIGS)), self.new(), 100.0 + self.done
        other: Any = compose(
            base(self.choose.choice([3, 4, 5]), called), {"x": CONFIGS[method](modules_to_save=["classifier"])}
        )
        mark(other.get_base_model().classifier.modules_to_save["x"], value)
        other.save_pretrained(self.folder / called)
        return method, self.folder / called, (dict(other.config.id2label), value)

    # What is done; outside of contexts, but for what names and contexts do.

    def add(self) -> None:
        method, name, given = self.choose.choice(list(CONFIGS)), self.new(), self.choose.random() < 0.4
        config = CONFIGS[method](modules_to_save=["classifier"])
        if method == "registers" and given:
            config.id2label = {number: f"{name} {number}" for number in range(self.size)}
        self.model.add_adapter(name, config)
        self.methods[name] = method
        self.heads[name] = dict(getattr(config, "id2label", None) or self.base[0]), float(self.done)
        mark(self.model.get_base_model().classifier.modules_to_save[name], float(self.done))

    def add_without_head(self) -> None:
        name, method = self.new(), self.choose.choice(list(CONFIGS))
        self.model.add_adapter(name, CONFIGS[method]())
        self.methods[name] = method

    def set(self) -> None:
        self.model.set_adapter(self.choose.choice(list(self.methods)))

    def delete(self) -> None:
        name = self.choose.choice(list(self.methods))
        self.model.delete_adapter(name)
        del self.methods[name]
        self.heads.pop(name, None)

    def rename(self) -> None:
        old, new = self.choose.choice(list(self.methods)), self.new()
        rename_adapter(self.model, old, new)
        self.methods = {new if name == old else name: value for name, value in self.methods.items()}
        self.heads = {new if name == old else name: value for name, value in self.heads.items()}

    def load_over(self) -> None:
        method, folder, head = self.other()
        mine = [name for name in self.heads if self.methods[name] == method]
        name = self.choose.choice([*mine, self.new()])
        self.model.load_adapter(folder / "x", name)
        self.methods[name], self.heads[name] = method, head

    def load_more(self) -> None:
        method, folder, head = self.other()
        if "x" not in self.methods and (method != "norms" or "norms" not in self.methods.values()):  # PEFT runs one
            self.model = load_adapters(self.model, folder)
            self.methods["x"], self.heads["x"] = method, head

    def save_and_load(self) -> None:
        active, folder = sorted(self.model.active_adapters), self.folder / self.new()
        self.model.save_pretrained(folder)
        self.model = load_adapters(base(self.size, "own"), folder)
        self.base = {number: f"own {number}" for number in range(self.size)}, OWN
        assert sorted(self.model.active_adapters) == active, self.log

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def name_classes(self) -> None:
        config, called = self.model.config, self.new()
        names = {number: f"{called} {number}" for number in range(len(config.id2label))}
        config.id2label, config.label2id = dict(names), {name: number for number, name in names.items()}
        if self.at_work is None:
            self.base = names, OWN
        else:
            self.heads[self.at_work] = names, self.heads[self.at_work][1]

    def enter(self) -> None:
        names = set(self.choose.sample(sorted(self.methods), self.choose.randint(0, len(self.methods)))) or None
        self.active = self.active if self.contexts else list(self.model.active_adapters)
        context = self.model.disable_adapter(names)
        context.__enter__()
        self.contexts.append((names, context))

    def leave(self) -> None:
        if self.contexts:
            self.contexts.pop()[1].__exit__(None, None, None)

    def merge(self) -> None:
        """Merge all but registers; a head of theirs that is at work is the base's own from then on."""
        others = {name: head for name, head in self.heads.items() if self.methods[name] != "registers"}
        at_work = self.at_work
        self.model = compose(
            self.model.merge_and_unload(), {"late": LoraConfig(r=2, target_modules=["v_proj", "value"])}
        )
        self.base = others.get(at_work or "", self.base)
        self.heads = {name: head for name, head in self.heads.items() if name not in others}
        self.check()

    def step(self) -> None:
        anywhere = [self.name_classes, self.enter, self.leave, self.leave]
        making = [self.add, self.add_without_head, self.load_over, self.load_more]
        having = [self.set, self.delete, self.rename, self.save_and_load, self.copy] if self.methods else []
        does = self.choose.choice(anywhere if self.contexts else [*anywhere[:2], *making, *having])
        self.log.append(does.__name__)
        try:
            does()
        except ValueError as error:
            if "only one copy of it can be active" not in str(error):
                raise
            self.log.append("refused")
        self.check()


@pytest.mark.parametrize("seed", range(RUNS))
def test_the_config_names_the_classes_of_the_head_at_work(seed: int, tmp_path: Path) -> None:
    turns = Turns(seed, tmp_path)
    for _ in range(STEPS):
        turns.step()
    while turns.contexts:
        turns.leave()
        turns.check()
    if seed % 2 and {*turns.methods.values()} - {"registers"}:
        turns.merge()
    names, value = turns.base
    plain = turns.model.unload()
    logits = plain(**INPUTS).logits
    assert plain.config.id2label == names
    assert torch.equal(logits, torch.full((len(logits), len(names)), value))
