"""What the tests compare: flat outputs, and everything about a model that a refused adapter must leave as it was."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def flatten(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in an output, by its dotted name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        return {}
    flat = {}
    for key, item in items:
        flat.update(flatten(item, f"{name}.{key}" if name else str(key)))
    return flat


def run(model: nn.Module, inputs: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """The flat outputs of a forward pass without gradients."""
    with torch.no_grad():
        return flatten(model(**inputs, **options))


#: The layers of a ViT's attention in a block, in transformers 5 and in 4.
ATTENTION_LAYERS = {
    "q_proj": ("attention.q_proj", "attention.attention.query"),
    "k_proj": ("attention.k_proj", "attention.attention.key"),
    "v_proj": ("attention.v_proj", "attention.attention.value"),
    "o_proj": ("attention.o_proj", "attention.output.dense"),
}


def attention_layers(block: nn.Module) -> SimpleNamespace:
    parts = dict(block.named_modules())
    return SimpleNamespace(
        **{name: next(parts[path] for path in paths if path in parts) for name, paths in ATTENTION_LAYERS.items()}
    )


def shapes(outputs: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in outputs.items()}


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert list(actual) == list(expected)
    different = [name for name in actual if actual[name].dtype != expected[name].dtype]
    different += [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different, f"outputs differ: {different}"


def differs(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(actual[name], expected[name]) for name in expected)


def hooks(model: nn.Module) -> dict[str, int]:
    """Number of hooks on every module that has any."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    counts = {name: sum(len(getattr(module, kind)) for kind in kinds) for name, module in model.named_modules()}
    return {name: count for name, count in counts.items() if count}


@dataclass
class Snapshot:
    """The state of a model at one time; ``check`` fails if anything of it is different later."""

    model: nn.Module
    inputs: dict[str, Any]

    def __post_init__(self) -> None:
        # transformers puts recording hooks of its own on a model at the first request for hidden states.
        run(self.model, self.inputs, output_hidden_states=True, output_attentions=True)
        self.values = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.modules = [name for name, _ in self.model.named_modules()]
        self.hooks = hooks(self.model)
        self.grads = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.attributes = set(vars(self.model))
        self.training = self.model.training
        self.outputs = run(self.model, self.inputs)

    def check_values(self) -> None:
        """The state-dict has the same keys and bits, and outputs are the same."""
        state = self.model.state_dict()
        assert list(state) == list(self.values)
        assert all(torch.equal(state[name], self.values[name]) for name in state)
        assert_identical(run(self.model, self.inputs), self.outputs)

    def check(self) -> None:
        """The same, and hooks, modules, attributes and ``requires_grad``."""
        self.check_values()
        assert hooks(self.model) == self.hooks
        assert [name for name, _ in self.model.named_modules()] == self.modules
        assert set(vars(self.model)) == self.attributes
        assert self.model.training == self.training
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.grads
