"""The exceptions of the package: each names what was wrong, what was found and what to do."""

from __future__ import annotations

__all__ = [
    "AdapterFileError",
    "BaseModelMismatchError",
    "Farewell",
    "MissingExtraError",
    "NoArtifactsError",
    "RegisterAdapterError",
    "UnsupportedModelError",
    "check_format",
    "install_command",
]

#: Where the package is installed from as long as PyPI does not have it; see [project.urls] in pyproject.toml.
_SOURCE = "git+https://github.com/register-adapter/register-adapter"


def install_command(extra: str = "", upgrade: bool = False) -> str:
    """The command that installs this package.

    Args:
        extra: Name of an extra.
        upgrade: Whether it is there, and too old.
    """
    what = f'"register-adapter[{extra}] @ {_SOURCE}"' if extra else _SOURCE
    return f"pip install {'-U ' if upgrade else ''}{what}"


def check_format(version: object, newest: int) -> None:
    """``ValueError`` for a format of a file that this release does not know, or that there is not."""
    if type(version) is not int or version < 1:
        raise ValueError(f"it has format {version!r:.100}, which there is not; save it again")
    if version > newest:
        raise ValueError(
            f"it has format {version!r}, the newest this release knows is {newest}. "
            f"Upgrade with: {install_command(upgrade=True)}"
        )


class RegisterAdapterError(Exception):
    """Base class of the package's own errors."""


class Farewell(SystemExit):
    """The end of a process that was interrupted and has said how to go on."""


class UnsupportedModelError(RegisterAdapterError, ValueError):
    """The model has no vision tower that registers can enter, or several and none was chosen."""


class BaseModelMismatchError(RegisterAdapterError, ValueError):
    """The adapter was trained for another base model."""


class AdapterFileError(RegisterAdapterError, ValueError):
    """An adapter's file is damaged, hostile, or does not hold what its config says."""


class NoArtifactsError(RegisterAdapterError):
    """There is nothing to repair."""


class MissingExtraError(RegisterAdapterError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} need the package {package!r}: {install_command(extra)}")
