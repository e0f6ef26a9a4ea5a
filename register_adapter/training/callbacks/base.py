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

    def on_step_end(self, model: nn.Module) -> None:
        """Called after every optimiser step."""

    def on_evaluate_begin(self, model: nn.Module) -> None:
        """Called before every evaluation, and at the end of the run: the model is evaluated and saved as it is then."""

    def on_evaluate_end(self, model: nn.Module) -> None:
        """Called after every evaluation but those at the end: the model is trained on as it is then."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: numbers, texts and tensors, in dictionaries and lists."""
        return {}

    def load_state_dict(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Called with that, when a run goes on, after its model is prepared and has the checkpoint's weights."""

    def details(self) -> dict[str, Any]:
        """What ``results.json`` says of it, ready for JSON; a run is resumed only with the same."""
        return {}
