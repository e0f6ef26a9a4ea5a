"""An adapter's files fetched from a folder or the Hub, and uploaded; errors say what to do and never show a token."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, file_exists, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import AdapterFileError, RegisterAdapterError
from .environment import version

__all__ = [
    "CONFIG_NAME",
    "MANIFEST_NAME",
    "OFFLINE",
    "WEIGHTS_NAME",
    "HubAccessError",
    "access_error",
    "check_folder",
    "checked_token",
    "fetch",
    "find_config",
    "find_weights",
    "hub_errors",
    "upload",
]

CONFIG_NAME, WEIGHTS_NAME, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
#: What a folder of several adapters has in place of a config.
MANIFEST_NAME = "adapters.json"
# The HTTP library behind huggingface_hub has changed twice; its base of all errors is above HfHubHTTPError in each.
_HTTP_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ in ("HTTPError", "RequestException"))
#: Answers that say that something is not on the Hub.
_NOT_THERE = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
_LOG_IN = "log in with `hf auth login`, or give a token that may read it: token=..."


#: Why a name leads nowhere without a network.
OFFLINE = (
    "there is no such folder, it is not in the local cache, and offline mode is set (HF_HUB_OFFLINE or "
    "local_files_only). Check the name, or go online"
)


class HubAccessError(RegisterAdapterError, ValueError):
    """A repository on the Hub could not be read or written; the message says why and what to do."""


def checked_token(token: str | bool | None) -> str | bool | None:
    """The token without the white space that a file or a terminal leaves around it.

    An HTTP library refuses a header with other characters, and shows the whole header in its error.

    Raises:
        ValueError: The token has characters that cannot be sent; the message does not show it.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token is empty or has characters that no token has; copy it again")
    return token


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Iterator[None]:
    """Turn what goes wrong while talking to the Hub into a :class:`HubAccessError`.

    Args:
        repo_id: The repository, for the message.
        revision: The revision that was asked for, for the message.
        token: The token in use; an error in whose text it appears is not shown.

    Raises:
        HubAccessError: Anything that the Hub, or the way to it, refused. A file that the repository lacks passes as
            huggingface_hub's ``EntryNotFoundError``, and so does a fault of the local disk (``OSError``).
    """
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise HubAccessError(_unreachable(repo_id, error.__cause__ or error)) from _shown(error, token)
    except EntryNotFoundError as error:
        if _shown(error, token) is None:
            raise HubAccessError(_hidden(repo_id, error)) from None
        raise
    except HubAccessError:  # of a call in this one
        raise
    except Exception as error:
        # An upload that fails in a thread of huggingface_hub comes wrapped, and so does a forced download. Not ours.
        wrapped = isinstance(error, RuntimeError | ValueError) and not isinstance(error, RegisterAdapterError)
        inner = error.__cause__ if wrapped else None
        message = _explain(repo_id, revision, token, inner if isinstance(inner, Exception) else error)
        if message is None:
            if _shown(error, token) is None:
                raise HubAccessError(_hidden(repo_id, error)) from None
            raise
        raise HubAccessError(message) from _shown(error, token)


def access_error(repo_id: str, error: Exception, token: str | bool | None = None) -> HubAccessError | None:
    """What kept another library from the Hub, where that is what is behind its error; the token is not in it.

    Args:
        repo_id: The repository, for the message.
        error: What the library raised.
        token: The token in use.

    Returns:
        An error with its cause, ``None`` if the Hub did answer, if only that there is no such repository or file.
    """
    shown, told = _shown(error, token), None
    cause: BaseException | None = error
    while isinstance(cause, Exception) and told is None:
        if isinstance(cause, _HTTP_ERRORS) and not isinstance(cause, _NOT_THERE) and _status(cause) != 404:
            told = _explain(repo_id, None, token, cause)
        cause = cause.__cause__ or cause.__context__
    if told is None and shown is not None:
        return None
    refused = HubAccessError(told or _hidden(repo_id, error))
    refused.__cause__ = shown
    return refused


def _status(error: BaseException) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _explain(repo_id: str, revision: str | None, token: str | bool | None, error: Exception) -> str | None:
    """What an error of huggingface_hub means for the user, ``None`` for one that has nothing to do with the Hub."""
    status = _status(error)
    refused = "Invalid credentials" in str(error)
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is neither a folder that holds {CONFIG_NAME} nor a name on the Hub ('user/repo')."
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: ask for access on its page {_endpoint()}/{repo_id}, then {_LOG_IN}."
    if isinstance(error, RepositoryNotFoundError) and not refused:
        given = "with the token in use" if _secret(token) else "without a token"
        return (
            f"there is no folder {repo_id!r} that holds {CONFIG_NAME}, and {_endpoint()} shows no repository of that "
            f"name {given}. Check the name; if it is private, {_LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no branch, tag or commit {revision!r}; give another revision=..., or none for 'main'."
    if status == 401:
        return f"{_endpoint()} refused the token for {repo_id!r}: it is wrong or expired; {_LOG_IN}."
    if status == 403:
        return f"the token may not do this with {repo_id!r} (403): it needs access of its own to that repository."
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        said = said.replace(_secret(token) or "\n", " ")
        return f"{_endpoint()} answered {status} for {repo_id!r}{said}. Nothing was loaded or uploaded."
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id!r} cannot be reached: HF_HUB_OFFLINE is set. Unset it."
    short = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    if short or isinstance(error, JSONDecodeError | FileMetadataError):
        return (
            f"what {_endpoint()} answered about {repo_id!r} is not what the Hub answers; check HF_ENDPOINT, the proxy, "
            "and whether the network wants a login."
        )
    return _unreachable(repo_id, error) if isinstance(error, _HTTP_ERRORS) else None


