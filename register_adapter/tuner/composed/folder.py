"""A folder with several adapters: a subfolder for each, as PEFT writes it, and a manifest of what belongs there.

``adapters.json`` is written last and holds a checksum of every weights file, so that half a save is never loaded.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...errors import AdapterFileError, check_format
from ...utils.files import checksum
from ...utils.hub import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, checked_token, fetch
from ...utils.staging import staged
from ..fields import check_name as check_any_name
from ..reading import naming, note_checksums, read_json
from .class_names import classes_of, read_classes
from .methods import check_composable
from .one_adapter import SavedAdapter, read_files

__all__ = [
    "check_name",
    "fetch_folder",
    "holds_several",
    "read_folder",
    "write_folder",
]

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_name(name: Any) -> str:
    """An adapter's name is also the name of its folder, and a part of its tensors' keys.

    Raises:
        ValueError: It has other characters than letters, digits, ``-`` and ``_``, or means something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"an adapter's name has letters, digits, '-' and '_' only, got {name!r}")
    check_any_name(name)
    return name


def write_folder(
    folder: str | Path,
    adapters: Mapping[str, tuple[PeftConfig, Mapping[str, torch.Tensor]]],
    active: Iterable[str],
    tower: str | None = None,
) -> None:
    """Write adapters aside, and move them into the folder when all are whole, the manifest last.

    Args:
        folder: Made if it does not exist; other files in it stay.
        adapters: Config and tensors (by the key of PEFT's files) by adapter name.
        active: Names of the adapters that are active, in order.
        tower: Where the vision tower lies in the model.

    Raises:
        ValueError: The folder is a file, or a name cannot be a folder's.
        OSError: The files could not be written; what was in the folder is as before.
    """
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{target} is a file; adapters are saved into a folder")
    names = [check_name(name) for name in adapters]
    order = [*active, *names]
    entries = []
    try:
        with staged(folder, last=(MANIFEST_NAME,)) as staging:
            for name in sorted(names, key=order.index):
                config, tensors = adapters[name]
                config = copy.deepcopy(config)
                config.inference_mode = True
                for field, value in vars(config).items():
                    if isinstance(value, set):  # its order is another one in every process, and so are the file's bytes
                        setattr(config, field, sorted(value))
                place = staging / name
                place.mkdir()
                # Clones, since safetensors refuses tensors that share memory.
                whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
                save_file(whole, place / WEIGHTS_NAME, metadata={"format": "pt"})
                config.save_pretrained(str(place))
                entries.append(
                    {
                        "name": name,
                        "method": config.peft_type.value,
                        "active": name in order[: -len(names)],
                        "sha256": checksum(place / WEIGHTS_NAME),
                    }
                    | ({"id2label": classes} if (classes := classes_of(config)) else {})
                )
            note_checksums(staging)
            for entry in entries:
                entry["config_sha256"] = checksum(staging / entry["name"] / CONFIG_NAME)
            manifest = {"format_version": _VERSION, "tower": tower, "adapters": entries}
            # Without tensors: transformers' Trainer looks for this file to tell a checkpoint of adapters.
            save_file({}, staging / WEIGHTS_NAME, metadata={"format": "pt"})  # two entries have no order
            (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the adapters could not be saved to {target} ({error}); what was there before is untouched"
        ) from error


def holds_several(name: str | Path) -> bool:
    """Whether a folder, or a repository on the Hub, holds adapters of several methods.

    Raises:
        HubAccessError: The repository cannot be read.
    """
    if Path(name).exists():
        return Path(name, MANIFEST_NAME).is_file()
    return fetch(str(name), MANIFEST_NAME, None, {}) is not None


def fetch_folder(name: str | Path, hub: dict[str, Any]) -> Path:
    """The folder itself, or the local copy of a repository on the Hub, of what its manifest names.

    Args:
        name: Folder, or repository on the Hub.
        hub: ``revision``, ``token``, ``subfolder``... as for ``hf_hub_download``.

    Raises:
        AdapterFileError: There is no manifest, or it is damaged, or names what the repository lacks.
        HubAccessError: The repository cannot be read.
    """
    subfolder = str(hub.get("subfolder") or "").rstrip("/")
    if Path(name).exists():
        return Path(name, subfolder)
    hub = {key: value for key, value in hub.items() if value is not None and key != "subfolder"}
    hub["token"] = checked_token(hub.get("token"))
    manifest = fetch(str(name), MANIFEST_NAME, subfolder or None, hub)
    if manifest is None:
        place = f"{str(name)!r}, folder {subfolder!r}" if subfolder else repr(str(name))
        raise AdapterFileError(
            f"there is no {MANIFEST_NAME} in {place}: it was not written by save_adapters. A repository with one "
            "adapter is loaded with PeftModel.from_pretrained."
        )
    for entry in _entries(manifest):
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            fetch(str(name), file, "/".join(filter(None, (subfolder, entry["name"]))), hub)
    return manifest.parent


