"""Training from fitted registers: what a new adapter starts from, with its neurons kept, dropped or annealed away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..data.batches import Batch
from ..features.threads import in_this_thread
from ..towers.calls import first_of
from ..towers.modes import evaluating
from ..tuner.layer import require_register_layer
from ..tuner.peft_model import RegisterPeftModel
from ..tuner.registers import RegisterTokens
from .scores import run_up_to

__all__ = ["Neurons", "Start", "set_strength", "start_from"]

#: ``"keep"`` trains their strengths too; ``"drop"`` starts plain registers behind the neurons' last block, with what
#: the shift put into them; ``"anneal"`` lets the strengths go from 1 to 0 while the registers learn.
Neurons = Literal["keep", "drop", "anneal"]


class Start(NamedTuple):
    """Where a new adapter starts.

    Attributes:
        options: Arguments of :class:`RegisterConfig`.
        fill: Writes the values into the new adapter's tokens.
    """

    options: dict[str, Any]
    fill: Callable[[RegisterTokens], None]


def start_from(fitted: RegisterPeftModel, neurons: Neurons = "keep", batches: Iterable[Batch] = ()) -> Start:
    """What a new adapter on the same base starts from.

    Args:
        fitted: A model with an active register adapter, such as :func:`fit_test_time_registers` returns; its adapter
            may be removed from it afterwards.
        neurons: What becomes of the register neurons, see :data:`Neurons`.
        batches: A few images, on the model's device; needed to drop neurons.

    Raises:
        ValueError: There are no neurons to drop or to anneal, no images to drop them with, or the attention-bias form
            has no register to start from.
    """
    name = str(fitted.active_adapter)
    config, layer = fitted.peft_config[name], require_register_layer(fitted)
    tokens = layer.tokens(name)
    keys = ("num_registers", "insert_layer", "deep", "key_value", "gate", "remove", "attentions", "target_modules")
    options: dict[str, Any] = {key: getattr(config, key) for key in (*keys, "anatomy", "test_time_fit")}
    if not tokens.slices and neurons != "keep":
        raise ValueError(f"the adapter {name!r} has no register neurons to {neurons}")
    if neurons == "drop":
        if config.key_value:
            raise ValueError("the attention-bias form has no register in the sequence to start from; keep its neurons")
        last = len(layer.tower.part("blocks")) - 1
        block = min(max(tokens.slices), last)
        values = _mean_state(fitted, block, batches)
        options.update(insert_layer=min(block + 1, last), remove="zero")
        return Start(options, lambda new: _copy(new, {"weight": values}))
    options.update(init=config.init, init_std=config.init_std)
    values_by_name = {key: value.detach().clone().cpu() for key, value in tokens.state_dict().items()}
    if tokens.slices:
        options.update(register_neurons=tokens.neurons(), init="test_time", train_removal=neurons == "keep")
    return Start(options, lambda new: _copy(new, values_by_name))


@torch.no_grad()
def _copy(tokens: RegisterTokens, values: dict[str, torch.Tensor]) -> None:
    for key, value in values.items():
        getattr(tokens, key).copy_(value)


def _mean_state(fitted: RegisterPeftModel, block: int, batches: Iterable[Batch]) -> torch.Tensor:
    """``(R, D)``: the registers as they leave ``block``, mean over images."""
    layer = require_register_layer(fitted)
    tower, start = layer.tower, layer.prefix
    total: Any = 0
    number = 0

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total, number
        hidden = first_of(output)
        total = total + hidden[:, start : start + layer.count_at(block)].float().sum(0)
        number += len(hidden)

    handle = tower.part("blocks")[block].register_forward_hook(in_this_thread(keep), prepend=True)
    try:
        with evaluating(tower.module):
            for batch in batches:
                run_up_to(tower, block, batch)
    finally:
        handle.remove()
    if not number:
        raise ValueError("dropping neurons needs images, for what the registers hold behind them; none came")
    mean: torch.Tensor = total / number
    return mean.cpu()


@torch.no_grad()
def set_strength(model: nn.Module, strength: float) -> None:
    """Set how far the active adapters' neurons are shifted; other adapters of the model keep theirs.

    Args:
        model: A model with registers.
        strength: From 0, as the base computes them, to 1, as fitted.

    Raises:
        ValueError: ``strength`` is outside of 0…1 or not finite, or the model has no registers.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength!r:.100}")
    layer = require_register_layer(model)
    for tokens in map(layer.tokens, layer.active_names):
        if tokens.slices:
            tokens.strength.fill_(strength)
