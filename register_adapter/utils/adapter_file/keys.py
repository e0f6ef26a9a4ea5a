"""Keys of an adapter's tensors in its file, and whose they are."""

from __future__ import annotations

import re

__all__ = ["GATE_KEY", "NEURON_KEYS", "STRENGTH_KEY", "TOKENS_KEY", "UNITS_KEY", "is_foreign", "is_of"]

#: The end of the register tokens' key, whatever the tower's place in the model it was saved from.
TOKENS_KEY = "registers.register_adapter_tokens.weight"
#: The same of the gate on their attention logits.
GATE_KEY = "registers.register_adapter_tokens.gate"
#: The same of the register neurons: which hidden units they are, and what goes with them.
UNITS_KEY = "registers.register_adapter_tokens.units"
STRENGTH_KEY = "registers.register_adapter_tokens.strength"
NEURON_KEYS = (UNITS_KEY, *(f"registers.register_adapter_tokens.{name}" for name in ("usual", "limits")), STRENGTH_KEY)
#: What PEFT puts before every key of a model.
_PREFIX = "base_model.model."
_FOREIGN = re.compile(r"(^|\.)registers\.register_adapter_tokens\.[^.]+\.(weight|gate|units|usual|limits|strength)$")


def is_foreign(key: str) -> bool:
    """Whether a key is of another adapter of the model that was saved: PEFT 0.18 writes those along, by their names."""
    return _FOREIGN.search(key) is not None


def is_of(key: str, name: str) -> bool:
    """Whether a file's key is of a module that is called ``name``, which PEFT's own ``base_model.model`` may be too."""
    return "register_adapter_tokens." not in key and f".{name}." in f".{key.removeprefix(_PREFIX)}"