def read_folder(folder: str | Path, selected: Iterable[str] | None = None) -> list[SavedAdapter]:
    """Read the manifest and check everything that it names.

    Args:
        folder: As :func:`write_folder` made it.
        selected: Names of the adapters to read, default all.

    Raises:
        AdapterFileError: The manifest, a config or weights are missing, damaged, or of another save.
        ValueError: ``selected`` names an adapter that is not there.
    """
    if not (path := Path(folder) / MANIFEST_NAME).is_file():
        raise AdapterFileError(
            f"there is no {MANIFEST_NAME} in {folder}: it is not a folder of save_adapters. A folder with one adapter "
            "is loaded with PeftModel.from_pretrained."
        )
    entries = _entries(path)
    names = [entry["name"] for entry in entries]
    wanted = list(names if selected is None else selected)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"no adapter {', '.join(map(repr, unknown))} in {folder}; it has {names}")
    tower = read_json(path).get("tower")
    if tower is not None and not isinstance(tower, str):
        raise AdapterFileError(f"{path} must name the tower by a string, got {tower!r:.100}")
    return [replace(_read_adapter(path.parent, entry), tower=tower) for entry in entries if entry["name"] in wanted]


def _entries(path: Path) -> list[dict[str, Any]]:
    """What a manifest lists, checked."""
    try:
        manifest = read_json(path)
        version, entries = manifest["format_version"], manifest["adapters"]
        names = [check_name(entry["name"]) for entry in entries]
        whole = all(
            isinstance(entry[key], kind)
            for entry in entries
            for key, kind in (("method", str), ("active", bool), ("sha256", str))
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterFileError(f"{path} is not a manifest of adapters ({type(error).__name__}: {error})") from error
    try:
        check_format(version, _VERSION)
    except ValueError as error:
        raise AdapterFileError(f"{path} cannot be loaded: {error}") from error
    if not names or not whole or len(set(names)) != len(names):
        raise AdapterFileError(
            f"{path} lists no adapters, one twice, or one without method, state and checksum: {names}"
        )
    return list(entries)


def _read_adapter(folder: Path, entry: dict[str, Any]) -> SavedAdapter:
    name, method = entry["name"], entry["method"]
    place = folder / name
    if missing := [file for file in (CONFIG_NAME, WEIGHTS_NAME) if not (place / file).is_file()]:
        raise AdapterFileError(f"the adapter {name!r} in {folder} has no {' and no '.join(missing)}. Save it again.")
    digests = {WEIGHTS_NAME: entry["sha256"], CONFIG_NAME: entry.get("config_sha256")}
    damaged = [file for file, digest in digests.items() if digest is not None and checksum(place / file) != digest]
    if damaged:
        raise AdapterFileError(
            f"{place / damaged[0]} is not the file that {MANIFEST_NAME} describes: it is damaged, or of another save. "
            "Save all adapters again, or load it alone with PeftModel.from_pretrained."
        )
    said = read_json(place / CONFIG_NAME).get("peft_type")
    if said != method:
        raise AdapterFileError(
            f"the adapter {name!r} is of the method {method!r:.100} in {folder / MANIFEST_NAME} and {said!r:.100} in "
            f"{place / CONFIG_NAME}; this peft knows "
            f"{', '.join(sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))}. Nothing was changed."
        )
    config, keys = read_files(place / CONFIG_NAME, place / WEIGHTS_NAME)
    with naming(place / CONFIG_NAME):
        check_composable(name, config)
    read_classes(config, entry, folder / MANIFEST_NAME)
    # Manifests of old releases have no checksum of the config.
    found = {file: digest for file, digest in digests.items() if digest is not None}
    return SavedAdapter(name, place, config, entry["active"], keys, digests=found)
