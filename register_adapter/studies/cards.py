"""What the card of an arm's adapter says of the study that it comes from."""

from __future__ import annotations

from typing import Any

from ..tuner.card_text import named
from .arms import BATCH, Arm
from .images import Images
from .ruler import Figures

__all__ = ["card_facts"]


def card_facts(
    arm: Arm,
    seed: int,
    figures: Figures,
    base: Figures,
    images: Images,
    images_name: str | None,
    steps: int,
    task: str,
) -> dict[str, Any]:
    """Facts for an adapter's card.

    Args:
        arm: The arm.
        seed: Its seed, said where it depends on one.
        figures: Of the adapter, on the images that are reported on.
        base: Of the base as it is, on the same images.
        images: Those of the study.
        images_name: What they are called.
        steps: Optimiser steps of a training.
        task: What the figure of the task is called.

    Returns:
        ``training_data``, ``evaluation_data``, ``metrics`` and ``run``, as
        :func:`register_adapter.tuner.card.update_model_card` takes them.
    """
    source, trained = named(images_name or "images that have no name"), arm.objective is not None
    made = trained or arm.kind == "fit"
    run: dict[str, Any] = {"Made by": f"a study, as its arm “{arm.name}”"}
    run |= {} if arm.recommended else {"Meant as": "a control, for comparison with repairs"}
    run |= {"Training images" if trained else "Images": len(images.make)} if made else {}
    run |= {"Evaluation images": len(images.report)}
    run |= {"Steps": f"{steps} of {BATCH} images", "Objective": str(arm.objective)} if trained else {}
    run |= {"Seed": seed} if arm.seeded else {}
    run |= {"The base as it is": ", ".join(f"{name} {value:.4g}" for name, value in _numbers(base, task).items())}
    run |= {"Verdict of the audit": f"{figures.verdict} (the base as it is: {base.verdict})"}
    return {
        "training_data": source if made else "Nothing was trained or fitted: the registers are what they started at",
        "evaluation_data": f"{source}, images that were held out",
        "metrics": _numbers(figures, task),
        "run": run,
    }


def _numbers(figures: Figures, task: str) -> dict[str, float]:
    values = figures.to_dict()
    return {task if name == "task" else name: value for name, value in values.items() if isinstance(value, float)}
