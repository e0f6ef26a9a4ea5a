"""A refusal leaves a model as it was: everything about it that adapters change is noted before, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterFileError

__all__ = ["Before", "unchanged_if_refused", "values_unchanged_if_refused"]


class Before:
    """The state of a model at one time: modules and classes, parameters, buffers, hooks, configs, ``requires_grad``.

    No value is copied unless that is asked for: tensors are held, and would be missed where something writes into them.

    Args:
        model: The model.
        values: Copy the base's values too, which some methods of PEFT change as they start (PiSSA, OLoRA).
    """

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self.model = model
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
        names = getattr(self.model, "peft_config", None)
        for table, content in self._tables:
            if table is names and isinstance(content, dict):
                content.pop(adapter_name, None)

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


@contextmanager
def values_unchanged_if_refused(model: nn.Module, adapter_name: str, states: list[Before | None]) -> Iterator[None]:
    """A context in which an adapter's values are put into a model, which is as it was if they are refused.

    Args:
        model: The model with the adapter.
        adapter_name: Its name.
        states: What a loader's model was before it got the adapter; ``None`` for one that has had it for longer, and
            keeps it with the values of before.

    Raises:
        AdapterFileError: A tensor of a module that is saved as a whole is missing.
    """
    before = [state for state in states if state is not None]
    own = (f".register_adapter_tokens.{adapter_name}.", f".modules_to_save.{adapter_name}.")
    if not before:
        before = [Before(model)]
    heads = [f"{path}." for path, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    tensors = [item for item in (*model.named_parameters(), *model.named_buffers()) if not item[1].is_meta]
    values = [(value, value.detach().clone()) for key, value in tensors if any(part in f".{key}" for part in own)]
    try:
        yield
    except BaseException as error:
        for state in before:
            state.restore()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
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
