"""Names of the models that the package ships, which lead to them wherever the package is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .environment import version
from .staging import staged

__all__ = [
    "CLEAN",
    "GROWN",
    "GROWN_TILES",
    "PLANTED",
    "SHIPPED",
    "full_name",
    "is_shipped",
    "local_folder",
    "ship",
    "shipped_model",
    "shipped_name",
    "shipped_processor",
]

_SCHEME = "register-adapter://"
CLEAN, PLANTED = f"{_SCHEME}clean", f"{_SCHEME}planted"
GROWN, GROWN_TILES = f"{_SCHEME}grown", f"{_SCHEME}grown-tiles"
#: All of them.
SHIPPED = (CLEAN, PLANTED, GROWN, GROWN_TILES)
_FOLDER = "register_adapter"
#: Name to what makes the model, and its image processor.
_SHIPPED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}


def is_shipped(name: Any) -> bool:
    """Whether a name is one of those."""
    return isinstance(name, str) and name.startswith(_SCHEME)


def full_name(word: str) -> str:
    """The name of a shipped model for its last word, where no folder is called so; any other name as it is."""
    return f"{_SCHEME}{word}" if f"{_SCHEME}{word}" in SHIPPED and not Path(word).exists() else word


def local_folder(name: str) -> str:
    """The folder in the cache that holds a shipped model, written on first use; any other name as it is.

    Raises:
        ValueError: The package ships no model of that name.
    """
    if not is_shipped(name):
        return name
    _known(name)
    return str(_written(name))


def shipped_model(name: str) -> Any:
    """A shipped model, in float32 and ``eval()`` mode, under a name that leads to it on any machine.

    Raises:
        ValueError: The package ships no model of that name.
    """
    model = _known(name)[0]()
    model.name_or_path = model.config._name_or_path = name
    return model


def shipped_processor(name: str) -> Any:
    """Its image processor.

    Raises:
        ValueError: The package ships no model of that name.
    """
    return _known(name)[1]()


def _known(name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    if not isinstance(name, str) or name not in _SHIPPED:
        raise ValueError(f"{name!r} is not shipped with register-adapter; it has {', '.join(SHIPPED)}")
    return _SHIPPED[name]


def shipped_name(folder: str | None) -> str | None:
    """The inverse of :func:`local_folder`."""
    path = Path(folder) if folder and not is_shipped(folder) else None
    if path is not None and path.parent.name == version() and path.parent.parent.name == _FOLDER:
        return f"{_SCHEME}{path.name}" if f"{_SCHEME}{path.name}" in SHIPPED else folder
    return folder


@cache
def _written(name: str) -> Path:
    place = Path(_FOLDER, version(), name.removeprefix(_SCHEME))
    folder = Path(constants.HF_HOME) / place
    try:
        return _write(name, folder)
    except OSError:  # a cache that cannot be written
        return _write(name, Path(tempfile.mkdtemp()) / place)


def _write(name: str, folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    with staged(folder, last=("config.json",)) as scratch:
        shipped_model(name).save_pretrained(scratch)
        shipped_processor(name).save_pretrained(scratch)
    return folder


def ship(name: str, model: Callable[[], Any], processor: Callable[[], Any]) -> None:
    """Say how a shipped model is made; the test bed does, which knows what it holds.

    Args:
        name: One of :data:`SHIPPED`.
        model: Makes the model.
        processor: Makes its image processor.
    """
    _SHIPPED[name] = (model, processor)
