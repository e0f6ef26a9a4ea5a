"""Registers beside other PEFT methods on one model: LoRA, IA3, VeRA, OFT, tuned layer norms.

PEFT keeps the adapters of one method in one tuner, and a ``PeftModel`` knows one tuner: a call that names an adapter of
another method then changes the wrong layers. :class:`ComposedPeftModel` sends every call to the layers of the method
that the named adapter belongs to.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from peft import PeftConfig, PeftModel
from peft.functional import cast_adapter_dtype
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...errors import AdapterFileError
from ...utils.arguments import check_mapping
from ..checks.head_weights import lacking_heads, warn_of_left_out
from ..checks.placing import beside_biases_of
from ..fields import check_known, check_string
from ..hooks.choice import EVERYONE
from ..reading import naming, told
from ..undo import unchanged_if_refused
from .by_image import adapters_by_image
from .class_names import expect_classes, fit_classes, note_classes
from .folder import fetch_folder, holds_several, read_folder
from .guards import check_heads, check_switched_on, flags_kept, heads_given, trained_beside, with_task_heads
from .methods import KNOW_THEIR_BASE
from .names import check_adapters, configs_of, innermost
from .one_adapter import read_alone
from .relocate import relocated
from .saving import INITS, SavesAll, write_adapters
from .tensors import check_filled, check_own, check_read
from .tuner import ComposedTuner

__all__ = ["ComposedPeftModel", "compose", "load_adapters", "load_onto", "save_adapters"]


def compose(model: nn.Module, configs: Mapping[str, PeftConfig], **options: Any) -> ComposedPeftModel:
    """Put adapters of several PEFT methods on one model; all are active and trainable, the base is frozen.

    Args:
        model: A base model, or one that carries adapters already: from :func:`add_registers`, ``get_peft_model`` or
            transformers' ``add_adapter``. It is changed in place; those adapters stay and take part.
        configs: Config by adapter name. With a ``task_type`` the head is trained too, as with ``get_peft_model``; where
            several have one, by the first.
        **options: ``autocast_adapter_dtype`` and ``low_cpu_mem_usage`` as in ``get_peft_model``.

    Raises:
        ValueError: A name is in use or not a plain name, a method cannot be composed, two adapters train the same
            module of ``modules_to_save``, or the model's adapters are switched off. The model is unchanged.

    Example:
        >>> model = compose(vit, {"registers": RegisterConfig(), "lora": LoraConfig(target_modules=["q_proj"])})
        >>> with model.disable_adapter("lora"):
        ...     model(pixel_values)  # registers alone
    """
    base = innermost(model)
    check_mapping("configs", configs, "of PEFT configs by the names of adapters")
    check_adapters(base, configs)
    check_switched_on(base)
    configs = with_task_heads(base, configs, together=True)
    with _all_or_nothing(model, configs.values()), trained_beside(configs.values()), heads_given():
        composed = ComposedPeftModel(model)
        everything = list(dict.fromkeys([*composed.active_adapters, *configs]))
        check_heads({**configs_of(base), **configs}, everything)
        for name, config in configs.items():
            composed.add_adapter(name, config, **options)
        composed.set_adapter(everything)
    return composed


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module, configs: Iterable[PeftConfig], loads: bool = False) -> Iterator[None]:
    """A context that takes off again what was put on a model, if not all of it could be."""
    # Some methods begin by changing the base's weights; and biases that an adapter trains are the base's own.
    configs = list(configs)
    changing = any(isinstance(getattr(config, field, None), str) for config in configs for field in INITS)
    biases = any(getattr(config, "bias", "none") not in (None, "none") for config in configs)
    with unchanged_if_refused(model, values=changing or (biases and loads)), beside_biases_of(innermost(model)):
        yield


def save_adapters(model: nn.Module, folder: str | Path, selected_adapters: Iterable[str] | None = None) -> None:
    """Save adapters of any PEFT methods into one folder, a subfolder each, with one manifest.

    Every subfolder is what PEFT itself writes, and can be loaded alone with ``PeftModel.from_pretrained``.
    Embedding layers that were resized or trained as a whole are not saved.

    Args:
        model: From :func:`compose`, :func:`add_registers`, ``get_peft_model`` or transformers' ``add_adapter``.
        folder: Made if it does not exist; an earlier save in it is replaced when the new one is whole.
        selected_adapters: Names of the adapters to save, default all.

    Raises:
        ValueError: The model has no adapters, or not the selected ones, or tuned layer norms are merged.
        OSError: The files could not be written.
    """
    if not configs_of(innermost(model)):
        raise ValueError(f"{type(innermost(model)).__name__} carries no adapter to save")
    composed = model if isinstance(model, ComposedPeftModel) else ComposedPeftModel(model)
    write_adapters(composed, folder, selected_adapters)


def load_adapters(
    model: nn.Module,
    folder: str | Path,
    is_trainable: bool = False,
    selected_adapters: Iterable[str] | None = None,
    ignore_base_mismatch: bool = False,
    **options: Any,
) -> ComposedPeftModel:
    """Put every adapter of a folder of :func:`save_adapters` on a base; those that were active are active again.

    Args:
        model: The base model, or one that carries other adapters already.
        folder: The folder, or a repository on the Hub.
        is_trainable: Whether the adapters get gradients; default frozen.
        selected_adapters: Names of the adapters to load, default all.
        ignore_base_mismatch: As in :class:`RegisterConfig`.
        **options: ``low_cpu_mem_usage``, ``torch_device``, ``autocast_adapter_dtype`` as in ``PeftModel.load_adapter``;
            ``subfolder``; ``revision``, ``token``, ``cache_dir``… for the Hub.

    Raises:
        HubAccessError: The repository on the Hub cannot be read.
        AdapterFileError: Something in the folder is missing or damaged, or its tensors do not fit the base.
        BaseModelMismatchError: The registers were made for another base.
        ValueError: A name is in use. In all cases the model is as before.
    """
    base = innermost(model)
    hub, options = ComposedPeftModel._split_kwargs(options)
    saved = read_folder(fetch_folder(folder, hub), selected_adapters)
    check_adapters(base, {adapter.name: adapter.config for adapter in saved})
    check_switched_on(base)
    # First those that know their base by the names and values of its own parameters.
    saved_first = sorted(saved, key=lambda adapter: not isinstance(adapter.config, KNOW_THEIR_BASE))
    changing = _all_or_nothing(model, [adapter.config for adapter in saved], loads=True)
    with changing, heads_given(), relocated(saved_first, base) as placed:
        composed = ComposedPeftModel(model)
        kept = composed.active_adapters
        for adapter in placed:
            if isinstance(adapter.config, KNOW_THEIR_BASE):
                adapter.config.ignore_base_mismatch = ignore_base_mismatch
            adapter.config.inference_mode = not is_trainable
            with naming(adapter.path):
                composed._put_on(
                    adapter.name,
                    adapter.config,
                    options.get("low_cpu_mem_usage", False),
                    options.get("autocast_adapter_dtype", True),
                    waits=not adapter.active,
                )
            check_own(composed, adapter.name, adapter.keys, adapter.path)
            try:
                place = str(adapter.copied_to or adapter.path)
                result = PeftModel.load_adapter(composed, place, adapter.name, is_trainable=is_trainable, **options)
            except (RuntimeError, KeyError) as error:
                raise AdapterFileError(
                    f"the tensors in {adapter.path} do not fit {type(base).__name__}: {told(error, joined=True)}"
                ) from error
            check_read(composed, adapter.name, result, adapter.path)
        active = list(dict.fromkeys([*kept, *(adapter.name for adapter in saved if adapter.active)]))
        with flags_kept(base):
            composed.base_model.activate(active, methods={adapter.config.peft_type for adapter in saved})
        if is_trainable:
            composed.set_requires_grad([adapter.name for adapter in saved if adapter.active])
            composed.set_requires_grad([adapter.name for adapter in saved if not adapter.active], False)
    return composed


def load_onto(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put on a base what a folder or a repository holds, one adapter of PEFT's or several of them; frozen.

    Raises:
        HubAccessError, AdapterFileError, BaseModelMismatchError, ValueError: As where each of them is loaded.
    """
    if holds_several(folder):
        return load_adapters(model, folder)
    alone = read_alone(folder)
    heads = getattr(alone.config, "modules_to_save", None) or ()
    with naming(alone.path), unchanged_if_refused(model):
        lacking = lacking_heads(model, heads)
        loaded = PeftModel.from_pretrained(model, str(folder))
        if not isinstance(alone.config, KNOW_THEIR_BASE):
            check_filled(loaded, alone.keys)
            if lacking:
                warn_of_left_out(model, lacking, rest="layers")
        return cast(nn.Module, loaded)


