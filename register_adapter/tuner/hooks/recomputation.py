"""Blocks that gradient checkpointing computes again: with what took part in their pass, in whatever thread that is.

The second time is in the backward pass, which autograd runs in a thread of its own on a GPU, and by then other adapters
may be active. The function that is checkpointed takes along what the pass knew of itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import RegisterAdapterError
from ...towers.calls import hidden_states_of

__all__ = ["Inputs", "Resume", "carry", "checkpoints_reentrantly", "drop", "is_recomputing", "refuse_gone"]

#: Says, in a pass, what puts its state back while a part of it is computed again.
Resume = Callable[[], Callable[[], AbstractContextManager[Any]]]

#: Attributes by which transformers' modules, and torch's ``CheckpointWrapper``, call ``checkpoint(function, *args)``.
#: Libraries without one call ``checkpoint`` with the block itself: see :class:`Inputs`.
_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
_CHANGING = threading.Lock()


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass, where blocks are called to compute them a second time."""
    # Compiled graphs have no such calls, and their compiler does not know the question.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether transformers, timm or torch's ``CheckpointWrapper`` checkpoints this module, and does so reentrantly."""
    if getattr(module, "grad_checkpointing", False) is True:
        return bool(getattr(sys.modules.get("timm.layers"), "use_reentrant_ckpt", bool)())
    if isinstance(module, CheckpointWrapper):
        return module.checkpoint_impl is CheckpointImpl.REENTRANT
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return getattr(module, "gradient_checkpointing", False) is True and options.get("use_reentrant", True)


def refuse_gone() -> NoReturn:
    """Say that a block cannot be computed again.

    Raises:
        RegisterAdapterError: Always.
    """
    raise RegisterAdapterError(
        "the registers were taken off (unload, delete_adapter) between a forward pass and its backward pass, which "
        "computes checkpointed blocks again and needs them: gradients would be wrong. Call backward() first, or switch "
        "gradient checkpointing off."
    )


class _Again:
    """A checkpointed function: the first call is the pass's own, later ones compute it again."""

    def __init__(self, function: Callable[..., Any], resumed: Callable[[], AbstractContextManager[Any]]) -> None:
        self.function, self.resumed, self.called = function, resumed, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self.resumed() if self.called else nullcontext()
        self.called = True
        with context:
            return self.function(*args, **kwargs)


class _Carrying:
    """Stands in for the checkpointing function of a module."""

    def __init__(self, checkpoint: Callable[..., Any], owner: object, resume: Resume) -> None:
        self.checkpoint, self.owner, self.resume = checkpoint, owner, resume
        #: Options, read off the ``functools.partial`` that it usually is.
        self.keywords: dict[str, Any] = getattr(checkpoint, "keywords", {})

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(_Again(function, self.resume()), *args, **kwargs)


def carry(tower: nn.Module, owner: object, resume: Resume) -> None:
    """Have what the modules of a tower checkpoint take along what ``resume`` says; once for an owner.

    Args:
        tower: The tower.
        owner: Whose state it is.
        resume: Called in the pass, before a module is checkpointed.
    """
    if not any(True for _ in _bare(tower, owner)):
        return
    with _CHANGING:
        for module, name in list(_bare(tower, owner)):
            setattr(module, name, _Carrying(vars(module)[name], owner, resume))


def drop(tower: nn.Module, owner: object) -> None:
    """Undo :func:`carry`."""
    with _CHANGING:
        for module in tower.modules():
            for name in _ATTRIBUTES:
                links = _chain(vars(module).get(name))
                for place, link in enumerate(links):
                    if link.owner is owner and place:
                        links[place - 1].checkpoint = link.checkpoint
                    elif link.owner is owner:
                        setattr(module, name, link.checkpoint)


