"""Reading an adapter's folder: the one place where what a stranger wrote becomes a config or an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftType
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError, RegisterAdapterError
from ..utils.adapter_file import TensorInfo, read_header
from ..utils.files import check_regular, checksum, open_regular
from ..utils.hub import CONFIG_NAME, WEIGHTS_NAME, checked_token, find_config, find_weights
from ..utils.text import one_line
from ._peft_compat import METHOD

__all__ = [
    "IMPORTABLE",
    "SavedFolder",
    "SavedWeights",
    "check_imports",
    "check_method",
    "check_to_read",
    "naming",
    "note_checksums",
    "read_json",
    "told",
    "without_unlisted",
]

#: Packages that a config may name as the home of its base model's class; PEFT's AutoPeftModel imports what it finds.
IMPORTABLE = ("transformers", "timm", "open_clip", "torchvision", "register_adapter", "peft")
#: Far beyond any config.
_MAX_BYTES = 2**24
# Where other methods' configs name a module that PEFT imports, and the only values with which nothing strange is.
_IMPORTS = {"megatron_core": (None, "megatron.core")}


class SavedWeights(NamedTuple):
    """What was found in the weights' file beside a config, which has been checked against it.

    Attributes:
        path: The file.
        layout: Dtypes and shapes by key.
        units: Hidden units of the register neurons, in the order of blocks; ``None`` without any.
    """

    path: Path
    layout: dict[str, TensorInfo]
    units: list[int] | None


class SavedFolder:
    """Where an adapter of this package is saved, and what its config says, before anything is made of it.

    Args:
        config_class: The method's class of configs.
        name: Folder, or repository on the Hub.
        subfolder: Folder below that.
        kwargs: ``revision``, ``token``, ``cache_dir``… for the Hub, among others; the token is checked in place.
        method: The method that it is to be of.
        called: What that method is of, in the error.

    Attributes:
        path: The config's file.
        values: What is in it.

    Raises:
        AdapterFileError: There is no config, or it is of another method, or names a special file as its base.
        HubAccessError: The repository on the Hub cannot be read.
    """

    def __init__(
        self, config_class: Any, name: str, subfolder: str | None, kwargs: dict[str, Any], method: str, called: str
    ) -> None:
        kwargs["token"] = checked_token(kwargs.get("token"))
        hub = {key: value for key, value in config_class._split_kwargs(kwargs)[0].items() if value is not None}
        self._place = name, subfolder, hub
        self.path = find_config(*self._place)
        self.values = read_json(self.path)
        found = self.values.get("peft_type")
        if found != method.upper():
            raise AdapterFileError(f"{self.path} of {name!r} is of the method {found!r:.100}, not {called}.")
        base = self.values.get("base_model_name_or_path")
        if base and isinstance(base, str):
            with naming(self.path):
                check_regular(base)  # other libraries would wait for a pipe's other end

    def weights(self) -> Path | None:
        """The weights beside the config, ``None`` for one that was never attached to a model and may stand alone.

        Raises:
            AdapterFileError: There are none, or they are pickled.
        """
        weights = find_weights(*self._place)
        if weights is None and self.values.get("base_tower") is not None:
            raise AdapterFileError(
                f"the adapter in {self._place[0]!r} has no weights: there is no {WEIGHTS_NAME} in {self.path.parent}. "
                "Save it again."
            )
        return weights


@contextmanager
def naming(path: str | Path, others: bool = True) -> Iterator[None]:
    """Within the context, whatever an adapter's file makes go wrong is an error that names the file.

    Args:
        path: The file.
        others: Also what other libraries raise.

    Raises:
        AdapterFileError: In the place of any exception that is none of the package's own; those get the file's name.
    """
    try:
        yield
    except RegisterAdapterError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        if not others:
            raise
        raise AdapterFileError(f"{path} cannot be used: {told(error)}. Nothing was changed.") from error


def told(error: Exception, joined: bool = False) -> str:
    """What an error of another library says, in one line.

    Args:
        error: The error.
        joined: It has lines of its own, as torch's have, which are joined by spaces.
    """
    text = " ".join(str(error).split()) if joined else str(error)
    said = one_line(text or type(error).__name__)
    return f"{said} is missing" if isinstance(error, KeyError) else said.removesuffix(".")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        AdapterFileError: The file is no JSON object in UTF-8, is nested too deeply, or is far too large.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes, where a config has a few thousand")
            values = json.loads(file.read(_MAX_BYTES).decode("utf-8"))
    except RecursionError as error:
        raise AdapterFileError(f"{path} is not a JSON file that can be read: it is nested too deeply") from error
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"{path} is not a JSON file in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def check_method(folder: str | Path, subfolder: str | None, present: PeftConfig | None = None) -> None:
    """Refuse a local folder whose config names no method of PEFT's, before PEFT looks the name up.

    Args:
        folder: The folder.
        subfolder: The folder in it, if any.
        present: Config of the adapter that is to take the values; another method's would leave it as it is.

    Raises:
        AdapterFileError: It is so, or the config is no JSON, or of another method than ``present``.
    """
    path = Path(folder, subfolder or "", CONFIG_NAME)
    if path.is_file():
        method = read_json(path).get("peft_type")
        if not isinstance(method, str) or method not in PeftType.__members__:
            raise AdapterFileError(
                f"{path} names the method {method!r:.100}, which PEFT does not have; registers are {METHOD.upper()!r}. "
                "Nothing was changed."
            )
        if present is not None and method != PeftType(present.peft_type).value:
            raise AdapterFileError(
                f"{path} is an adapter of the method {method}; the one of this name in the model is of "
                f"{PeftType(present.peft_type).value}, and takes no values from it. Give the name of an adapter of "
                f"{method}, or a new name. Nothing was changed."
            )


def check_to_read(name: Any, subfolder: str | None, is_ours: Callable[[], Any]) -> None:
    """Look at a folder's weights before PEFT reads them over those of an adapter, for which it reads no config.

    It would wait for a pipe, unpickle what is there, and name no file.

    Args:
        name: The folder; repositories are left to PEFT.
        subfolder: Folder in it.
        is_ours: Whether its config is of a method of this package; asked if there is a config that can be read.

    Raises:
        AdapterFileError: The weights of a method of this package are pickled, or no whole safetensors file.
        OSError: They are no regular file, of whatever method.
    """
    if not Path(name).is_dir():
        return
    config, weights = (Path(name, subfolder or "", file) for file in (CONFIG_NAME, WEIGHTS_NAME))
    if config.is_file() and config.stat().st_size <= _MAX_BYTES and is_ours():
        if weights.exists():
            read_header(weights)
            try:
                with safe_open(weights, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise AdapterFileError(f"{weights} is not a whole safetensors file: {error}") from error
        else:
            find_weights(str(name), subfolder, {})  # refuses pickled ones
    elif not weights.is_dir():
        check_regular(weights)


def note_checksums(folder: Path) -> None:
    """Write into every config of registers in a new save which weights are beside it."""
    for path in folder.rglob(CONFIG_NAME):
        values, weights = read_json(path), path.with_name(WEIGHTS_NAME)
        if values.get("peft_type") == METHOD.upper() and weights.is_file():
            values["weights_sha256"] = checksum(weights)
            path.write_text(json.dumps(values, indent=2, sort_keys=True), "utf-8")


def check_imports(values: dict[str, Any], path: str | Path) -> None:
    """Refuse the config of another PEFT method that names a module which PEFT would import.

    Raises:
        AdapterFileError: It does.
    """
    for field, harmless in _IMPORTS.items():
        if values.get(field) not in harmless:
            raise AdapterFileError(
                f"{path} names the module {values[field]!r:.100} in {field!r}, which PEFT would import: an adapter "
                f"from a file may name {harmless[1]!r} there, or nothing. Nothing was imported."
            )


def without_unlisted(auto_mapping: Any, any_package: bool = False) -> dict[str, Any] | None:
    """A config's ``auto_mapping``, or ``None`` if it names no class, or one outside of :data:`IMPORTABLE`.

    It is of use to AutoPeftModel alone, which imports what it names; a base model of a class of one's own is built
    first, and given to ``PeftModel.from_pretrained``.

    Args:
        auto_mapping: What the config has.
        any_package: The caller has a list of packages of its own.
    """
    if not isinstance(auto_mapping, dict):
        return None
    names = [auto_mapping.get(key) for key in ("parent_library", "base_model_class")]
    if not all(isinstance(name, str) and all(map(str.isidentifier, name.split("."))) for name in names):
        return None
    return auto_mapping if any_package or str(names[0]).partition(".")[0] in IMPORTABLE else None
