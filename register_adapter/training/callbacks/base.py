"""The interface of what changes during a run, apart from the loss."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Callback"]


class Callback:
    """Called by the loop; ``model`` may be wrapped for distributed training, and every process calls.

    What it does must depend on its arguments and on its own state alone, so that a run can be resumed.
    """

    def on_step_begin(self, model: nn.Module, progress: float) -> None:
        """Called before every batch with the part of the run that is done, 0 to 1."""

    def details(self) -> dict[str, Any]:
        """What ``results.json`` says of it, ready for JSON; a run is resumed only with the same."""
        return {}
