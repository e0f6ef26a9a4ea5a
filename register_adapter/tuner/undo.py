"""A refusal leaves a model as it was: everything about it that adapters change is noted before, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterFileError

__all__ = [
    "Before",
    "check_arrived",
    "is_transformers",
    "refuse_without_values",
    "take_off_unfinished",
    "unchanged_if_refused",
    "values_kept",
    "values_unchanged_if_refused",
]

_NO_VALUES = (
    "the adapter {name!r} got no (finite) {what} values from its file: the tensor is missing, damaged, or from a "
    "model in which the vision tower has another place."
)
_LOAD_WITH_PEFT = (
    "transformers' own loaders look for the tower in its place in the model that the adapter was trained on (a "
    "CLIPVisionModel, say, where AutoModel makes a CLIPModel of its checkpoint). Load a whole file with "
    "PeftModel.from_pretrained(base, adapter), which finds the tower in any model."
)
_LOST_HEADS = (
    "transformers has not put {modules} of the adapter {name!r} into the model, but other values: the load_adapter of "
    "transformers 5.0 to 5.17 forgets modules_to_save, with every PEFT method. The model is as it was before. Load "
    "with PeftModel.from_pretrained(base, adapter), or update transformers."
)


class Before:
    """The state of a model at one time: modules and classes, parameters, buffers, hooks, configs, ``requires_grad``.

    No value is copied unless that is asked for: tensors are held, and would be missed where something writes into them.

    Args:
        model: The model.
        values: Copy the base's values too, which some methods of PEFT change as they start (PiSSA, OLoRA).
    """

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self.model = model
        #: By adapter that a loader fills: asks which modules that are saved as a whole have other values than the file.
        self.lost: dict[str, Callable[[], list[str]]] = {}
        #: Whether the values to come were compared with the base by their config, and whether the user waives that.
        self.compared, self.waived = True, False
        self._names = _names(model)
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._classes = [(module, type(module)) for module in model.modules()]
        self._tables: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for module in model.modules():
            for holder in (module, getattr(module, "config", None)):
                # A config is shared by modules; what has no attributes of its own cannot have changed ones.
                if holder is None or id(holder) in seen or not isinstance(getattr(holder, "__dict__", None), dict):
                    continue
                seen.add(id(holder))
                self._attributes.append((holder, dict(vars(holder))))
                self._tables += [(value, dict(value)) for value in vars(holder).values() if isinstance(value, dict)]
                self._tables += [(value, list(value)) for value in vars(holder).values() if isinstance(value, list)]
                self._tables += [(value, set(value)) for value in vars(holder).values() if isinstance(value, set)]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if values:
            # Some methods write into a weight, others put another tensor behind it.
            self._values = [(p, p.data, p.detach().clone()) for p in model.parameters() if p.is_floating_point()]

    def __reduce__(self) -> Any:
        # A copy of a model has a state of its own to go back to, which is not this one.
        return type(None), ()

    def forget(self, adapter_name: str) -> None:
        """An adapter's name was noted down in the model before the time that this is the state of: it was not there."""
        self._names.discard(adapter_name)
        names = getattr(self.model, "peft_config", None)
        for table, content in self._tables:
            if table is names and isinstance(content, dict):
                content.pop(adapter_name, None)

    def only_gained(self, model: nn.Module, adapter_name: str) -> bool:
        """Whether ``model`` is the one of this state, with all its modules, and with one adapter more."""
        here = set(model.modules())
        others = _names(model) - {adapter_name}
        return model is self.model and others == self._names and all(module in here for module, _ in self._classes)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for holder, attributes in self._attributes:
            now = vars(holder)
            if now.keys() != attributes.keys() or any(now[name] is not value for name, value in attributes.items()):
                now.clear()
                now.update(attributes)
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for table, content in self._tables:
            if isinstance(table, list):
                table[:] = content
            elif isinstance(table, set) or not _same(table, content):
                table.clear()
                table.update(content)
        for parameter, data, value in self._values:
            parameter.data = data
            parameter.data.copy_(value)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        if "peft_config" not in vars(self.model) and vars(self.model).get("_hf_peft_config_loaded"):
            # transformers notes an adapter before it tries to put it on.
            del self.model._hf_peft_config_loaded


def _names(model: nn.Module) -> set[str]:
    """The adapters that a model's table of configs names."""
    table = getattr(model, "peft_config", None)
    return set(table) if isinstance(table, dict) else set()


def is_transformers(before: Before | None) -> bool:
    """Whether transformers has put an adapter on by itself: nobody else holds it, and it can be taken off again."""
    return before is not None and bool(getattr(before.model, "_hf_peft_config_loaded", False))


