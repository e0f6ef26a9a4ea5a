"""Values that are loaded over those of an adapter: the classes of its head come with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from ...errors import RegisterAdapterError
from ...utils.hub import find_config
from .._peft_compat import FromFile
from ..heads import checked_labels, labels_for
from ..layer import RegisterLayer, register_layers
from ..reading import naming, read_json

__all__ = ["classes_loaded_over"]


@contextmanager
def classes_loaded_over(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any]) -> Iterator[None]:
    """A context in which an adapter gets its values; one that had some gets the classes that are beside the new ones.

    A new adapter has those of its config, which the caller may have given.

    Args:
        model: The model with the adapter.
        adapter_name: Its name.
        tensors: What is loaded.

    Raises:
        AdapterFileError: The config beside the tensors names no classes in its ``id2label``; before anything is loaded.
    """
    layers = [layer for layer in register_layers(model) if adapter_name in layer.names]
    over = isinstance(tensors, FromFile) and all(layer.before is None for layer in layers)
    labels = _beside(cast(FromFile, tensors)) if over else None
    yield
    if labels is not None:
        _name(model, adapter_name, labels, layers)


def _beside(tensors: FromFile) -> dict[int, str] | None:
    name, options = tensors.source
    hub = {key: value for key, value in PeftConfig._split_kwargs(options)[0].items() if value is not None}
    try:
        path = find_config(name, hub.pop("subfolder", None), hub)
    except RegisterAdapterError:  # weights alone
        return None
    given = read_json(path).get("id2label")
    with naming(path):
        return None if given in (None, {}) else checked_labels(given)


def _name(model: Any, adapter_name: str, labels: dict[int, str], layers: list[RegisterLayer]) -> None:
    config = model.peft_config[adapter_name]
    with suppress(ValueError):  # names of another number than the head has outputs are none of its classes
        fitting = labels_for(model, config.modules_to_save or [], labels, adapter_name)
        for layer in layers:
            layer.labels.renew()
            layer.labels[adapter_name] = fitting or labels
            layer.show_labels()
        config.id2label = fitting