class ComposedPeftModel(SavesAll):
    """A :class:`peft.PeftModel` whose adapters may be of several methods; made by :func:`compose`.

    Args:
        model: A base model, or one that carries adapters.

    Raises:
        ValueError: The adapters that the model carries cannot be composed.
    """

    def __init__(self, model: nn.Module) -> None:
        # Not PeftModel's own, which builds the one tuner of its one method.
        nn.Module.__init__(self)
        base = innermost(model)
        check_adapters(base, {})
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._peft_config = None
        self._adapters_disabled = False
        self.base_model = ComposedTuner(base, [part for part in model.modules() if isinstance(part, BaseTuner)])
        note_classes(base, self.peft_config)
        if getattr(base, "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(base)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """PEFT's call for a model of LoRA alone.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "a model with adapters of several methods has no weighted sum of some: make it of the LoRA adapters alone "
            "(PeftModel.from_pretrained(base, ...), load_adapter, add_weighted_adapter, save_pretrained), and load the "
            "sum here. Registers have none: set_adapter([...]) has several take part."
        )

    @property
    def peft_type(self) -> Any:
        """The method of the first adapter, ``None`` without adapters."""
        return next((config.peft_type for config in self.peft_config.values()), None)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in the forward pass, method by method."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The first of them, or of all adapters if none is active; empty without adapters."""
        return next(iter([*self.active_adapters, *self.peft_config]), "")

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter takes part in the forward pass."""
        return bool(self.active_adapters)

    def get_base_model(self) -> nn.Module:
        """The base model, adapters on it."""
        return cast(nn.Module, self.base_model.model)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """As in PEFT, for an adapter of any method: the first of a method is active, further ones wait.

        Raises:
            ValueError: As :func:`compose`; the model is unchanged.
        """
        self._put_on(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _put_on(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool,
        autocast_adapter_dtype: bool,
        waits: bool = False,
    ) -> None:
        check_string(adapter_name)
        base = self.get_base_model()
        check_adapters(base, {adapter_name: peft_config})
        config = copy.deepcopy(with_task_heads(base, {adapter_name: peft_config})[adapter_name])
        expect_classes(config, adapter_name)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        with _all_or_nothing(self, [config]):
            self.base_model.add(adapter_name, config, low_cpu_mem_usage, waits)
            fit_classes(base, adapter_name)
            note_classes(base, self.peft_config)
            cast_adapter_dtype(base, adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones of *their* methods; other methods stay as they are.

        Args:
            adapter_name: One name or several; several of one method are active together, in this order.
            inference_mode: Freeze them.

        Raises:
            ValueError: An adapter is not there, or two of them train the same module of ``modules_to_save``.
        """
        self.base_model.activate(check_known(adapter_name, self.peft_config), inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter off; the last register adapter leaves no trace in the model.

        Raises:
            ValueError: It is not there.
        """
        check_known([adapter_name], self.peft_config)
        self.base_model.remove(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self, adapter_names: str | Iterable[str] | None = None) -> Iterator[None]:
        """Within the context the named adapters take no part; ``requires_grad`` is afterwards as it was before.

        Args:
            adapter_names: One name or several, default all: the outputs are the base's, but for trained biases.

        Raises:
            ValueError: An adapter is not there.
        """
        names = check_known(adapter_names, self.peft_config) if adapter_names else [EVERYONE]
        with self.base_model.without(names):
            yield

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return adapters_by_image(self, args, kwargs)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, **kwargs: Any) -> ComposedPeftModel:
        """Load every adapter of a folder; see :func:`load_adapters`."""
        return load_adapters(model, model_id, **kwargs)
