"""What of a model is trained, and how much of it there is."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["check_module", "part_of", "trainable_by_part", "trainable_in_words", "trained_parameters"]

# What stands in a parameter's name, and the part it belongs to; the first that fits.
_MARKS = (
    ("register_adapter_tokens", "registers"),
    ("offset_positions_", "positions"),
    ("lora_", "lora"),
    ("ln_tuning_layers", "copies"),
    ("modules_to_save", "head"),
)


def part_of(name: str) -> str:
    """The part that a parameter belongs to: registers, gates, positions, lora, copies (of layers), head, or other."""
    part = next((part for mark, part in _MARKS if mark in name), "other")
    return "gates" if part == "registers" and name.endswith(".gate") else part


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by their names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_by_part(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters by part; parts without any are left out."""
    counts: dict[str, int] = {}
    for name, parameter in trained_parameters(model).items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def trainable_in_words(model: nn.Module) -> str:
    """Parts and their sizes in a line, such as ``registers 1,536, lora 73,728``; ``nothing`` if all is frozen."""
    return ", ".join(f"{part} {count:,}" for part, count in trainable_by_part(model).items()) or "nothing"


def check_module(model: Any) -> None:
    """Refuse what is no model, such as the name of one.

    Raises:
        TypeError: ``model`` is no :class:`torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {model!r:.60}; load it first, with "
            "AutoModel.from_pretrained(...), timm.create_model(...) or whatever its library has"
        )
