"""Whether there is a model of a name at all, said in one line before any library tries to load it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import RegisterAdapterError
from .hub import CONFIG_NAME, MANIFEST_NAME, OFFLINE, HubAccessError, access_error, hub_errors
from .shipped import is_shipped
from .text import printable

__all__ = ["loading", "require_model"]

_CONFIG = "config.json"
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


@contextmanager
def loading(name: str, what: str = "model", token: str | bool | None = None) -> Iterator[None]:
    """Turn whatever a library raises over damaged or odd files, or over the Hub, into one line that names their folder.

    Args:
        name: Folder or name that is loaded within the context.
        what: What it is.
        token: The token for the Hub; by default the one that huggingface_hub finds.

    Raises:
        HubAccessError: The Hub could not be reached, or refused; the message does not show the token.
        ValueError: Something was raised within. The package's own errors, and a ``ValueError`` or ``OSError`` that
            names the folder already, pass as they are.
        PermissionError: A file may not be read, which safetensors takes for one that is not there.
    """
    try:
        yield
    except RegisterAdapterError:
        raise
    except Exception as error:
        if (refused := access_error(name, error, token)) is not None:
            raise refused from refused.__cause__
        if isinstance(error, FileNotFoundError) and (closed := _closed_file(name, str(error))) is not None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(closed)) from error
        if isinstance(error, OSError | ValueError) and name in str(error):
            raise
        said = printable(next(filter(None, map(str.strip, str(error).splitlines())), "no message"))
        raise ValueError(
            f"the {what} in '{printable(name)}' cannot be loaded: its files are damaged, do not belong together or are "
            f"of another kind ({type(error).__name__}: {said:.300}). Fetch or save it again"
        ) from error


def _closed_file(folder: str, message: str) -> Path | None:
    """The file of a folder that a message names and that may not be read."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return next((path for path in paths if str(path) in message and not os.access(path, os.R_OK)), None)


def require_model(name: str, **options: Any) -> None:
    """Check that ``name`` is a folder with a model of transformers, or the name of one on the Hub or in its cache.

    Args:
        name: Folder or name.
        options: As for ``from_pretrained``; those that concern the Hub count.

    Raises:
        HubAccessError: There is none, or it cannot be read; the message is one line and says what to do.
    """
    if not name:
        raise HubAccessError("the name of the model is empty; give a folder, or a name on the Hub")
    if is_shipped(name) or (Path(name) / _CONFIG).is_file():
        return
    if Path(name).is_file():
        raise HubAccessError(f"{name!r} is a file; a model is a folder, or a name on the Hub")
    if any((Path(name) / file).is_file() for file in (CONFIG_NAME, MANIFEST_NAME)):
        raise HubAccessError(
            f"{name!r} holds an adapter, and a model is needed: name the one it was made for, and this as the adapter"
        )
    if Path(name).is_dir():
        raise HubAccessError(f"no model in the folder {name!r}: it has no {_CONFIG}")
    hub = {key: options[key] for key in _HUB if options.get(key) is not None}
    try:
        with hub_errors(name, hub.get("revision"), hub.get("token")):
            hf_hub_download(name, _CONFIG, **hub)
    except EntryNotFoundError as error:
        raise HubAccessError(f"no model in the repository {name!r}: it has no {_CONFIG}") from error
    except HubAccessError as error:
        cause = error.__cause__
        if name.startswith(("hf-hub:", "local-dir:")):
            why = "such names are OpenCLIP's and timm's; here it must be transformers': a folder, or 'user/model'"
        elif isinstance(cause, HFValidationError):
            why = "there is no such folder, and a name on the Hub is 'user/model'. Check the name"
        elif isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled) and _offline(cause):
            why = OFFLINE
        elif isinstance(cause, RepositoryNotFoundError):
            why = "there is no such folder, and the Hub shows no repository of that name. Check the name"
        else:
            raise
        raise HubAccessError(f"no model {name!r}: {why}") from error


def _offline(error: BaseException) -> bool:
    """Whether it was not tried to reach the Hub, and not in vain."""
    return isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled | type(None))
