"""Eager attention in the passes of one thread, or coroutine, while others run it with what is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from peft.utils import ModulesToSaveWrapper

from ..towers.anatomy import resolve
from ..towers.tower import Tower
from ..tuner.hooks.attention import AttentionConfig
from ..tuner.hooks.recomputation import carry, drop
from .threads import Here

__all__ = ["eager_in_this_thread"]

_NAME = "_attn_implementation"
#: Config's id to its class, and where each of the contexts that want its passes eager was entered.
_SWITCHED: dict[int, tuple[Any, list[Here]]] = {}
_SWITCHING = threading.Lock()


@contextmanager
def eager_in_this_thread(tower: Tower) -> Iterator[None]:
    """Have transformers' attention computed eagerly in this thread's, or coroutine's, passes.

    Contexts may be nested, and overlap.

    A model looks the name of the implementation up in its config several times in a pass, first to make a mask and then
    in every block. A mask made for one implementation is wrong for another (SDPA's is boolean, and eager attention
    would add it), so the name must not change below a pass that another thread has begun.

    Args:
        tower: The tower; one that looks no implementation up, or has a choice that is made once and for all, stays as
            it is.
    """
    configs = [config for config in _configs(tower) if _named_outside(config) not in (None, "eager")]
    owner, here, ended = object(), Here(), threading.Event()

    def resume() -> Callable[[], AbstractContextManager[None]]:
        return partial(_answer_eager, configs) if here.is_here and not ended.is_set() else nullcontext

    with _answer_eager(configs):
        # What is checkpointed meanwhile is computed again later, and in another thread.
        carry(tower.module, owner, resume)
        try:
            yield
        finally:
            ended.set()
            drop(tower.module, owner)


@contextmanager
def _answer_eager(configs: list[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(_answers_eager(config))
        yield


def _configs(tower: Tower) -> list[Any]:
    """Configs whose implementation can be changed after a model was made: the tower's, and those of models in it."""
    configs: dict[int, Any] = {id(tower.config): tower.config}
    for module in tower.module.modules():
        can_change = getattr(module, "_can_set_attn_implementation", None)  # a plain module reads the tower's config
        if can_change is not None and can_change():
            configs.setdefault(id(module.config), module.config)
        elif can_change is not None:
            configs.pop(id(module.config), None)
    for module in tower.module.modules():
        # PEFT's copies of a block (modules_to_save) have copies of its config.
        for copied in module.modules_to_save.values() if isinstance(module, ModulesToSaveWrapper) else ():
            for path, part in copied.named_modules():
                if id(_config_of(module.original_module, path)) in configs and (own := _config_of(part)) is not None:
                    configs.setdefault(id(own), own)
    return list(configs.values())


def _config_of(module: Any, path: str = "") -> Any:
    """The config of a module, or of the one below it at ``path``, without a stand-in; ``None`` where there is none."""
    config = getattr(resolve(module, path) if path else module, "config", None)
    return config.config if isinstance(config, AttentionConfig) else config


def _named_outside(config: Any) -> Any:
    """The implementation that a config names outside of all contexts: the one around may end before its inner one."""
    with _SWITCHING:
        first, _ = _SWITCHED.get(id(config), (type(config), []))
    inherited: Any = getattr(first, _NAME, None)
    return inherited.__get__(config) if isinstance(inherited, property) else getattr(config, _NAME, None)


@contextmanager
def _answers_eager(config: Any) -> Iterator[None]:
    """Have the config name another implementation when this thread asks."""
    own = Here()
    with _SWITCHING:
        first, wanting = _SWITCHED.setdefault(id(config), (type(config), []))
        if not wanting:
            config.__class__ = _two_answers(first, wanting)
        wanting.append(own)
    try:
        yield
    finally:
        with _SWITCHING:
            wanting.remove(own)
            if not wanting:
                config.__class__ = first
                del _SWITCHED[id(config)]


def _two_answers(first: Any, wanting: list[Here]) -> type:
    """A config's class, but for the implementation that it names in the threads, or coroutines, of ``wanting``."""
    inherited: Any = getattr(first, _NAME)

    def read(config: Any) -> Any:
        return "eager" if any(here.is_here for here in tuple(wanting)) else inherited.fget(config)

    def reduce(config: Any, protocol: Any) -> Any:
        _, _, *state = first.__reduce_ex__(config, protocol)
        return object.__new__, (first,), *state  # a copy has no part in the contexts

    members = {_NAME: property(read, inherited.fset), "__reduce_ex__": reduce, "__module__": first.__module__}
    return type(first.__name__, (first,), members)
