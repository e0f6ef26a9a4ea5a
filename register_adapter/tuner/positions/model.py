"""The tuner that puts offsets on a tower's position embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import AdapterFileError, UnsupportedModelError
from ...towers.anatomy import parent
from ...towers.identity import TowerIdentity, brings_biases, check_finite_base, identity_now, trains_biases
from ...towers.tower import Tower, find_tower
from ...utils.adapter_file import check_range, check_savable_modules, check_tensors, is_of
from ...utils.module_names import check_copies_load
from .._peft_compat import POSITIONS, REMAPS, FromFile, activate_heads, remap_on_load, renew_on_save
from ..checks.head_weights import lacking_heads, warn_of_left_out, without_left_out
from ..checks.loaded_over import check_same_base, read_beside
from ..checks.placing import biases_tell, check_named, check_task, checked_identity
from ..checks.saved_heads import check_saved_heads, lost_heads
from ..fields import check_name
from ..heads import check_adapter_name, modules_called, number_of_labels
from ..layer import RegisterLayer
from ..reading import naming
from ..saved_keys import copied_modules
from ..undo import unchanged_if_refused, values_unchanged_if_refused
from .config import OFFSETS_KEY, PositionConfig
from .following import Walked, find_again, follow, position_layers, take_off
from .layer import CHILD, PositionLayer

__all__ = ["PositionModel", "place_of_positions"]


class PositionModel(Walked, BaseTuner):
    """Adds trained offsets to the learned position embeddings of a frozen vision transformer.

    Args:
        model: The base model.
        peft_config: The config, or a dictionary of configs by adapter name.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leave the offsets on the meta device until they are loaded.

    Raises:
        UnsupportedModelError: No vision tower, several and none chosen, or one without learned position embeddings.
        ValueError: The ``task_type`` is to generate text, and the model does not.
        BaseModelMismatchError: The config was saved with another base model.
    """

    prefix: str = f"{POSITIONS}_"
    tuner_layer_cls = PositionLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        remap_on_load(self, self._remap_adapter_state_dict_for_load, self.prefix)
        renew_on_save(self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the offsets of ``adapter_name`` on the model's tower; see the class for what is raised."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, PositionConfig):
            raise TypeError(f"expected a PositionConfig for adapter {adapter_name!r}, got {type(config).__name__}")
        folder = naming(config.saved_weights.path.parent) if config.saved_weights else nullcontext()
        position_layers(model)  # where a replaced module has them
        with unchanged_if_refused(model) as before, folder:
            before.forget(adapter_name)
            check_name(adapter_name)
            check_task(model, config)
            tower = find_tower(model, config.tower_name)
            if not config.from_file:
                named = config.modules_to_save or []
                check_named(model, tower, [name for name in named if name not in config.task_heads])
                check_copies_load(model, named, by_end=False)
                check_savable_modules(dict(copied_modules(model, named)))
            check_adapter_name(model, adapter_name, config.modules_to_save or ())
            if config.from_file:
                _leave_out_heads(model, config)
            place = place_of_positions(tower)
            present, biases = TowerIdentity.of(tower), biases_tell(model)
            check_finite_base(tower, present)
            identity = checked_identity(present, config, biases)
            _check_file(model, tower, place, config)
            config.base_tower, config.ignore_base_mismatch = identity.to_dict(), False
            config.attached_to = present if biases else present.without_biases()
            saved, config.saved_weights = config.saved_weights, None
            if saved is not None:
                before.lost[adapter_name] = partial(lost_heads, model, adapter_name, saved)
            self._place = place
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                del self._place
        for layer in position_layers(model):
            names = list(cast(Any, layer).active_adapters)
            activate_heads(model, None, names, config.inference_mode, not layer.disable_adapters)
            if saved is not None and adapter_name in layer.offset_positions_values:
                layer.before = before
                cast(Any, layer.offset_positions_values[adapter_name]).awaited = config.moves

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # PEFT wants a module with a name, and the owner may be the model itself: any one will do.
        self._target = next(name for name, _ in self.model.named_modules() if name)
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
        owner, name = self._place
        layer = owner._modules.get(CHILD)
        if not isinstance(layer, PositionLayer):
            layer = PositionLayer(owner, name)
            layer.train(owner.training)
            layer.attach()
            follow(self.model, layer)
        layer.update_layer(adapter_name, bool(peft_config.inference_mode))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("position embeddings are read once for a whole batch: leave adapter_names out")
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        options = {name: kwargs[name] for name in ("safe_merge", "adapter_names") if name in kwargs}
        for layer in position_layers(self.model) if merge else ():
            layer.merge(**options)
        take_off(self.model)
        base: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        return base

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        if not getattr(model, "renews_bases", False):  # it has done so; here the other adapters are out of its sight
            renew_base(vars(model).get("viewed", model), config)
        tensors = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        # PEFT takes those of every tuner's layers, such as a LoRA's that the offsets were put on.
        return {key: value for key, value in tensors.items() if f".{cls.prefix}values." in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> Any:
        """The offsets go where the tower is in this model."""
        end = f"{CHILD}.{cls.prefix}values.weight"
        own = f"{CHILD}.{cls.prefix}values.{adapter_name}.weight"
        here = next((name for name, _ in model.named_parameters() if name.endswith(own)), None)
        moved = {
            here.removesuffix(own) + end if here is not None and key.endswith(end) else key: value
            for key, value in state_dict.items()
        }
        if not REMAPS:  # PEFT 0.18 has the names in the keys by now
            return {f"{key.removesuffix(end)}{own}" if key.endswith(end) else key: moved[key] for key in moved}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, moved)

    @classmethod
    @contextmanager
    def loading(
        cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str
    ) -> Iterator[dict[str, torch.Tensor]]:
        """A context in which an adapter's values are put in; the model is as it was if that is refused.

        Yields:
            The tensors, without those of heads that the model lacks.
        """
        layers = [layer for layer in position_layers(model) if adapter_name in layer.offset_positions_values]
        config: Any = cast(Any, model).peft_config[adapter_name]
        over = isinstance(state_dict, FromFile) and all(layer.before is None for layer in layers)
        file = naming(state_dict.source[0], others=False) if isinstance(state_dict, FromFile) else nullcontext()
        with file, values_unchanged_if_refused(model, adapter_name, [layer.before for layer in layers]):
            saved: Any = read_beside(PositionConfig, state_dict) if over else None
            if saved is not None:
                renew_base(model, config)
                check_same_base(find_tower(model, config.tower_name), config, saved, biases_tell(model))
            lacking = lacking_heads(model, saved.modules_to_save or ()) if saved is not None else []
            if lacking:
                warn_of_left_out(model, lacking, rest="position embeddings")
            state_dict = without_left_out(model, [*config.left_out, *lacking], (), state_dict)
            shapes = {OFFSETS_KEY: tuple(layers[0].base.shape)} if layers else {}
            present = [name for name in config.modules_to_save or [] if modules_called(model, name)]
            check_tensors(state_dict, shapes, config.modules_to_save, f"adapter {adapter_name!r}", present)
            for dtype in {layer.base.dtype for layer in layers}:
                check_range(state_dict, dtype, f"adapter {adapter_name!r}")
            yield dict(state_dict)
        for layer in layers:
            layer.before = None

    @classmethod
    def before_save(cls, model: nn.Module) -> None:
        """Offsets whose module was replaced are in the model's state again."""
        position_layers(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT, also of offsets whose module was replaced."""
        position_layers(self.model)
        super().delete_adapter(adapter_name)

    def enable_adapter_layers(self) -> None:
        """The same."""
        find_again(self.model)
        super().enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """The same."""
        find_again(self.model)
        super().disable_adapter_layers()

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """The same."""
        position_layers(self.model)
        super().set_adapter(adapter_name, *args, **kwargs)

    def renew_bases(self) -> None:
        """Write down the base as it is now; of PEFT 0.18, which saves without asking the tuner."""
        for config in self.peft_config.values():
            renew_base(self.model, config)


def renew_base(model: nn.Module, config: PeftConfig) -> None:
    """Have a config name the base as it is now, if its weights were loaded after the offsets were attached."""
    if isinstance(config, PositionConfig) and config.identity is not None:
        position_layers(model)  # where a replaced module has them
        tower = find_tower(model, config.tower_name)
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        others = any(not isinstance(layer, PositionLayer | RegisterLayer) for layer in layers)
        trained = brings_biases(model) or trains_biases(tower)
        now = identity_now(tower, config.attached_to or config.identity, biases=not (others and trained))
        if now is not None:
            config.base_tower, config.attached_to = now.to_dict(), now


def _leave_out_heads(model: nn.Module, config: PositionConfig) -> None:
    """Have a saved config do without modules that the model lacks; PEFT counts on those that a task has added."""
    heads = config.modules_to_save or []
    config.left_out = lacking_heads(model, heads)
    config.modules_to_save = [
        name for name in heads if name not in config.left_out or name in config.task_heads
    ] or None
    layout = config.saved_weights.layout if config.saved_weights is not None else ()
    if gone := [name for name in config.left_out if any(is_of(key, name) for key in layout)]:
        warn_of_left_out(model, gone, rest="position embeddings")


def _check_file(model: nn.Module, tower: Tower, place: tuple[nn.Module, str], config: PositionConfig) -> None:
    """What is in an adapter's file fits the model.

    Raises:
        AdapterFileError: It does not.
    """
    saved = config.saved_weights
    if saved is None:
        return
    owner, name = place
    present = [name for name in config.modules_to_save or [] if modules_called(model, name)]
    layout = check_saved_heads(model, tower, present, saved)
    copied = copied_modules(model, present)
    values = {f"{path}.{key}": value for path, module in copied for key, value in module.state_dict().items()}
    # A composed model's folder tells the classes of a head, which is fitted to their number.
    new = {number_of_labels(model): len(vars(config).get("saved_id2label") or ())}
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    shapes = {key: (new.get(own[0]) or own[0], *own[1:]) if own else own for key, own in shapes.items()}
    pairs = [(key, info.shape, shapes[key]) for key, info in layout.items()]
    offsets = next(key for key in saved.layout if key.endswith(OFFSETS_KEY))
    pairs.append((offsets, saved.layout[offsets].shape, tuple(cast(nn.Parameter, owner._parameters[name]).shape)))
    wrong = [f"{key} has shape {given}, the model's has {own}" for key, given, own in pairs if given != own]
    if wrong:
        raise AdapterFileError(
            f"{saved.path} does not fit {type(model).__name__}: {'; '.join(wrong[:10])}. Nothing was changed."
        )


def place_of_positions(tower: Tower) -> tuple[nn.Module, str]:
    """Owner and name of the parameter with a tower's position embeddings, as the table of families says.

    Raises:
        UnsupportedModelError: The tower has none that can be trained.
    """
    who = f"{type(tower.module).__name__} (family {tower.anatomy.family!r})"
    paths = tower.anatomy.position_embedding
    try:
        owner, name = parent(tower.module, paths or ())
    except AttributeError:
        owner, name = tower.module, ""
    values = getattr(owner, name, None) if name else None
    if values is None:
        raise UnsupportedModelError(
            f"{who} has no learned position embeddings that could move: its positions are rotary, relative, or none. "
            "Leave positions out of what is trained."
        )
    if isinstance(values, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UnsupportedModelError(
            f"the position embeddings of {who} are wrapped by another adapter ({type(values).__name__}); they can be "
            "trained in one way at a time"
        )
    if isinstance(values, nn.Embedding):
        owner, name = values, "weight"
    weight = owner._parameters.get(name)
    if weight is None or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"the position embeddings of {who} are fixed or quantised, no parameter that offsets can be added to. "
            "Leave positions out of what is trained."
        )
    return owner, name
