"""The adapter as a PEFT method: config, layer, tuner and model; the import registers the methods with PEFT."""

from ._peft_compat import register, register_positions
from .composed import ComposedPeftModel, compose, load_adapters, rename_adapter, save_adapters
from .composed.idle import run_idle_norms, see_idle_heads
from .config import RegisterConfig
from .layer import RegisterLayer, find_register_layer
from .model import RegisterModel
from .peft_model import RegisterPeftModel, add_registers
from .positions import PositionConfig, PositionModel

__all__ = [
    "ComposedPeftModel",
    "PositionConfig",
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
register_positions(PositionConfig, PositionModel)
see_idle_heads()
run_idle_norms()
