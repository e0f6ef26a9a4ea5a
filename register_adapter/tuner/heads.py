"""Modules trained and saved as a whole beside the registers: which there are, their classes, what nobody trains."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..towers.tower import Tower
from ..utils.adapter_file import TensorInfo
from ..utils.arguments import check_mapping

__all__ = [
    "TASK_HEADS",
    "TRAINED_BESIDE",
    "HeadLabels",
    "check_adapter_name",
    "checked_labels",
    "fit_heads",
    "heads_aside",
    "labels_for",
    "lacking_modules",
    "modules_called",
    "name_classes",
    "number_of_labels",
    "renew_shown",
]

#: What PEFT itself adds to ``modules_to_save`` for a ``task_type``, whether or not a model has a module of that name.
TASK_HEADS: dict[Any, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: Modules that the adapters of the call to ``compose`` in progress save, trained as a whole.
TRAINED_BESIDE: ContextVar[tuple[str, ...]] = ContextVar("TRAINED_BESIDE", default=())


def checked_labels(labels: Any) -> dict[int, str]:
    """``id2label`` with numbers for keys, as JSON does not have them.

    Raises:
        TypeError: It is no dictionary, or a name is not a string.
        ValueError: The numbers are not 0, 1, 2…
    """
    check_mapping("id2label", labels, "of names")
    if wrong := [name for name in labels.values() if not isinstance(name, str)]:
        raise TypeError(f"id2label must hold names, got {wrong[0]!r} of type {type(wrong[0]).__name__}")
    numbered = {int(key): name for key, name in labels.items() if str(key).isdecimal()}
    if not labels or sorted(numbered) != list(range(len(labels))):
        raise ValueError(f"id2label must number the classes 0, 1, 2…, got the numbers {list(labels)[:5]}")
    return dict(sorted(numbered.items()))


def modules_called(model: nn.Module, wanted: str) -> dict[str, nn.Module]:
    """The modules whose name ends with ``wanted``, as in PEFT, by their names."""
    return {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{wanted}")}


def lacking_modules(model: nn.Module, tower: Tower, names: Iterable[str]) -> list[str]:
    """The names that lead to no module of the model.

    Raises:
        ValueError: A name leads to a module that has the registers' hooks: PEFT makes a copy, hooks and all.
    """
    hooked = [tower.module, tower.part("embeddings"), tower.part("remove")]
    lacking = []
    for wanted in dict.fromkeys(names):
        modules = modules_called(model, wanted)
        if not modules:
            lacking.append(wanted)
        if any(part is hook for module in modules.values() for part in module.modules() for hook in hooked):
            raise ValueError(
                f"modules_to_save names {wanted!r}, where registers enter or leave {type(tower.module).__name__}: it "
                "cannot be trained and saved as a whole beside them. Name a head, or a block."
            )
    return lacking


def check_adapter_name(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """An adapter's name is a part of its tensors' keys, and is told apart from the heads' own names.

    Raises:
        ValueError: PEFT would take it for a module of ``names``, or for a tensor in one.
    """
    for wanted, called in ((name, modules_called(model, name).values()) for name in names):
        keys = [key for m in called for key in getattr(m, "original_module", m).state_dict()]
        if keys and (adapter_name.endswith(wanted) or any(adapter_name in key.split(".") for key in keys)):
            raise ValueError(
                f"an adapter called {adapter_name!r} cannot have {wanted!r} in modules_to_save: PEFT would take "
                "its name for that of the module, or of a tensor in it. Choose another adapter_name."
            )


def _named(model: nn.Module) -> dict[int, str] | None:
    """The classes that the model's config names, ``None`` if it is not a transformers config or names none."""
    config = getattr(model, "config", None)
    labels = None if isinstance(config, dict) else getattr(config, "id2label", None)
    return {int(key): str(name) for key, name in labels.items()} if isinstance(labels, dict) and labels else None


def _own_labels(model: nn.Module) -> dict[int, str] | None:
    """The same, of the base's own head, while the config names the classes of an adapter's."""
    while isinstance(model, PeftModel):
        model = model.base_model.model
    renew_shown(model)
    shown = _CONFIGS.get(id(model))
    if shown is not None and shown.own is not None and _named(model) == shown.labels:
        return {int(key): str(name) for key, name in shown.own[0].items()} or None
    return _named(model)


