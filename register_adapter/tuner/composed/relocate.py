"""Adapters of a folder on a model in which the tower lies elsewhere: trained on a backbone, used under a head."""

from __future__ import annotations

import copy
import re
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from ...errors import AdapterFileError, UnsupportedModelError
from ...towers.tower import find_tower
from ...utils.adapter_file import is_of, read_header, read_tensors
from ...utils.files import checksum
from ...utils.hub import WEIGHTS_NAME
from .._peft_compat import named_as_in_state
from ..checks.head_weights import lacking_heads, warn_of_left_out
from ..config import RegisterConfig
from ..layer import register_layers
from .methods import KNOW_THEIR_BASE
from .one_adapter import SavedAdapter

__all__ = ["relocated", "tower_path"]

_ROOT = "base_model.model."
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
#: The end of a bias's key, in a layer of PEFT's or not.
_BIAS = re.compile(r"(\.base_layer|\.original_module)?\.bias$")
#: Fields of PEFT's configs with a value for some of the targets.
_BY_TARGET = ("rank_pattern", "alpha_pattern")


def _as_peft(config: PeftConfig, given: Any) -> Callable[[str], Any]:
    asked = copy.copy(config)
    asked.target_modules = given
    return lambda name: check_target_module_exists(asked, name)


#: Fields with names, and how PEFT tells whether one of them means a module or parameter of the model.
_TARGETS: dict[str, Callable[[PeftConfig, Any], Callable[[str], Any]]] = {
    "target_modules": _as_peft,
    "feedforward_modules": _as_peft,
    "modules_to_save": lambda _, given: lambda name: name.endswith(tuple(given)),
    "target_parameters": lambda _, given: lambda name: f".{name}".endswith(tuple(f".{end}" for end in given)),
}


def tower_path(base: nn.Module) -> str | None:
    """Where the vision tower lies in a base model, ``""`` if it is the tower; ``None`` if there is none, or several."""
    layers = register_layers(base)
    if layers:
        return layers[0].tower.path
    try:
        return find_tower(base).path
    except UnsupportedModelError:
        return None


@contextmanager
def relocated(saved: list[SavedAdapter], base: nn.Module) -> Iterator[Iterator[SavedAdapter]]:
    """The adapters as they would have been saved from a model whose tower lies where it does in ``base``.

    Register adapters find their tower themselves. The names of the others' targets may be the ends of paths
    (``"q_proj"``), which a text tower has too: there they are written out. Within the context, moved files are at
    ``copied_to``; each is made when its turn comes, for the base with those before it.

    Args:
        saved: From :func:`read_folder`, or :func:`read_alone`.
        base: The base model.

    Raises:
        AdapterFileError: At the end of the context: a file is not the one that was checked, so what was read may be
            a part of one save and a part of another.
    """
    here = tower_path(base)
    with tempfile.TemporaryDirectory() as scratch:
        placed = [
            adapter
            if isinstance(adapter.config, RegisterConfig)
            or None in (adapter.tower, here)
            or {adapter.tower, here} == {""}
            else _moved(adapter, str(here), base, Path(scratch, adapter.name))
            for adapter in saved
        ]
        known = (_without_biases_elsewhere(each, here, base, Path(scratch, f"{each.name}.known")) for each in placed)
        whole = (_with_biases(adapter, base, Path(scratch, f"{adapter.name}.biases")) for adapter in known)
        yield (_without_heads(adapter, base, Path(scratch, f"{adapter.name}.rest")) for adapter in whole)
    for adapter in saved:
        for name, digest in adapter.digests.items():
            file = adapter.path / name
            if not file.is_file() or checksum(file) != digest:
                raise AdapterFileError(
                    f"{file} was saved anew while {adapter.path.parent} was read, which would mix two saves. Load it "
                    "again. Nothing was changed."
                )


def _moved(adapter: SavedAdapter, here: str, base: nn.Module, place: Path) -> SavedAdapter:
    old, new = (f"{path}." if path else "" for path in (adapter.tower, here))
    start = _ROOT + old
    place_of = {key: _ROOT + new + key.removeprefix(start) if key.startswith(start) else key for key in adapter.keys}
    try:
        config = _on(adapter.config, old, new, base, place_of.values())
    except (re.error, TypeError):  # no names and no pattern: PEFT says so
        config = adapter.config
    if old == new:
        return replace(adapter, config=config)
    return _copied(replace(adapter, config=config), place_of, place)


def _copied(adapter: SavedAdapter, place_of: Mapping[str, str], place: Path) -> SavedAdapter:
    """The adapter in another folder, with the keys of its tensors changed, and those left out that have none."""
    read = read_tensors((adapter.copied_to or adapter.path) / WEIGHTS_NAME)
    tensors = {place_of[key]: value for key, value in read.items() if key in place_of}
    place.mkdir()
    save_file(tensors, place / WEIGHTS_NAME, metadata={"format": "pt"})
    adapter.config.save_pretrained(str(place))
    return replace(adapter, copied_to=place, keys=frozenset(tensors))


