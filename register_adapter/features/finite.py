"""Features that are not finite are nothing to measure: one check, and one sentence, wherever they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel

from ..errors import RegisterAdapterError
from .subjects import Subject, names_at_work

__all__ = ["check_finite_features", "subject_in_words"]


def subject_in_words(subject: Subject) -> str:
    """A model by its class, and the adapters that are at work in it."""
    model, adapter = subject if isinstance(subject, tuple) else (subject, "")
    if not isinstance(model, PeftModel):
        return type(model).__name__
    name = type(model.get_base_model()).__name__
    active = [adapter] if adapter else names_at_work(model) if isinstance(adapter, str) else []
    if not active or (not adapter and not getattr(model, "has_active_enabled_adapter", True)):
        return f"{name} without its adapters"
    return f"{name} with the adapter{'s' if len(active) > 1 else ''} {', '.join(map(repr, active))}"


def check_finite_features(
    features: Mapping[str, torch.Tensor], who: str, layer: int | None = None, unit: str = "image", title: str = ""
) -> None:
    """Refuse features in which a number is NaN or infinite; no score of them would mean anything.

    Args:
        features: ``(B, …)`` by what they are called, one row an image.
        who: The model, from :func:`subject_in_words`.
        layer: Index into ``hidden_states``, ``None`` for what is no layer's.
        unit: What a row is of.
        title: What comes first in the message, such as what the caller calls the model.

    Raises:
        RegisterAdapterError: There is such a number; the message has the model, the layer, and how many images.
    """
    for name, values in features.items():
        if not values.is_floating_point() or bool(values.isfinite().all()):
            continue
        whole = values.flatten(1).isfinite().all(1) if values.ndim > 1 else values.isfinite()
        broken, place = int((~whole).sum()), "" if layer is None else f" at layer {layer}"
        rows = f"{broken} of {len(whole)} {unit}{'' if len(whole) == 1 else 's'}"
        raise RegisterAdapterError(
            f"{title}{title and ': '}the {name} of {who}{place} are not finite (NaN or infinite) for {rows}: the model "
            "overflows, as in float16, or its weights, or the pixel values, are damaged. Use it in bfloat16 or "
            "float32, load its checkpoint again, or the one before training diverged."
        )
