"""Passes of a model with adapters of several methods in which every image has an adapter of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from peft.utils import ModulesToSaveWrapper

from ..fields import check_known
from ..hooks.choice import BASE, EVERYONE, check_batch
from ..hooks.fitting import names_for_head
from .saving import SavesAll

__all__ = ["adapters_by_image"]


@contextlib.contextmanager
def adapters_by_image(model: SavesAll, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """PEFT's way to ``model(..., adapter_names=[...])``, for the adapters of one method.

    Args:
        model: The model.
        args: Arguments of the pass.
        kwargs: Those by keyword.

    Raises:
        ValueError: An adapter is not there, they are of several methods, or their heads have different numbers of
            outputs.
    """
    with contextlib.ExitStack() as stack:
        given = kwargs.get("adapter_names")
        known, message = [*model.peft_config, BASE], "Trying to infer with non-existing adapter(s):"  # PEFT's
        names = set(check_known(given or (), known, message)) - {BASE}
        if given is not None and not names:  # no adapter, and so no method, is named
            check_batch(given, args, kwargs, model.training)
            stack.enter_context(model.base_model.without([EVERYONE]))
        if names:
            tuner = model.base_model.tuner_of(names)
            tuner.training = model.training  # it is not a submodule, and train() does not reach it
            hooked = tuner._enable_peft_forward_hooks(*args, **kwargs)
            hooked.__enter__()
            # Of a pass that fails, PEFT's context would leave its hooks on if it were told.
            stack.callback(hooked.__exit__, None, None, None)
            method = model.peft_config[next(iter(names))].peft_type
            mine = {name for name, config in model.peft_config.items() if config.peft_type == method}
            for head in model.get_base_model().modules():
                if isinstance(head, ModulesToSaveWrapper):
                    hook = head.register_forward_pre_hook(partial(_for_head, mine), with_kwargs=True)
                    stack.callback(hook.remove)
        yield


def _for_head(mine: set[str], head: ModulesToSaveWrapper, args: Any, kwargs: dict[str, Any]) -> Any:
    """Behind PEFT's hook, which gives every head all the names, also those that it has no copy for."""
    names = kwargs.get("adapter_names")
    if names is None:
        return None
    if mine.isdisjoint(head.modules_to_save):
        return args, {key: value for key, value in kwargs.items() if key != "adapter_names"}
    names = names_for_head(head, names, mine)
    return args, {**kwargs, "adapter_names": names}
