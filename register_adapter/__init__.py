"""Register tokens for vision transformers that people already use, as a PEFT method.

Importing the package registers the method with PEFT; that is its only effect.

    >>> from transformers import AutoModel
    >>> from register_adapter import add_registers
    >>> model = add_registers(AutoModel.from_pretrained("facebook/dinov2-base"), num_registers=4)
"""

from ._peft_compat import register as _register
from ._version import __version__
from .adapter_names import rename_adapter
from .artifacts import ArtifactReport, audit
from .capture import Trace, capture
from .composition import ComposedPeftModel, compose, load_adapters, save_adapters
from .config import RegisterConfig
from .errors import (
    AdapterFileError,
    BaseModelMismatchError,
    MissingExtraError,
    NoArtifactsError,
    RegisterAdapterError,
    UnsupportedModelError,
)
from .export import export_native, export_onnx, export_program, save_native
from .layer import RegisterLayer
from .model import RegisterModel
from .neurons import fit_test_time_registers
from .peft_model import RegisterPeftModel, add_registers
from .towers.anatomy import Anatomy
from .towers.families import FAMILIES
from .utils.hub import HubAccessError
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
    "fit_test_time_registers",
    "load_adapters",
    "rename_adapter",
    "save_adapters",
    "save_native",
]

_register(RegisterConfig, RegisterModel)