def check_arrived(tokens: Any, adapter_name: str, before: Before | None, what: str = "register") -> None:
    """What is asked when a loader calls ``eval()``, its last step.

    Args:
        tokens: The adapter's registers, or other values that know whether they are ``pending``.
        adapter_name: Its name.
        before: The model as it was before a loader put the adapter on, if one is at work.
        what: What the values are of, in the error.

    Raises:
        AdapterFileError: The registers have no values; or transformers has put the adapter on for inference, and a
            module that is saved as a whole has other values than the file. There the model is as it was before.
    """
    undo = before if is_transformers(before) else None
    if tokens.pending and not tokens.weight.is_meta:
        if undo is None:
            refuse_without_values(adapter_name)
        undo.restore()
        raise AdapterFileError(
            f"{_NO_VALUES.format(name=adapter_name, what=what)} The model is as it was before. {_LOAD_WITH_PEFT}"
        )
    if undo is not None and adapter_name in undo.lost and (lost := undo.lost[adapter_name]()):
        undo.restore()
        raise AdapterFileError(_LOST_HEADS.format(modules=" and ".join(map(repr, lost)), name=adapter_name))


def take_off_unfinished(layers: Iterable[Any], model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off whose loader ended before its values came (Ctrl-C, no connection), so that it can try again.

    Nothing happens where the model has been changed since in other ways: going back would undo these too.

    Args:
        layers: Every :class:`RegisterLayer` of the model.
        model: The model that the adapter is to be put on.
        adapter_name: The adapter's name.
    """
    for layer in layers:
        before = layer.before
        if before is not None and adapter_name in layer.names and layer.tokens(adapter_name).pending:
            if before.only_gained(model, adapter_name):
                before.restore()
            return


def refuse_without_values(adapter_name: str) -> NoReturn:
    """``AdapterFileError``: nothing has come in, and the adapter stays, because others may hold it."""
    raise AdapterFileError(
        f"{_NO_VALUES.format(name=adapter_name, what='register')} The model behaves as without it. Take it off with "
        f"delete_adapter({adapter_name!r}). {_LOAD_WITH_PEFT}"
    )


@contextmanager
def values_kept(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[None]:
    """A context at whose refusal parameters and buffers that are written into have the values of before.

    Args:
        model: The model.
        wanted: Whether a tensor of that key is looked after.
    """
    tensors = [item for item in (*model.named_parameters(), *model.named_buffers()) if not item[1].is_meta]
    values = [(value, value.detach().clone()) for key, value in tensors if wanted(key)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


@contextmanager
def values_unchanged_if_refused(model: nn.Module, adapter_name: str, states: list[Before | None]) -> Iterator[None]:
    """A context in which an adapter's values are put into a model, which is as it was if they are refused.

    So is the adapter's config: a head's number of classes, and the base as it is now, are noted before the values.

    Args:
        model: The model with the adapter.
        adapter_name: Its name.
        states: What a loader's model was before it got the adapter; ``None`` for one that has had it for longer, and
            keeps it with the values of before.

    Raises:
        AdapterFileError: A tensor of a module that is saved as a whole is missing.
    """
    before = [state for state in states if state is not None]
    tables = ("register_adapter_tokens", "offset_positions_values", "modules_to_save")
    own = tuple(f".{table}.{adapter_name}." for table in tables)
    if not before:
        before = [Before(model)]
    heads = [f"{path}." for path, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    config = getattr(model, "peft_config", {}).get(adapter_name)
    said = None if config is None else dict(vars(config))
    try:
        with values_kept(model, lambda key: any(part in f".{key}" for part in own)):
            yield
    except BaseException as error:
        for state in before:
            state.restore()
        if config is not None and said is not None:
            vars(config).clear()
            vars(config).update(said)
        if isinstance(error, KeyError) and str(error.args[0]).startswith(tuple(heads)):  # PEFT's
            raise AdapterFileError(
                f"the adapter {adapter_name!r} cannot be loaded: it lacks {error.args[0]!r}, which its "
                "config has in modules_to_save. Nothing was changed."
            ) from error
        raise


def _same(table: dict[Any, Any], content: dict[Any, Any]) -> bool:
    """The very same things, in the same order."""
    return list(table) == list(content) and all(table[key] is value for key, value in content.items())


@contextmanager
def unchanged_if_refused(model: nn.Module, values: bool = False) -> Iterator[Before]:
    """A context that leaves ``model`` as it was if it ends with an exception; see :class:`Before`."""
    before = Before(model, values)
    try:
        yield before
    except BaseException:
        before.restore()
        raise
