"""Classes of heads that adapters of PEFT's own methods save as a whole: their configs have no field for them.

They stand in the manifest, as ``id2label`` of an adapter, and while it is loaded as an attribute of its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...utils.files import checksum
from ...utils.hub import MANIFEST_NAME, WEIGHTS_NAME
from ..config import RegisterConfig
from ..heads import HeadLabels, checked_labels, fit_heads, labels_for, number_of_labels
from ..reading import naming, read_json

__all__ = [
    "classes_in_folder",
    "classes_of",
    "expect_classes",
    "fit_classes",
    "given_classes",
    "note_classes",
    "read_classes",
    "rename_classes",
    "show_classes",
]

#: Attribute of a base model, while one of its adapters has classes: those that its config shows. Copies have their own.
_LABELS = "_register_adapter_classes"
#: By name of an adapter that the call in progress puts on: the classes beside its file.
_AWAITED: ContextVar[Mapping[str, dict[int, str] | None] | None] = ContextVar("_AWAITED", default=None)


def classes_of(config: PeftConfig | None) -> dict[int, str] | None:
    """The classes of an adapter's head; ``None`` of registers, whose config has them, and where none are known."""
    known = config is not None and not isinstance(config, RegisterConfig)
    return cast("dict[int, str] | None", vars(config).get("id2label")) if known else None


def read_classes(config: PeftConfig, entry: Mapping[str, Any], path: Path) -> None:
    """Take the classes of an adapter from its entry in a manifest.

    Raises:
        AdapterFileError: They are none.
    """
    given = entry.get("id2label")
    if given is not None and not isinstance(config, RegisterConfig):
        with naming(path):
            cast(Any, config).saved_id2label = checked_labels(given)


def note_classes(base: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """A head of which nobody knows the classes, at work or not, has those that the model's config names for its own.

    Names that somebody gives to them while it is at work are its own from then on.

    Args:
        base: The base model.
        configs: By adapter name.
    """
    show_classes(base)
    for name, config in configs.items():
        heads = getattr(config, "modules_to_save", None)
        if heads and not isinstance(config, RegisterConfig) and classes_of(config) is None:
            cast(Any, config).id2label = labels_for(base, heads, None, name)
    show_classes(base)


def classes_in_folder(folder: str | Path) -> dict[int, str] | None:
    """The classes of an adapter in its folder: what a manifest in the folder around it says.

    Raises:
        AdapterFileError: They are none.
    """
    path, config = Path(folder).absolute(), PeftConfig()
    manifest, weights = path.parent / MANIFEST_NAME, path / WEIGHTS_NAME
    entries = read_json(manifest).get("adapters") if manifest.is_file() and weights.is_file() else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("name") == path.name and entry.get("sha256") == checksum(weights):
            read_classes(config, entry, manifest)
    return cast("dict[int, str] | None", vars(config).get("saved_id2label"))


@contextmanager
def given_classes(base: nn.Module, classes: Mapping[str, dict[int, str] | None]) -> Iterator[None]:
    """A context in which adapters of a model get values; their heads are for these classes from then on.

    Args:
        base: The base model.
        classes: By adapter name; ``None`` where a file does not say.
    """
    configs: dict[str, Any] = cast(Any, base).peft_config
    show_classes(base)  # names that somebody has given are those of the values until now
    before = {name: classes_of(configs.get(name)) for name in classes}
    for name, labels in classes.items():
        if labels is not None and name in configs and not isinstance(configs[name], RegisterConfig):
            configs[name].saved_id2label = labels
            fit_classes(base, name)
    awaited = _AWAITED.set({name: labels for name, labels in classes.items() if name not in configs})
    try:
        yield
    except BaseException:
        for name, labels in before.items():
            if name in configs and not isinstance(configs[name], RegisterConfig):
                configs[name].id2label = labels
        raise
    finally:
        _AWAITED.reset(awaited)
    show_classes(base)


def expect_classes(config: PeftConfig, name: str) -> None:
    """Give the config of a new adapter the classes beside its file, if it is loaded in :func:`given_classes`."""
    labels = (_AWAITED.get() or {}).get(name)
    if labels is not None and not isinstance(config, RegisterConfig):
        cast(Any, config).saved_id2label = labels


def fit_classes(base: nn.Module, name: str) -> None:
    """Give the head of an adapter, whose values are loaded next, its number of classes, and the config their names."""
    config = cast(Any, base).peft_config[name]
    classes = vars(config).pop("saved_id2label", None)
    if classes is not None:
        heads = [head for head in base.modules() if isinstance(head, ModulesToSaveWrapper)]
        sizes = {head.original_module.out_features for head in heads if isinstance(head.original_module, nn.Linear)}
        # Names that somebody has given to another head may stand in the config, and are as many as that one has.
        own = next(iter(sizes)) if len(sizes) == 1 else number_of_labels(base)
        fit_heads(base, name, (own, len(classes)))
        config.id2label = classes


def show_classes(base: nn.Module, merged: Iterable[str] = ()) -> None:
    """Have the model's config name the classes of the head that is at work, or the base's own again.

    Args:
        base: The base model.
        merged: Names of adapters that are part of it from now on, their heads too.
    """
    labels, configs = _labels(base), getattr(base, "peft_config", {})
    if labels is not None:
        labels.leave(merged)
        labels.renew()
    name = next((name for name in _at_work(base) if classes_of(configs.get(name)) is not None), None)
    if name is not None:
        if labels is None:
            labels = vars(base)[_LABELS] = HeadLabels()
            labels.bind(base)
        labels[name] = cast("dict[int, str]", classes_of(configs[name]))
    if labels is not None:
        labels.show(name)
        if not any(classes_of(config) for config in configs.values()):
            del vars(base)[_LABELS]


def rename_classes(base: nn.Module, old: str, new: str) -> None:
    """An adapter gets another name."""
    labels = _labels(base)
    if labels is not None:
        labels.rename(old, new)


def _labels(base: nn.Module) -> HeadLabels | None:
    return vars(base).get(_LABELS)


def _at_work(base: nn.Module) -> list[str]:
    """Names of the adapters whose heads are active."""
    heads = [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [name for head in heads if not head.disable_adapters for name in head.active_adapters]
