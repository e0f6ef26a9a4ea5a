"""Register tokens for vision transformers that people already use, as a PEFT method.

Importing the package registers the method with PEFT, whose loaders then read its files; that is its only effect.

    >>> from transformers import AutoModel
    >>> from register_adapter import add_registers
    >>> model = add_registers(AutoModel.from_pretrained("facebook/dinov2-base"), num_registers=4)

In the process of the command line nothing is imported before a command needs it, so that help and completion are quick.
"""

import importlib
import sys
from pathlib import PurePath
from typing import Any


def _is_command_line() -> bool:
    """Whether this process is ``register-adapter``, ``python -m register_adapter`` or its ``.train``."""
    script, *arguments = getattr(sys, "argv", None) or [""]
    if script == "-m":  # as long as the interpreter looks for the module, which stands before the module's arguments
        module = sys.orig_argv[-1 - len(arguments) :][:1]
        return module in [[f"{dash}{name}"] for dash in ("", "-m") for name in (__name__, f"{__name__}.train")]
    return PurePath(script).name in ("register-adapter", "register-adapter.exe")


#: ``False`` until a public name is asked for in the process of the command line; everywhere else ``True`` at once.
_loaded = globals().get("_loaded", not _is_command_line())

if _loaded:
    from . import testbed  # noqa: F401 - says how the models that the package ships are written
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
    from .features import FeatureTable, Trace, capture, get_features
    from .neurons import fit_test_time_registers
    from .towers import FAMILIES, Anatomy, find_tower
    from .tuner import (
        ComposedPeftModel,
        PositionConfig,
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
    from .utils import HubAccessError, version
    from .viz import attention_map

    __version__ = version()

__all__ = [
    "FAMILIES",
    "AdapterFileError",
    "Anatomy",
    "ArtifactReport",
    "BaseModelMismatchError",
    "ComposedPeftModel",
    "FeatureTable",
    "HubAccessError",
    "MissingExtraError",
    "NoArtifactsError",
    "PositionConfig",
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
    "get_features",
    "load_adapters",
    "rename_adapter",
    "save_adapters",
    "save_native",
]


def _load(name: str) -> Any:
    """Import everything when a public name is asked for: the module is executed once more, now as in any process."""
    global _loaded
    if _loaded or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _loaded = True
    return getattr(importlib.reload(sys.modules[__name__]), name)


# Not a definition: for a type checker every name would exist.
globals()["__getattr__"] = _load
