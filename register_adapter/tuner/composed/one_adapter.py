"""One adapter's config and tensors, of any PEFT method, checked as far as they can be without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from ...errors import AdapterFileError
from ...utils.adapter_file import MAX_HEADS, TensorInfo, check_finite, is_of, read_header, read_tensors
from ...utils.hub import CONFIG_NAME, WEIGHTS_NAME, check_folder, find_config, find_weights
from ..config import RegisterConfig
from ..reading import check_imports, naming, read_json

__all__ = ["SavedAdapter", "read_alone", "read_files"]

#: Fields of PEFT's configs that memory is taken for, and a size up to which it is little, whatever the tensors are.
_SIZES, _USUAL = re.compile(r"(^|_)(r|rank|ranknum|dim|size|len|tokens|frequency)($|_)"), 1024


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter of a folder.

    Attributes:
        name: Its name.
        path: Its subfolder.
        config: Its config.
        active: Whether it was active when it was saved.
        keys: Keys of its tensors.
        tower: Where the tower lay in the model that it was saved from, ``None`` if the manifest does not say.
        copied_to: Where its files are read from, if not from ``path``.
        digests: Checksums of its files as they were checked, by name; of an adapter without a manifest none.
    """

    name: str
    path: Path
    config: PeftConfig
    active: bool
    keys: frozenset[str]
    tower: str | None = None
    copied_to: Path | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


def read_alone(
    name: str | Path, adapter_name: str = "", subfolder: str | None = None, hub: Mapping[str, Any] | None = None
) -> SavedAdapter:
    """Check a folder, or a repository on the Hub, with one adapter of any method, before PEFT reads it.

    Args:
        name: Folder or repository.
        adapter_name: What the adapter is called in the model.
        subfolder: The folder in it, if any.
        hub: ``revision``, ``token``... as for ``hf_hub_download``.

    Raises:
        AdapterFileError: The config or the weights are missing, pickled, damaged, or do not belong together.
        HubAccessError: The repository cannot be read.
    """
    given = dict(hub or {})
    path, weights = find_config(str(name), subfolder, given), find_weights(str(name), subfolder, given)
    if weights is None:
        check_folder(name, subfolder)
        raise AdapterFileError(f"the adapter in {str(name)!r} has no weights: there is no {WEIGHTS_NAME}")
    config, keys = read_files(path, weights)
    return SavedAdapter(adapter_name, path.parent, config, True, keys)


def read_files(path: Path, weights: Path) -> tuple[PeftConfig, frozenset[str]]:
    """An adapter's config, and the keys of its tensors, as far as they can be checked without a model."""
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    values = read_json(path)
    method = values.get("peft_type")
    if not isinstance(method, str) or method not in kinds:
        raise AdapterFileError(
            f"{path} names the method {method!r:.100}; this peft knows {', '.join(sorted(kinds))}. Nothing was changed."
        )
    check_imports(values, path)
    with naming(path):
        config = kinds[method].from_pretrained(str(path.parent))
    if odd := [name for name, value in vars(config).items() if not _is_finite(value)]:
        raise AdapterFileError(
            f"{path} says {odd[0]}={getattr(config, odd[0])!r:.100}: not finite. Nothing was changed."
        )
    if not isinstance(config, RegisterConfig):
        _check_sizes(config, layout := read_header(weights), weights)
        _check_owned(config, layout, weights)  # before any value is read: there may be gigabytes
    tensors = read_tensors(weights)
    if not isinstance(config, RegisterConfig):
        check_finite(tensors, weights)
    return config, frozenset(tensors)


def _is_finite(value: Any) -> bool:
    """Whether no number in a config's field is infinite, or none."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_sizes(config: PeftConfig, layout: Mapping[str, TensorInfo], path: Path) -> None:
    """No size in a config is beyond those of the tensors beside it: PEFT makes room for it before it reads them."""
    largest = max([_USUAL, *(size for info in layout.values() for size in info.shape)])
    if "LORA" in config.peft_type.value:  # whose ranks are sizes of its tensors
        ranks = [size for key, info in layout.items() if ".lora_" in f".{key}" for size in info.shape]
        largest = max(ranks, default=largest)
    for name, value in vars(config).items():
        if config.peft_type.value == "LOKR" and name in ("r", "rank_pattern"):
            continue  # a rank beyond a factor's size means the whole factor
        # Which numbers are sizes differs from method to method; seeds and scales are none.
        given = value.values() if isinstance(value, dict) else [value]
        sizes = [size for size in given if isinstance(size, int) and not isinstance(size, bool)]
        if _SIZES.search(name) and (beyond := [size for size in sizes if size > largest]):
            raise AdapterFileError(
                f"{path.with_name(CONFIG_NAME)} says {name}={beyond[0]}, and no tensor in {path.name} is larger than "
                f"{largest}. Nothing was changed."
            )


def _check_owned(config: PeftConfig, keys: Iterable[str], path: Path) -> None:
    """Every tensor is of the method, of a saved head, or a bias that was trained: none may be the base's own.

    Tuned layer norms are called what the base's are; they are compared with those of the model, once they are there.
    """
    mark = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type].partition("_")[0] + "_"
    if mark == "ln_":
        return
    heads, bias = getattr(config, "modules_to_save", None) or [], getattr(config, "bias", "none")
    if len(heads) > MAX_HEADS:  # each is looked for in each key
        raise AdapterFileError(f"{path.with_name(CONFIG_NAME)} has {len(heads)} modules_to_save. Nothing was changed.")
    foreign = [
        key
        for key in keys
        if f".{mark}" not in f".{key}"
        and not any(is_of(key, head) for head in heads)
        and not (bias != "none" and key.endswith(".bias"))
    ]
    if foreign:
        raise AdapterFileError(
            f"{path} holds tensors that an adapter of the method {config.peft_type.value} does not have: "
            f"{sorted(foreign)[:10]}. They would replace the base's own. Nothing was changed."
        )
