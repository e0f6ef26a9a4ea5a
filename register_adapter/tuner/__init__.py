"""The adapter as a PEFT method: config, layer, tuner and model; the import registers the method with PEFT."""

from ._peft_compat import register
from .composed import ComposedPeftModel, compose, load_adapters, rename_adapter, save_adapters
from .config import RegisterConfig
from .layer import RegisterLayer, find_register_layer
from .model import RegisterModel
from .peft_model import RegisterPeftModel, add_registers

__all__ = [
    "ComposedPeftModel",
    "RegisterConfig",
    "RegisterLayer",
    "RegisterModel",
    "RegisterPeftModel",
    "add_registers",
    "compose",
    "find_register_layer",
    "load_adapters",
    "rename_adapter",
    "save_adapters",
]

register(RegisterConfig, RegisterModel)
