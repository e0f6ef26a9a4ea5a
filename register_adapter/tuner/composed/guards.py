"""What must hold while adapters of several methods are put on, taken off and switched: gradients, hooks, heads."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...utils.adapter_file import check_savable_modules
from ...utils.module_names import check_copies_load
from .._peft_compat import name_linear_layers
from ..checks.copied_layers import check_own_layers, wrappers
from ..checks.head_weights import lacking_heads
from ..heads import TASK_HEADS, TRAINED_BESIDE, check_adapter_name
from ..layer import RegisterLayer
from ..left_out import in_context
from ..saved_keys import copied_modules
from .names import configs_of

__all__ = [
    "SWITCHING",
    "check_heads",
    "check_layers",
    "check_merges",
    "check_switched_on",
    "check_unmerged",
    "fit_copies",
    "flags_kept",
    "heads_given",
    "hooks_lifted",
    "settle_head",
    "still_active",
    "train_biases",
    "trained_beside",
    "with_task_heads",
]

#: Whether the configs of adapters to come name every head that they train.
_GIVEN: ContextVar[bool] = ContextVar("heads given", default=False)
#: Held by a thread that switches layers of PEFT's.
SWITCHING = threading.RLock()


def fit_copies(model: nn.Module, name: str, config: PeftConfig) -> None:
    """What an adapter saves as a whole can be loaded again by the keys that PEFT writes, and gets no layers.

    Raises:
        ValueError: It cannot, because of the modules' names or of the adapter's.
    """
    names = getattr(config, "modules_to_save", None) or ()
    check_copies_load(model, names, by_end=False)
    check_savable_modules(dict(copied_modules(model, names)), own=False)
    check_adapter_name(model, name, names)
    leave_out_copies(model, config)


@contextlib.contextmanager
def heads_given() -> Iterator[None]:
    """Adapters that are put on within the context train the heads that their configs name, and none for a task."""
    token = _GIVEN.set(True)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def with_task_heads(
    base: nn.Module, configs: Mapping[str, PeftConfig], together: bool = False
) -> dict[str, PeftConfig]:
    """The configs of adapters to come with the heads that PEFT's classes for a ``task_type`` have them train.

    Args:
        base: The base model.
        configs: Config by name.
        together: They are active together, and with those that are there: a head that one of them trains is left to
            it. Otherwise it is left to adapters of other methods.
    """
    given = dict(configs)
    for name, config in configs.items() if not _GIVEN.get() else ():
        saved = list(getattr(config, "modules_to_save", None) or ())
        others = {key: other for key, other in {**configs_of(base), **given}.items() if key != name}
        rivals = [other for other in others.values() if together or other.peft_type != config.peft_type]
        taken = {head for other in rivals for head in getattr(other, "modules_to_save", None) or ()}
        heads = [head for head in TASK_HEADS.get(config.task_type, ()) if head not in {*saved, *taken}]
        if added := [head for head in heads if head not in lacking_heads(base, heads)]:
            given[name] = copy.deepcopy(config)
            cast(Any, given[name]).modules_to_save = [*saved, *added]
    return given


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every parameter that is there now its ``requires_grad`` back: PEFT's calls move it for whole models."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


@contextlib.contextmanager
def trained_beside(configs: Iterable[PeftConfig]) -> Iterator[None]:
    """Have registers know which modules the adapters that come after them will train."""
    token = TRAINED_BESIDE.set(
        tuple(name for config in configs for name in getattr(config, "modules_to_save", None) or ())
    )
    try:
        yield
    finally:
        TRAINED_BESIDE.reset(token)


def train_biases(model: nn.Module, name: str, config: PeftConfig, alone: bool) -> None:
    """Have biases of the base be trained that an adapter trains beside its own parameters, and none by a frozen one.

    PEFT marks those of a first adapter alone, of a frozen one too.

    Args:
        model: The model, the adapter on it.
        name: The adapter's name.
        config: Its config; ``bias`` is ``"all"``, or ``"lora_only"`` and the like: of the layers that it is in.
        alone: Whether the model has no other adapter.
    """
    which = getattr(config, "bias", None)
    if config.inference_mode and alone:
        model.requires_grad_(False)
    if config.inference_mode or not isinstance(which, str) or which == "none":
        return
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if which != "all":
        mine = [layer for layer in layers if name in layer._all_available_adapter_names()]
        biases = [bias for layer in mine if isinstance(bias := getattr(layer, "bias", None), nn.Parameter)]
    else:
        parts: list[nn.Module] = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        parts += [getattr(layer, part) for layer in layers for part in layer.adapter_layer_names]
        others = {id(parameter) for part in parts for parameter in part.parameters()}
        named = [(f".{key}", value) for key, value in model.named_parameters()]
        biases = [value for key, value in named if key.endswith(".bias") and id(value) not in others]
    for bias in biases:
        bias.requires_grad = True


def check_switched_on(model: nn.Module) -> None:
    """PEFT's own switch is not off for the adapters that are there: those that come would be at work without them.

    Raises:
        ValueError: It is, and not because a model of this package has set them aside.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if not layer._all_available_adapter_names():  # left behind by adapters that were deleted while they were off
            layer._disable_adapters = False
    off = [
        [layer._disable_adapters for layer in layers if isinstance(layer, RegisterLayer) == ours]
        for ours in (True, False)
    ]
    if any(switches and all(switches) for switches in off) and not in_context(model):
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