def _bare(tower: nn.Module, owner: object) -> Iterator[tuple[nn.Module, str]]:
    """Modules whose checkpointing function takes nothing along for ``owner`` yet, and the function's name."""
    for module in tower.modules():
        for name in _ATTRIBUTES:
            function = vars(module).get(name)
            if function is not None and all(link.owner is not owner for link in _chain(function)):
                yield module, name


def _chain(function: Any) -> list[_Carrying]:
    """The stand-ins of a module, of several owners, from the outermost on."""
    links = []
    while isinstance(function, _Carrying):
        links.append(function)
        function = function.checkpoint
    return links


class Inputs:
    """The sequences that blocks were given in passes, by which a block that is computed again knows its pass.

    For libraries that checkpoint the block itself, hooks and all: a checkpoint keeps the block's input, so the one of
    the second time lies in the same memory.
    """

    def __init__(self) -> None:
        self._states: dict[int, tuple[StorageWeakRef, Callable[[], AbstractContextManager[Any]]]] = {}
        self._open = threading.local()

    def __deepcopy__(self, memo: Any) -> Inputs:
        return Inputs()

    def __reduce__(self) -> Any:
        return Inputs, ()

    def note(self, sequence: torch.Tensor, resumed: Callable[[], AbstractContextManager[Any]]) -> None:
        """A block is given this sequence in a pass."""
        storage = _storage(sequence)
        if storage is None:
            return
        if len(self._states) > 256:
            for key, (known, _) in list(self._states.items()):
                if known.expired():  # type: ignore[no-untyped-call]
                    self._states.pop(key, None)
        # The weak reference keeps the address from being given to another storage.
        self._states[storage._cdata] = StorageWeakRef(storage), resumed  # type: ignore[no-untyped-call]

    def refuse_in(self, blocks: Iterable[nn.Module]) -> None:
        """Have blocks refuse to be computed again for a pass whose sequences are still there; others go on as ever."""
        known = {key: storage for key, (storage, _) in self._states.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        for block in blocks if known else ():
            block.register_forward_pre_hook(_Gone(known), with_kwargs=True)

    def enter(self, sequence: torch.Tensor) -> None:
        """A block is called with this sequence outside of a pass: put back what its pass knew, if it was noted."""
        storage = _storage(sequence)
        known = self._states.get(storage._cdata) if storage is not None else None
        if known is not None:
            context = known[1]()
            context.__enter__()
            self._contexts.append(context)

    def leave(self) -> None:
        """The block has returned, or failed."""
        if self._contexts:
            self._contexts.pop().__exit__(None, None, None)

    def leave_all(self) -> None:
        """A pass begins: blocks that Ctrl-C has ended are over, behind which torch calls no hook."""
        while self._contexts:
            self.leave()

    @property
    def _contexts(self) -> list[AbstractContextManager[Any]]:
        contexts: list[AbstractContextManager[Any]] = self._open.__dict__.setdefault("contexts", [])
        return contexts


class _Gone:
    """A hook on a block whose registers are gone, as long as a backward pass may still compute it again."""

    def __init__(self, known: dict[int, StorageWeakRef]) -> None:
        self.known = known

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if all(storage.expired() for storage in self.known.values()):  # type: ignore[no-untyped-call]
            self._leave(module)
        elif is_recomputing():
            storage = _storage(hidden_states_of(args, kwargs))
            if storage is not None and storage._cdata in self.known:
                refuse_gone()

    def _leave(self, module: nn.Module) -> None:
        # By its place and not by a handle, which a copy of the module does not have.
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)

    def __deepcopy__(self, memo: Any) -> _Gone:
        return self._of_a_copy()

    def __reduce__(self) -> Any:
        return _Gone._of_a_copy, ()

    @staticmethod
    def _of_a_copy() -> _Gone:
        return _Gone({})


def _storage(sequence: torch.Tensor) -> Any:
    if not isinstance(sequence, torch.Tensor):  # torch.fx's, which stands for one
        return None
    try:
        return sequence.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a subclass without one of its own
        return None
