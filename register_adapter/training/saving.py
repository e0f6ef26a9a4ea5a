"""What is left of a run: adapter, card, image processor and ``results.json``, in a folder and on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..tuner.card import update_model_card
from ..tuner.peft_model import RegisterPeftModel
from ..utils.hub import CONFIG_NAME, WEIGHTS_NAME, hub_errors
from ..utils.staging import staged
from .arguments import TrainArguments

__all__ = ["check_finite", "push_run", "save_run"]


def check_finite(tensors: dict[str, Any]) -> None:
    """Refuse what was trained if it is not finite.

    Raises:
        FloatingPointError: It is not.
    """
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise FloatingPointError(f"not finite after training, nothing is saved: {broken[:5]}; lower the learning rate")


def save_run(
    model: RegisterPeftModel,
    weights: dict[str, Any] | None,
    folder: Path,
    results: dict[str, Any],
    image_processor: Any,
    training_data: str | None,
) -> None:
    """Write adapter, card, image processor and results, all or nothing."""
    name = str(model.active_adapter)
    with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME, "results.json")) as scratch:
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", scratch / "README.md")
        model.save_pretrained(str(scratch), state_dict=weights)
        update_model_card(
            scratch / "README.md",
            model.peft_config[name],
            type(model.get_base_model()),
            training_data=training_data,
            metrics=_evaluated(results),
            adapter=folder.absolute().name,
            subfolder=None if name == "default" else name,
        )
        if image_processor is not None:
            image_processor.save_pretrained(scratch)
        (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def push_run(
    model: RegisterPeftModel,
    args: TrainArguments,
    results: dict[str, Any],
    image_processor: Any,
    training_data: str | None,
    token: str | None,
) -> None:
    """Upload adapter, card and image processor."""
    name, metrics = str(args.hub_model_id), _evaluated(results)
    model.push_to_hub(name, private=args.hub_private, token=token, training_data=training_data, metrics=metrics)
    if image_processor is not None:
        with hub_errors(name, token=token):
            image_processor.push_to_hub(name, token=token)


def _evaluated(results: dict[str, Any]) -> dict[str, float] | None:
    """The metrics that a card shows: measured on the evaluation set."""
    return {key: value for key, value in results["metrics"].items() if key.startswith("eval_")} or None
