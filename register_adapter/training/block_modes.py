"""How the blocks compute during a run: compiled, checkpointed; nothing of it is left on the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..features.layout import tower_of
from .arguments import TrainArguments

__all__ = ["check_modes", "checkpointed_blocks", "compiled_blocks", "modes_of_blocks"]

logger = logging.getLogger(__name__)

#: Attributes in which transformers and timm keep whether and how a module is checkpointed.
_KEPT = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "grad_checkpointing",
    "_require_grads_hook",
    "_require_grads_hooks",
)


@contextmanager
def modes_of_blocks(model: nn.Module, args: TrainArguments) -> Iterator[None]:
    """What the knobs ask for, while the context lasts."""
    with ExitStack() as stack:
        if args.gradient_checkpointing:
            stack.enter_context(checkpointed_blocks(model))
        if args.torch_compile:
            stack.enter_context(compiled_blocks(model, args.torch_compile_backend))
        yield


def check_modes(model: nn.Module, args: TrainArguments) -> None:
    """Refuse what the model cannot do, before anything is written.

    Raises:
        ValueError: Its blocks cannot be checkpointed.
    """
    if args.gradient_checkpointing and not _checkpointing_parts(model):
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing (neither gradient_checkpointing_enable of "
            "transformers nor set_grad_checkpointing of timm); leave --gradient-checkpointing out"
        )


def _checkpointing_parts(model: nn.Module) -> list[Any]:
    """The outermost parts with checkpointing of their own."""
    chosen: dict[str, Any] = {}
    for name, module in extract_model_from_parallel(model).named_modules():
        able = getattr(module, "supports_gradient_checkpointing", False) is True
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in chosen)
        if not inside and (able or hasattr(module, "set_grad_checkpointing")):
            chosen[name] = module
    return list(chosen.values())


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Compute the blocks again in the backward pass instead of keeping what they computed; afterwards as before.

    Args:
        model: With adapters, and maybe wrapped for distributed training.
    """
    parts = _checkpointing_parts(model)
    modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
    # What the user has switched on, for all blocks or every other one, and how.
    before = [(module, {name: vars(module)[name] for name in _KEPT if name in vars(module)}) for module in modules]
    known = {key for module in modules for key in module._forward_hooks}
    for part in parts:
        _checkpoint(part, True)
    # transformers has a frozen model's input ask for gradients by hooks, and takes off others than it has put on.
    added = {key for module in modules for key in module._forward_hooks} - known
    try:
        yield
    finally:
        hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in modules]
        for part in parts:
            _checkpoint(part, False)
        for table, content in hooks:
            table.clear()
            table.update({key: hook for key, hook in content.items() if key not in added})
        for module, values in before:
            for name in _KEPT:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)


def _checkpoint(part: Any, on: bool) -> None:
    if hasattr(part, "set_grad_checkpointing"):  # timm
        part.set_grad_checkpointing(on)
        return
    # transformers 5 has renamed its methods, and warns of the old names.
    kind = "activation" if hasattr(part, "activation_checkpointing_enable") else "gradient"
    if on:
        # The other kind of checkpointing gives a frozen block's input no gradient.
        getattr(part, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(part, f"{kind}_checkpointing_disable")()


@contextmanager
def compiled_blocks(model: nn.Module, backend: str | None = None) -> Iterator[None]:
    """Compile the ``forward`` of every block of a model's tower while the context lasts.

    Blocks are where the time goes, they are alike, so that one graph serves them all, and what reads tokens between
    them stays outside of it. That is what accelerate calls regional compilation.

    Args:
        model: With adapters, and maybe wrapped for distributed training.
        backend: A backend of ``torch.compile``; default inductor.

    Raises:
        UnsupportedModelError: The model has no single vision tower.
    """
    chosen = backend or "inductor"
    tower, _ = tower_of(extract_model_from_parallel(model))
    blocks: nn.ModuleList = tower.part("blocks")
    logger.info("compiling %d blocks with %s; the first steps take longer", len(blocks), chosen)
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=chosen)
    # Pairs and gates differ from block to block, in training and in evaluation mode: a graph each.
    with torch._dynamo.config.patch(cache_size_limit=max(torch._dynamo.config.cache_size_limit, 4 * len(blocks) + 8)):
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
