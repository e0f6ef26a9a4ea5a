"""Register tokens for vision transformers that people already use, as a PEFT method.

Importing the package registers the method with PEFT, whose loaders then read its files; that is its only effect.

    >>> from transformers import AutoModel
    >>> from register_adapter import add_registers
    >>> model = add_registers(AutoModel.from_pretrained("facebook/dinov2-base"), num_registers=4)
"""

from ._version import __version__
from .artifacts import ArtifactReport, audit
from .errors import (
    AdapterFileError,
    BaseModelMismatchError,
    MissingExtraError,
    NoArtifactsError,
    RegisterAdapterError,
    UnsupportedModelError,
)
from .export import export_native, export_onnx, export_program, save_native
from .features import Trace, capture
from .neurons import fit_test_time_registers
from .towers import FAMILIES, Anatomy, find_tower
from .tuner import (
    ComposedPeftModel,
    RegisterConfig,
    RegisterLayer,
    RegisterModel,
    RegisterPeftModel,
    add_registers,
    compose,
    find_register_layer,
    load_adapters,
    rename_adapter,
    save_adapters,
)
from .utils import HubAccessError
from .viz import attention_map

__all__ = [
    "FAMILIES",
    "AdapterFileError",
    "Anatomy",
    "ArtifactReport",
    "BaseModelMismatchError",
    "ComposedPeftModel",
    "HubAccessError",
    "MissingExtraError",
    "NoArtifactsError",
    "RegisterAdapterError",
    "RegisterConfig",
    "RegisterLayer",
    "RegisterModel",
    "RegisterPeftModel",
    "Trace",
    "UnsupportedModelError",
    "__version__",
    "add_registers",
    "attention_map",
    "audit",
    "capture",
    "compose",
    "export_native",
    "export_onnx",
    "export_program",
    "find_register_layer",
    "find_tower",
    "fit_test_time_registers",
    "load_adapters",
    "rename_adapter",
    "save_adapters",
    "save_native",
]
