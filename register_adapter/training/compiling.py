"""``torch.compile`` for a run: the blocks of the tower, each by itself, and nothing of it left on the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..features.layout import tower_of

__all__ = ["compiled_blocks"]

logger = logging.getLogger(__name__)


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