def still_active(configs: dict[str, PeftConfig], active: list[str], before: list[str]) -> tuple[list[str], bool]:
    """The adapters that are to be active after one was deleted.

    PEFT has the next one of its method take its place. That one may have the same head as one of another method.

    Args:
        configs: Config by name of those that are left.
        active: Those that PEFT has left active.
        before: Those that were active.

    Returns:
        Them, and whether PEFT's choice is not among them.
    """
    try:
        check_heads(configs, active)
    except ValueError:
        return [name for name in active if name in before], True
    return active, False


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


def check_unmerged(model: nn.Module, names: Iterable[str]) -> None:
    """No tuned layer norms of these adapters are merged: PEFT has them and the base's change places for as long.

    Raises:
        ValueError: Some are, and what is saved or loaded by their names would be the base's.
    """
    for path, layer in model.named_modules():
        merged = layer.merged_adapters if isinstance(layer, LNTuningLayer) else []
        if swapped := sorted({*names} & {*merged}):
            raise ValueError(
                f"the tuned layer norms of the adapter {swapped[0]!r} are merged, and {path!r} has the base's in "
                "their place: call unmerge_adapter() first"
            )


def leave_out_copies(model: nn.Module, config: PeftConfig) -> None:
    """Have ``target_modules="all-linear"`` name the linear layers outside of what other adapters train as a whole."""
    copied = tuple(f"{path}." for path in wrappers(model))
    if copied and str(getattr(config, "target_modules", None)).lower() == "all-linear":
        every: Any = name_linear_layers(config, model)
        every.target_modules = {name for name in every.target_modules if not name.startswith(copied)}


def settle_head(head: AuxiliaryTrainingWrapper, kept: Iterable[str], merge: bool) -> None:
    """Take the copies of a head away whose adapters are gone, where another adapter's stays.

    Args:
        head: The head.
        kept: Names of the adapters that stay.
        merge: Whether a copy that is at work becomes the base's own.
    """
    active, gone = list(head.active_adapters), sorted(set(head._adapters) - set(kept))
    with flags_kept(head):
        for name in gone:
            if merge and name in active and not head.disable_adapters:
                head.original_module = cast(Any, head).modules_to_save[name]
            head.delete_adapter(name, None)
        if gone:
            head.set_adapter([name for name in active if name not in gone])


def check_layers(model: nn.Module, name: str) -> None:
    """An adapter's layers are on none of another method's, and in no module that another adapter trains as a whole.

    Raises:
        ValueError: They could not be merged or taken off one by one, or saved.
    """
    for path, layer in model.named_modules():
        inner = getattr(layer, "base_layer", None) if isinstance(layer, BaseTunerLayer) else None
        below = [inner, *(inner.children() if isinstance(inner, nn.Module) else ())]
        others = [part for part in below if isinstance(part, BaseTunerLayer) and _method(part) != _method(layer)]
        if others:
            raise ValueError(
                f"the adapter {name!r} targets {path!r}, which the method {_method(others[0])!r} wraps already: "
                "stacked layers cannot be merged or taken off one by one. Give them different target_modules."
            )
    check_own_layers(model)


def _method(layer: Any) -> str:
    # Layers of one method (linear, convolution, quantised) have several classes, in one package.
    return type(layer).__module__.rpartition(".")[0]