def number_of_labels(model: nn.Module) -> int:
    """How many classes the model's config names for its own head."""
    return len(_own_labels(model) or ())


def labels_for(
    model: nn.Module, names: Iterable[str], given: dict[int, str] | None, adapter_name: str | None = None
) -> dict[int, str] | None:
    """The classes of an adapter's head: those that are given, or that the model's config names for its own.

    Args:
        model: The base model.
        names: ``modules_to_save``.
        given: ``id2label``.
        adapter_name: The adapter, if it has its copies of those modules already.

    Returns:
        ``None`` if no linear layer among those modules has an output for each class.

    Raises:
        ValueError: Classes are given and no such layer has as many outputs.
    """
    labels = given or _own_labels(model)
    if labels is None:
        return None
    heads = [_copy(module, adapter_name) for name in names for module in modules_called(model, name).values()]
    parts = [part for head in heads for part in head.modules()]
    sizes = {part.out_features for part in parts if isinstance(part, nn.Linear)}
    if len(labels) in sizes:
        return dict(labels)
    if given is None:
        return None
    raise ValueError(
        f"id2label names {len(given)} classes and the modules of modules_to_save ({list(names)}) have {sorted(sizes)} "
        f"outputs. Load the base with that many: from_pretrained(..., num_labels={len(given)}, "
        f"ignore_mismatched_sizes=True), or for timm create_model(..., num_classes={len(given)})."
    )


def _copy(module: nn.Module, adapter_name: str | None) -> nn.Module:
    """What an adapter has, or will have, of a module that others may have copies of too."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return cast(nn.Module, dict(module.modules_to_save.items()).get(adapter_name or "", module.original_module))


def fit_heads(
    model: nn.Module,
    adapter_name: str,
    classes: tuple[int, int] | None = None,
    state_dict: Mapping[str, torch.Tensor | TensorInfo] | None = None,
) -> int | None:
    """Give a saved head its own number of classes: the base's head, of which PEFT makes a copy, may have another.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        classes: Numbers of classes of the base and of the adapter, as their configs have it.
        state_dict: The adapter's tensors, or what their file says of them, by the model's keys; the head's weight tells
            the number.

    Returns:
        The new number of classes, ``None`` where nothing was to be done.
    """
    own, rows = classes or (number_of_labels(model), None)
    changed = None
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        head = module.modules_to_save[adapter_name]
        if not isinstance(head, nn.Linear):
            continue
        number = rows if state_dict is None and module.original_module.out_features == own else None
        saved = (state_dict or {}).get(f"{name}.modules_to_save.{adapter_name}.weight")
        if saved is not None and saved.shape[1:] == head.weight.shape[1:]:
            number = saved.shape[0]
        if number is not None and number != head.out_features:
            resized = nn.Linear(head.in_features, number, bias=head.bias is not None)
            if resized.weight.is_meta:  # PEFT's low_cpu_mem_usage; its copies of modules have values all the same
                resized.to_empty(device=head.weight.device).reset_parameters()
            resized.to(head.weight)
            module.modules_to_save[adapter_name] = resized.requires_grad_(head.weight.requires_grad)
            changed = number if module.original_module.out_features == own else changed
    return changed


class _Shown:
    """What a model's config names now in the place of its own classes: all who show some share one."""

    def __init__(self) -> None:
        self.own: tuple[Any, Any] | None = None
        self.labels: dict[int, str] | None = None
        self.by: HeadLabels | None = None

    def forget(self) -> None:
        self.own = self.labels = self.by = None


#: By the id of a model what its config shows; those who show it keep both alive.
_CONFIGS: WeakValueDictionary[int, _Shown] = WeakValueDictionary()


