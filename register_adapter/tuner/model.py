"""The tuner: finds the vision tower, checks that it is the right one, and puts a :class:`RegisterLayer` on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterFileError, UnsupportedModelError
from ..towers.anatomy import Anatomy
from ..towers.identity import TowerIdentity, check_finite_base
from ..towers.tower import Tower, find_tower
from ..towers.untrusted import check_parts
from ..utils.adapter_file import UNITS_KEY, check_range, is_foreign
from ..utils.hub import WEIGHTS_NAME
from ._peft_compat import PREFIX, FromFile, activate_heads, remap_on_load
from .checks.dry_run import check_anatomy
from .checks.head_weights import check_file_tensors, warn_of_left_out, warn_of_new_weights, without_left_out
from .checks.loaded_over import loading_over
from .checks.placing import biases_tell, by_block, check_placement, check_task, check_units, checked_identity, heads_of
from .checks.saved_heads import lost_heads
from .config import RegisterConfig
from .fields import check_name
from .heads import check_adapter_name, fit_heads, labels_for, number_of_labels
from .hooks.base import ATTACHING
from .hooks.choice import check_batch
from .layer import BASE, RegisterLayer, attached_layers, register_layers
from .left_out import follow_contexts
from .reading import check_to_read, naming
from .registers import refuse_merging, refuse_summing
from .saved_keys import class_rows, keys_of_copies, place_of_key, saved_by_key, state_to_save
from .undo import take_off_unfinished, unchanged_if_refused, values_unchanged_if_refused

__all__ = ["RegisterModel"]

_HANDED_ON = ("_tower", "_labels", "_present", "_pending", "_target")


class RegisterModel(BaseTuner):
    """Adds register tokens to a frozen vision transformer.

    Every check is made before anything is changed: the model has one tower that registers can enter, the names in
    ``modules_to_save`` exist, and an adapter made for another base is refused.

    Args:
        model: The base model.
        peft_config: The config, or a dictionary of configs by adapter name.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leave the registers on the meta device until they are loaded.
        state_dict: Accepted for PEFT's sake; the tower is always found by the config.

    Raises:
        UnsupportedModelError: No tower for registers, or several and none chosen.
        BaseModelMismatchError: The config was saved with another base model.
        ValueError: The adapter's name is in use, or ``modules_to_save`` names no module.
    """

    prefix: str = PREFIX
    tuner_layer_cls = RegisterLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        with unchanged_if_refused(model):
            check_name(adapter_name)
        take_off_unfinished(register_layers(model), model, adapter_name)
        if any(adapter_name in layer.names for layer in register_layers(model)):
            raise ValueError(f"the model has register adapter {adapter_name!r} already; choose another adapter_name")
        known = getattr(model, "peft_config", {})
        names = set(known)
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except BaseException:
            # PEFT writes the name down beside the other adapters' before it injects.
            if adapter_name not in names:
                known.pop(adapter_name, None)
            raise
        remap_on_load(self, self._remap_adapter_state_dict_for_load)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the registers of ``adapter_name`` on the model's tower; see the class for what is raised."""
        given = self.peft_config[adapter_name]
        if not isinstance(given, RegisterConfig):
            raise TypeError(f"expected a RegisterConfig for adapter {adapter_name!r}, got {type(given).__name__}")
        folder, waived = naming(given.folder) if given.folder else nullcontext(), given.ignore_base_mismatch
        with ATTACHING, unchanged_if_refused(model) as before, folder:
            before.forget(adapter_name)
            if given.saved_weights is not None:
                before.lost[adapter_name] = partial(lost_heads, model, adapter_name, given.saved_weights)
            check_name(adapter_name)
            try:
                self._inject(model, adapter_name, given, *args, **kwargs)
                pending = self._pending
            finally:  # what one injection hands on to PEFT's steps says nothing of the next
                for name in _HANDED_ON:
                    self.__dict__.pop(name, None)
        # Loaders ask for inference, also with a config that a user has made and that is of no file.
        loads = pending or (given.inference_mode and not given.made_for_inference)
        before.compared, before.waived = pending, waived
        for layer in register_layers(model):
            layer.before = before if loads and adapter_name in layer.names else layer.before

    def _inject(self, model: nn.Module, adapter_name: str, given: RegisterConfig, *args: Any, **kwargs: Any) -> None:
        if given.folder is not None and given.saved_weights is None and given.inference_mode:
            # A config alone is one to train with; loaders ask for inference, and would look for the values next.
            raise AdapterFileError(
                f"the adapter in {given.folder} has no weights: there is no {WEIGHTS_NAME}. Save it again. "
                "Nothing was changed."
            )
        anatomy = given.anatomy if isinstance(given.anatomy, Anatomy) else None
        tower = find_tower(model, given.tower_name, anatomy)
        if given.untrusted_anatomy:
            check_parts(tower)
        self._check_tower(tower, given)
        present, biases = TowerIdentity.of(tower), biases_tell(model)
        check_finite_base(tower, present)
        identity = checked_identity(present, given, biases)
        if anatomy is not None:
            check_anatomy(tower, given)
        check_task(model, given)
        heads, lacking, layout = heads_of(model, tower, given, adapter_name)
        check_adapter_name(model, adapter_name, [*heads, *given.task_heads])
        labels = given.id2label if heads else None
        if not given.from_file:
            labels = labels_for(model, [*heads, *given.task_heads], given.labels_given)
            if given.init != "test_time":
                warn_of_new_weights(model, heads)
        own_classes = number_of_labels(model)
        rows = class_rows(model, layout or {}, own_classes)
        if rows is not None and rows != (len(labels) if labels else own_classes):
            labels = _unnamed(rows)
        self._pending = given.awaits_values
        config = given
        now = (identity.to_dict(), labels)
        if lacking or (given.attached and now != (given.base_tower, given.id2label)):
            # Otherwise the caller's own, as in PEFT; a copy where it would no longer say what it did.
            config = copy.copy(given)
            config.modules_to_save, config.left_out = heads or None, lacking
        if lacking:
            warn_of_left_out(model, lacking)
        config.base_tower, config.ignore_base_mismatch, config.attached = identity.to_dict(), False, True
        config.id2label = labels
        config.folder = config.saved_weights = config.weights_sha256 = None
        self.peft_config[adapter_name] = config
        self._tower, self._labels = tower, config.id2label
        self._present = present if biases else present.without_biases()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for layer in register_layers(model):  # PEFT has put copies of blocks in their place (modules_to_save)
            layer._renew_hooks()
            activate_heads(model, None, layer.active_names, given.inference_mode, not layer.disable_adapters)
        if layout is not None:
            fit_heads(model, adapter_name, state_dict=keys_of_copies(layout, adapter_name))
        elif given.from_file and config.id2label:
            fit_heads(model, adapter_name, (own_classes, len(config.id2label)))

    @staticmethod
    def _check_tower(tower: Tower, config: RegisterConfig) -> None:
        taken = getattr(tower.module, "registers", None)
        if taken is not None and not isinstance(taken, RegisterLayer):
            raise UnsupportedModelError(
                f"{type(tower.module).__name__} has an attribute 'registers' of its own ({type(taken).__name__}); "
                "the adapter needs that name"
            )
        if config.init == "cls" and tower.part("cls_token") is None:
            raise ValueError(f"init='cls' needs a CLS token and the family {tower.anatomy.family!r} has none")
        check_placement(tower, config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        embeddings = self._tower.part("embeddings")
        self._target = next(name for name, module in self.model.named_modules() if module is embeddings)
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return bool(key == self._target)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, RegisterConfig)
        layer = getattr(self._tower.module, "registers", None)
        if layer is None:
            layer = RegisterLayer(self._tower)
            layer.train(self._tower.module.training)
        layer.update_layer(adapter_name, peft_config, self._pending)
        layer.labels.bind(self.model)
        layer.bases[adapter_name] = self._present
        if self._labels:
            layer.labels[adapter_name] = self._labels
        layer.attach()
        if len(layer.names) == 1:
            follow_contexts(layer)
        for other in attached_layers(self.model):
            # Left behind by a tower that was replaced; PEFT has deleted what it found.
            if other is not layer and adapter_name in other.names and not other.is_in(self.model):
                other.delete_adapter(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to ``model(..., adapter_names=[...])``: one name an image, ``"__base__"`` for none."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = register_layers(self.model)
        check_batch(names, args, kwargs, self.training)
        known = [name for layer in layers for name in layer.names]
        if unknown := sorted({*names} - {*known, BASE}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has the register "
                f"adapters {known}"
            )
        with ExitStack() as stack:
            for layer in layers:
                own = [name if name in layer.names else BASE for name in names]
                stack.enter_context(layer.images_with(own))
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own pass, hooks of the base included (PEFT 0.18 calls ``model.forward``)."""
        return self.model(*args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Registers cannot be merged.

        Raises:
            NotImplementedError: Always.
        """
        refuse_merging()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """``NotImplementedError``: registers have no weighted sum."""
        refuse_summing()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = attached_layers(self.model)
        if merge and layers:
            refuse_merging()
        own = {name for layer in layers for name in layer.names}
        for name, module in list(self.model.named_modules()):
            # PEFT would leave the trained heads in the base.
            if isinstance(module, ModulesToSaveWrapper) and set(module.modules_to_save) <= own:
                path, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(path), child, module.original_module)
        for layer in layers:
            layer.detach()
        # Not PEFT's own, which takes every method's layers off, LoRA's too.
        known = getattr(self.model, "peft_config", None)
        if known is not None:
            del self.model.peft_config
            if others := {name: config for name, config in known.items() if name not in own}:
                self.model.peft_config = others
        base: nn.Module = self.model
        return base

    #: Asked before PEFT reads a folder's weights.
    before_read = staticmethod(check_to_read)
    #: What a PEFT asks that has no hook for the tensors of an adapter (0.18).
    state_to_save = staticmethod(state_to_save)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """One adapter's registers, from the state that the caller gave; ``ValueError`` for what no loader takes."""
        state_dict = state_to_save(model, adapter_name, state_dict)
        tensors: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return {key: value for key, value in tensors.items() if f".{PREFIX}tokens.{adapter_name}." in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check the tensors, and find the registers' key wherever the tower lies in this model."""
        assert isinstance(config, RegisterConfig)
        state_dict = without_left_out(model, config.left_out, config.task_heads, state_dict)
        check_file_tensors(config, adapter_name, state_dict)
        tower = next(layer.tower for layer in register_layers(model) if adapter_name in layer.names)
        dtype = next(tower.module.parameters()).dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            check_range(state_dict, dtype, f"adapter {adapter_name!r}")
        units = next((value for key, value in state_dict.items() if key.endswith(UNITS_KEY)), None)
        if units is not None and not units.is_meta:
            check_units(tower, by_block(config, units.tolist()), f"adapter {adapter_name!r}")
        number = fit_heads(model, adapter_name, state_dict=state_dict)
        if number is not None:
            layer = next(layer for layer in register_layers(model) if adapter_name in layer.names)
            config.id2label = _unnamed(number)
            layer.labels[adapter_name] = config.id2label
            layer.show_labels()
        for layer in register_layers(model):
            layer.before = None
        kept = {key: value for key, value in state_dict.items() if not is_foreign(key)}
        return {place_of_key(model, adapter_name, key): value for key, value in kept.items()}

    @classmethod
    @contextmanager
    def loading(
        cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str
    ) -> Iterator[dict[str, torch.Tensor]]:
        """A context in which an adapter's values are put in; the base is as it was if that is refused.

        Yields:
            The tensors by the keys that PEFT looks for in this model.
        """
        states = [layer.before for layer in register_layers(model) if adapter_name in layer.names]
        file = naming(state_dict.source[0], others=False) if isinstance(state_dict, FromFile) else nullcontext()
        kept = values_unchanged_if_refused(model, adapter_name, states)
        config = cast(Any, model).peft_config[adapter_name]
        with file, kept, loading_over(model, adapter_name, state_dict) as lacking:
            known = saved_by_key(model, adapter_name, state_dict)
            rest = {key: value for key, value in state_dict.items() if key not in known}
            rest = without_left_out(model, [*config.left_out, *lacking], config.task_heads, rest)
            # Here, since PEFT 0.18 puts what is none of the adapter's into the base before anybody is asked.
            check_file_tensors(config, adapter_name, {key: state_dict[key] for key in known} | rest)
            yield {known[key]: state_dict[key] for key in known} | rest


def _unnamed(number: int) -> dict[int, str]:
    """As transformers calls classes that have no names."""
    return {index: f"LABEL_{index}" for index in range(number)}
