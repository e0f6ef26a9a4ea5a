"""What timm's ``FeatureHookNet`` (``feature_cls="hook"``) collects behind blocks, and returns: without registers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["cut_collected"]


def cut_collected(blocks: Iterable[nn.Module], cut: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Replace what was collected behind blocks in the pass that ends; hooks of a user's own see what is inside.

    Args:
        blocks: Those of the tower.
        cut: Takes a block's index and its output ``(B, N, D)``, and returns it without registers.
    """
    kind = getattr(sys.modules.get("timm.models._features"), "FeatureHooks", None)
    if kind is None:
        return
    for index, block in enumerate(blocks):
        for hook in list(block._forward_hooks.values()):
            function: Any = getattr(hook, "func", None)
            collector = getattr(function, "__self__", None)
            if not isinstance(collector, kind):
                continue
            name = hook.args[0]  # type: ignore[attr-defined]
            for outputs in list(collector._feature_outputs.values()):
                if name in outputs:
                    outputs[name] = cut(index, outputs[name])