def _unreachable(repo_id: str, error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"no adapter {repo_id!r}: {OFFLINE}"
    status = _status(error)
    cause = f"it answered {status}" if status else type(error).__name__
    return f"{repo_id!r} cannot be reached at {_endpoint()} ({cause}); check the connection."


def _endpoint() -> str:
    """The Hub's address, without a user name and password that may be in it."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _secret(token: str | bool | None) -> str | None:
    return token if isinstance(token, str) else None if token is False else get_token()


def _hidden(repo_id: str, error: Exception) -> str:
    return f"talking to {_endpoint()} about {repo_id!r} failed ({type(error).__name__}); its message holds the token"


def _shown(error: Exception, token: str | bool | None) -> Exception | None:
    """The error to chain, ``None`` if a server or a proxy has put the token into its text."""
    secret = _secret(token)
    return None if secret and secret in "".join(traceback.format_exception(error)) else error


def fetch(name: str, filename: str, subfolder: str | None, hub: dict[str, Any]) -> Path | None:
    """Local path of one file of a repository, downloaded if it is not in the cache.

    Args:
        name: Repository on the Hub.
        filename: File in it.
        subfolder: Folder in it.
        hub: ``revision``, ``token``, ``cache_dir``... as for ``hf_hub_download``.

    Returns:
        The path, or ``None`` if the repository has no such file.

    Raises:
        HubAccessError: The repository cannot be read.
    """
    with hub_errors(name, hub.get("revision"), hub.get("token")):
        try:
            return Path(hf_hub_download(name, filename, subfolder=subfolder, **hub))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


def find_config(name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """Local path of an adapter's config.

    Raises:
        AdapterFileError: The folder or the repository holds none.
        HubAccessError: The repository cannot be read.
    """
    local = Path(name, subfolder or "", CONFIG_NAME)
    if local.is_file():
        return local
    # A name that is a folder here is never looked up on the Hub, where it may belong to somebody else.
    path = None if Path(name).is_dir() else fetch(name, CONFIG_NAME, subfolder, hub)
    if path is None:
        place = _place(name, subfolder, hub)
        if Path(name, subfolder or "", MANIFEST_NAME).is_file():
            raise AdapterFileError(f"there are several adapters in {place}, and one is needed: use load_adapters.")
        raise AdapterFileError(f"no adapter in {place}: it has no {CONFIG_NAME}.")
    return path


def find_weights(name: str, subfolder: str | None, hub: dict[str, Any]) -> Path | None:
    """Local path of an adapter's safetensors file, ``None`` if there are no weights at all.

    Raises:
        AdapterFileError: There are only pickled weights; they are not even downloaded.
        HubAccessError: The repository cannot be read.
    """
    folder = Path(name, subfolder or "")
    # A name that is a folder here is never looked up on the Hub.
    if Path(name).is_dir():
        path = folder / WEIGHTS_NAME if (folder / WEIGHTS_NAME).is_file() else None
        pickled = path is None and (folder / _PICKLE).exists()
    else:
        path = fetch(name, WEIGHTS_NAME, subfolder, hub)
        pickled = path is None and _has_pickle(name, subfolder, hub)
    if pickled:
        raise AdapterFileError(
            f"{_place(name, subfolder, hub)} holds pickled weights ({_PICKLE}), which can run code when they are read "
            f"and are never loaded. Ask for {WEIGHTS_NAME}."
        )
    return path


def upload(
    folder: Path,
    repo_id: str,
    write_card: Callable[[str], None],
    *,
    commit_message: str | None,
    commit_description: str | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload a folder in one commit, with the README of the repository brought up to date.

    Args:
        folder: What is uploaded.
        repo_id: The repository, which is made if it does not exist.
        write_card: Brings the folder's README up to date, given the repository's full name.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        private: Make a new repository private.
        token: Access token, checked.
        revision: Branch to commit to, made if it does not exist.
        create_pr: Open a pull request instead.

    Raises:
        HubAccessError: The Hub refused it or cannot be reached, or somebody else has committed meanwhile.
    """
    api = HfApi(token=token, library_name="register-adapter", library_version=version())
    with hub_errors(repo_id, revision, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # The commit goes on top of this one or fails, so that an edit of the README meanwhile is not lost.
        head = api.repo_info(repo_id, revision=revision).sha
        # From the server and not from the cache, which may hold an older text when the server stumbles.
        readme = fetch(repo_id, "README.md", None, {"revision": head, "token": token, "force_download": True})
        if readme is not None:
            shutil.copyfile(readme, folder / "README.md")
        write_card(repo_id)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
            commit_message=commit_message or "Upload register adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )


def check_folder(name: str | Path, subfolder: str | None = None) -> None:
    """Refuse a folder without weights, for which PEFT would look up a repository of the folder's name.

    Raises:
        AdapterFileError: ``name`` is a folder here, and there is no safetensors file in it, or a pickled one alone.
    """
    place = Path(name, subfolder or "")
    if Path(name).is_dir() and find_weights(str(name), subfolder, {}) is None:
        raise AdapterFileError(
            f"the adapter in {str(place)!r} has no weights: there is no {WEIGHTS_NAME}. Nothing was changed."
        )


def _has_pickle(name: str, subfolder: str | None, hub: dict[str, Any]) -> bool:
    remote = {key: hub[key] for key in ("revision", "token", "repo_type") if key in hub}
    with hub_errors(name, hub.get("revision"), hub.get("token")):
        return file_exists(name, f"{subfolder}/{_PICKLE}" if subfolder else _PICKLE, **remote)


def _place(name: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    at = f" at revision {str(hub['revision'])!r}" if "revision" in hub and not Path(name).is_dir() else ""
    return f"{name!r}{f', folder {subfolder!r}' if subfolder else ''}{at}"
