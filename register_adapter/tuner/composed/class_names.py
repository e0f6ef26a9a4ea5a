"""Classes of heads that adapters of PEFT's own methods save as a whole: their configs have no field for them.

They stand in the manifest, as ``id2label`` of an adapter, and while it is loaded as an attribute of its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config import RegisterConfig
from ..heads import HeadLabels, checked_labels, fit_heads, labels_for, number_of_labels
from ..reading import naming

__all__ = ["classes_of", "fit_classes", "note_classes", "read_classes", "show_classes"]

#: Attribute of a base whose config shows the classes of a head: with the base's own, for copies of the model too.
_LABELS = "_register_adapter_classes"


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
            if not isinstance(given, dict):
                raise TypeError(f"id2label must be a dictionary, got {given!r:.100}")
            cast(Any, config).saved_id2label = checked_labels(given)


def note_classes(base: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """Before a save: the classes of a head that is at work are those that the model's config names."""
    show_classes(base)
    for name, config in configs.items():
        heads = getattr(config, "modules_to_save", None)
        if heads and not isinstance(config, RegisterConfig) and classes_of(config) is None and name in _at_work(base):
            cast(Any, config).id2label = labels_for(base, heads, None)


def fit_classes(base: nn.Module, name: str) -> None:
    """Give the head of an adapter, whose values are loaded next, its number of classes, and the config their names."""
    config = cast(Any, base).peft_config[name]
    classes = vars(config).pop("saved_id2label", None)
    if classes is not None:
        fit_heads(base, name, (number_of_labels(base), len(classes)))
        config.id2label = classes


def show_classes(base: nn.Module) -> None:
    """Have the model's config name the classes of the head that is at work, or the base's own again."""
    labels: HeadLabels | None = vars(base).get(_LABELS)
    configs = getattr(base, "peft_config", {})
    if labels is not None:
        labels.renew()
    name = next((name for name in _at_work(base) if classes_of(configs.get(name)) is not None), None)
    if name is not None:
        if labels is None:
            labels = HeadLabels()
            labels.bind(base)
            setattr(base, _LABELS, labels)
        labels[name] = cast("dict[int, str]", classes_of(configs[name]))
    if labels is not None:
        labels.show(name)
        if name is None:
            delattr(base, _LABELS)


def _at_work(base: nn.Module) -> list[str]:
    """Names of the adapters whose heads are active."""
    heads = [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [name for head in heads if not head.disable_adapters for name in head.active_adapters]
