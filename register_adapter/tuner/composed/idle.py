"""What PEFT 0.18 does not run: heads and layer norms that adapters have copies of, while none of these is at work."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any, cast

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.utils import ModulesToSaveWrapper

__all__ = ["run_idle_norms", "see_idle_heads"]


def see_idle_heads() -> None:
    """Have PEFT 0.18 look into no copy of a head of which none is at work: ``hasattr``, too, is an ``IndexError``."""
    asked = ModulesToSaveWrapper._hasattr_wrapped

    @wraps(asked)
    def has(self: ModulesToSaveWrapper, name: str, modules: Any) -> bool:
        return bool(self.active_adapters) and asked(self, name, modules)

    ModulesToSaveWrapper._hasattr_wrapped = asked if hasattr(asked, "__wrapped__") else has


def run_idle_norms() -> None:
    """Have PEFT 0.18 run tuned norms of which none is active as the base's own: a pass is a ``ValueError`` there."""
    tuned = LNTuningLayer.forward

    @wraps(tuned)
    def forward(self: LNTuningLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        idle = not self.active_adapters and not self.disable_adapters
        return cast(torch.Tensor, (self.base_layer if idle else partial(tuned, self))(x, *args, **kwargs))

    LNTuningLayer.forward = tuned if hasattr(tuned, "__wrapped__") else forward