def _with_biases(adapter: SavedAdapter, base: nn.Module, place: Path) -> SavedAdapter:
    """The adapter with the biases that it trains outside of its own layers where these are in the base now.

    Another method's layer around a module moves the module's bias, and may come, or have come, before or after.
    """
    which = getattr(adapter.config, "bias", "none")
    if not isinstance(which, str) or which == "none":
        return adapter
    inner = {_ROOT + path: _inside(module) for path, module in named_as_in_state(base) if isinstance(module, _ADAPTED)}
    others = sorted(key for key in adapter.keys if not _BIAS.search(key))
    place_of: dict[str, str] = {}
    for key in adapter.keys:
        path, name = _BIAS.sub("", key), _BIAS.search(key)
        own = "".join(others[(start := bisect_left(others, f"{path}.")) : start + 1]).startswith(f"{path}.")
        if name is None or own:
            place_of[key] = key
        elif which == "all":  # others are the base's own, which PEFT saves beside the adapter's
            place_of[key] = path + inner.get(path, "") + ".bias"
    return adapter if place_of == {key: key for key in adapter.keys} else _copied(adapter, place_of, place)


def _without_biases_elsewhere(adapter: SavedAdapter, here: str | None, base: nn.Module, place: Path) -> SavedAdapter:
    """The adapter without biases of a head, a pooler or another tower that the base lacks, of which it warns.

    ``bias="all"`` trains those of the whole model.
    """
    if getattr(adapter.config, "bias", "none") != "all" or None in (adapter.tower, here):
        return adapter
    blocks = find_tower(base, here or None).part("blocks")
    within = next((f"{path}." for path, module in base.named_modules() if module is blocks), "")  # "": none is left out
    heads = getattr(adapter.config, "modules_to_save", None) or []  # have their own warning
    modules, start, lacking = dict(base.named_modules()), f"{here}." if here else "", dict[str, str]()
    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[adapter.config.peft_type]}"  # of the method's own tensors
    for key in sorted(key for key in adapter.keys if mark not in key):
        path = _BIAS.sub("", key.removeprefix(_ROOT))  # of the base, whatever was around it
        # timm leaves an nn.Identity of a head.
        gone = not path.startswith(within) if path not in modules else not modules[path].state_dict()
        if key.endswith(".bias") and gone and not any(is_of(key, name) for name in heads):
            lacking[key] = path.removeprefix(start) if start and path.startswith(start) else path.partition(".")[0]
    if lacking:
        warn_of_left_out(base, list(dict.fromkeys(lacking.values())), rest="layers")
    dropped = set(lacking)
    # The bias beside a head's trained copy, of a base with another number of classes.
    layout = read_header((adapter.copied_to or adapter.path) / WEIGHTS_NAME)
    for key in (key for key in adapter.keys if key.endswith(".original_module.bias")):
        module: Any = modules.get(_BIAS.sub("", key.removeprefix(_ROOT)))
        own = getattr(getattr(module, "original_module", module), "bias", None)
        if own is not None and tuple(own.shape) != layout[key].shape:
            dropped.add(key)
    return _copied(adapter, {key: key for key in adapter.keys - dropped}, place) if dropped else adapter


def _without_heads(adapter: SavedAdapter, base: nn.Module, place: Path) -> SavedAdapter:
    """The adapter without modules that it saves as a whole and that the base lacks, of which it warns.

    Registers and offsets do so themselves.
    """
    heads = getattr(adapter.config, "modules_to_save", None) or []
    lacking = [] if isinstance(adapter.config, KNOW_THEIR_BASE) else lacking_heads(base, heads)
    if not lacking:
        return adapter
    warn_of_left_out(base, lacking, rest="layers")
    config: Any = copy.copy(adapter.config)
    config.modules_to_save = [name for name in heads if name not in lacking] or None
    config.saved_id2label = None  # classes of what is left out
    kept = {key: key for key in adapter.keys if not any(is_of(key, name) for name in lacking)}
    return _copied(replace(adapter, config=config), kept, place)


def _inside(module: nn.Module) -> str:
    """Where the module is that a layer of PEFT's is around."""
    return next((f".{name}" for name in ("base_layer", "original_module") if hasattr(module, name)), "")


def _on(config: PeftConfig, old: str, new: str, base: nn.Module, keys: Iterable[str]) -> PeftConfig:
    """The config with the names of its targets as they are in ``base``: in the tower, and elsewhere if it was there."""
    placed = copy.deepcopy(config)
    filled: set[str] = set()
    for key in keys:
        parts = key.removeprefix(_ROOT).split(".")
        filled.update(".".join(parts[:end]) for end in range(1, len(parts)))
    inner = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, _ADAPTED))
    modules = {name: module for name, module in base.named_modules() if name and not name.startswith(inner)}
    own = [f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters(recurse=False)]
    for field, matching in _TARGETS.items():
        given = getattr(config, field, None)
        if not isinstance(given, str | list | set | tuple):
            continue
        matches = matching(config, given)
        names = own if field == "target_parameters" else [*modules]
        wanted = [
            name
            for name in names
            if (name.startswith(new) and matches(old + name.removeprefix(new)))
            or (not filled.isdisjoint((name, name.rpartition(".")[0])) and matches(name))
        ]
        if wanted and wanted != [name for name in names if matches(name)]:
            setattr(placed, field, wanted)
    for field in _BY_TARGET:
        given = getattr(config, field, None)
        if isinstance(given, dict) and old:
            setattr(placed, field, {_within(name, old, new): value for name, value in given.items()})
    return placed


def _within(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
