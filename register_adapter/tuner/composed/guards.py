"""What must hold while adapters of several methods are put on, taken off and switched: gradients, hooks, heads."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from ..layer import RegisterLayer
from ..left_out import in_context

__all__ = ["SWITCHING", "check_heads", "check_merges", "check_switched_on", "flags_kept", "hooks_lifted"]

#: Held by a thread that switches layers of PEFT's.
SWITCHING = threading.RLock()


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every parameter that is there now its ``requires_grad`` back: PEFT's calls move it for whole models."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


def check_switched_on(model: nn.Module) -> None:
    """PEFT's own switch is not off for the adapters that are there: those that come would be at work without them.

    Raises:
        ValueError: It is, and not because a model of this package has set them aside.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = [layer for layer in layers if not isinstance(layer, RegisterLayer)]
    if others and all(layer.disable_adapters for layer in others) and not in_context(model):
        raise ValueError(
            f"the adapters of {type(model).__name__} are switched off: is this inside `with model.disable_adapter()` "
            "of a PeftModel, or behind disable_adapters()? Add adapters after that context, or behind "
            "enable_adapters(). Nothing was changed."
        )


@contextlib.contextmanager
def hooks_lifted(model: nn.Module) -> Iterator[None]:
    """Take the registers' hooks off while modules are replaced: layer norm tuning copies modules with their hooks."""
    layers = [module for module in model.modules() if isinstance(module, RegisterLayer) and module.names]
    for layer in layers:
        layer._remove_hooks()
    try:
        yield
    finally:
        for layer in layers:
            if layer.names and any(module is layer for module in model.modules()):
                layer.attach()


def check_heads(configs: dict[str, PeftConfig], active: Iterable[str]) -> None:
    """A module of ``modules_to_save`` has one trained copy at a time.

    Raises:
        ValueError: Two of the adapters that are to be active name the same module.
    """
    owner: dict[str, str] = {}
    for name in active:
        for head in getattr(configs[name], "modules_to_save", None) or ():
            if owner.setdefault(head, name) != name:
                raise ValueError(
                    f"the adapters {owner[head]!r} and {name!r} both have {head!r} in modules_to_save: only one copy "
                    "of it can be active. Leave it to one of them, or activate them in turn."
                )


def check_merges(layers: Iterable[tuple[BaseTunerLayer, list[str] | None]], safe_merge: bool) -> None:
    """Try every merge on a copy of its layer, one at a time, so that one which fails leaves no layer merged.

    Args:
        layers: Layers, and the names of the adapters that are to be merged, ``None`` for the active ones.
        safe_merge: As for PEFT's ``merge``.

    Raises:
        ValueError: A weight would not be finite; or whatever else PEFT's ``merge`` raises.
    """
    for layer, names in layers:
        with onload_layer(layer):
            trial: Any = copy.deepcopy(layer)
            trial.merge(safe_merge=safe_merge, adapter_names=names)