class HeadLabels(dict[str, dict[int, str]]):
    """Adapter name to the classes of its head; those of the active one stand in the model's config.

    ``pipeline``, a loss from ``labels=`` and whatever else asks the config then sees the head that is at work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._model: list[nn.Module] = []  # in a list, which is not a submodule of whoever holds this
        self._shown = _Shown()
        self._name: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for model in self._model:
            _CONFIGS[id(model)] = self._shown  # the copy's own

    @property
    def model(self) -> nn.Module | None:
        """The model whose config shows them."""
        return self._model[0] if self._model else None

    def bind(self, model: nn.Module) -> None:
        """Name the model whose config is to show them."""
        self._model, self._shown = [model], _CONFIGS.setdefault(id(model), self._shown)

    def renew(self) -> None:
        """Take over the names that somebody has given to the classes of the adapter at work, in the model's config."""
        given = _named(self._model[0]) if self._model and self._shown.by is self else None
        known = self.get(self._name) if self._name is not None else None
        if self._name is None or known is None or given is None or sorted(given) != sorted(known):
            return  # classes of another number are not this head's
        if given == self._shown.labels:
            return
        self[self._name], self._shown.labels = given, dict(given)
        config = getattr(self._model[0], "peft_config", {}).get(self._name)
        if config is not None:
            config.id2label = dict(given)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        items = {new if key == old else key: value for key, value in self.items()}
        self.clear()
        self.update(items)
        self._name = new if self._name == old else self._name

    def show(self, name: str | None) -> None:
        """Have the config name the classes of an adapter, or with ``None`` those of the base again."""
        config: Any = getattr(self._model[0], "config", None) if self._model else None
        if not hasattr(config, "id2label"):
            return
        renew_shown(self._model[0])
        labels, shown = None if name is None else self[name], self._shown
        self._name = name
        if shown.labels is not None and config.id2label != shown.labels:
            shown.forget()  # somebody has set others, of another number, which stay
        if labels is not None:
            shown.own = shown.own or (dict(config.id2label), dict(config.label2id or {}))
            name_classes(self._model[0], dict(labels), {name: number for number, name in labels.items()})
            shown.labels, shown.by = dict(labels), self
        elif shown.by is self and shown.own is not None:
            name_classes(self._model[0], *shown.own)
            shown.forget()

    def leave(self, merged: Iterable[str]) -> None:
        """The config goes on with the classes of a head that was merged, and is the model's own from now on."""
        self.renew()
        if self._shown.by is self and self._name in set(merged):
            self._shown.forget()


def renew_shown(model: nn.Module) -> None:
    """Have the adapter whose classes a model's config names take over what somebody has called them there."""
    shown = _CONFIGS.get(id(model))
    if shown is not None and shown.by is not None:
        shown.by.renew()


def name_classes(model: Any, id2label: dict[int, str], label2id: dict[str, int]) -> None:
    """Write the names of classes into a model's config, wherever it has them."""
    config: Any = model.config
    config.id2label, config.label2id = id2label, label2id
    if getattr(config, "label_names", None) is not None:  # what transformers' wrapper of timm is saved with
        config.label_names = list(id2label.values())
    if "num_labels" in vars(model):  # some classes of transformers 4 ask this one
        model.num_labels = len(id2label)


#: Held while heads are switched; on a head, how many threads have set it aside.
_SWITCHING, _COUNT = threading.RLock(), "_register_adapter_aside"


@contextmanager
def heads_aside(model: nn.Module) -> Iterator[None]:
    """Within the context, modules of ``modules_to_save`` are the base's; those that are so already stay so."""
    with _SWITCHING:
        heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        heads = [head for head in heads if not head.disable_adapters or vars(head).get(_COUNT)]
        for head in heads:
            _switch(head, enabled=False)
            head.__dict__[_COUNT] = vars(head).get(_COUNT, 0) + 1
    try:
        yield
    finally:
        with _SWITCHING:
            for head in heads:
                head.__dict__[_COUNT] -= 1
                if not head.__dict__[_COUNT]:
                    del head.__dict__[_COUNT]
                    _switch(head, enabled=True)


def _switch(head: AuxiliaryTrainingWrapper, enabled: bool) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in head.parameters()]
    head.enable_adapters(enabled)
    for parameter, flag in flags:
        parameter.requires_grad = flag
