"""The tuner of a model that carries adapters of several PEFT methods: each call reaches the layers of one method."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._peft_compat import remap_on_load
from ..config import RegisterConfig
from ..fields import check_known
from ..layer import RegisterLayer, attached_layers
from ..model import RegisterModel
from ..positions import PositionLayer, Walked, position_layers, take_off
from ..registers import refuse_merging
from . import guards
from .aside import Aside
from .guards import check_heads, check_layers, check_merges, fit_copies, flags_kept, hooks_lifted, train_biases

__all__ = ["ComposedTuner"]


class ComposedTuner(Walked, BaseTuner):
    """The adapters of all methods on one model; one tuner of PEFT's for each method is kept for what only it can do.

    Args:
        model: The base model; its ``peft_config`` holds every adapter's config by name.
        tuners: Tuners that have put adapters on it.
    """

    model: Any
    prefix = ""
    tuner_layer_cls = BaseTunerLayer
    #: In a view of a model, the configs that are to be seen.
    shown: dict[str, PeftConfig] | None = None

    def __init__(self, model: nn.Module, tuners: Iterable[BaseTuner] = ()) -> None:
        nn.Module.__init__(self)  # not BaseTuner's own, which injects an adapter
        self.model = model
        if not hasattr(model, "peft_config"):
            self.model.peft_config = {}
        # In a dictionary, which is not a submodule: each of them holds the model too.
        self._tuners: dict[Any, BaseTuner] = {}
        self._aside = Aside.of(model)
        remap_on_load(self, RegisterModel._remap_adapter_state_dict_for_load)
        for tuner in tuners:
            for member in tuner._tuners.values() if isinstance(tuner, ComposedTuner) else [tuner]:
                self._keep(member)

    def _keep(self, tuner: BaseTuner) -> None:
        kinds = PEFT_TYPE_TO_TUNER_MAPPING.items()
        method = next((method for method, kind in kinds if type(tuner) is kind and self._of(method)), None)
        if method is not None:
            self._tuners[method] = tuner
            # What a method shares between its layers (VeRA's projections) is saved from here.
            for name, child in tuner.named_children():
                if name != "model":
                    self.add_module(name, child)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Config by adapter name, of all methods."""
        return cast("dict[str, PeftConfig]", self.model.peft_config if self.shown is None else self.shown)

    @property
    def shared(self) -> list[str]:
        """Names of the modules here that one method's layers share."""
        return [name for name, _ in self.named_children() if name != "model"]

    def _of(self, method: Any) -> list[str]:
        return [name for name, config in self.peft_config.items() if config.peft_type == method]

    def _layers(self, method: Any) -> list[BaseTunerLayer]:
        kind = PEFT_TYPE_TO_TUNER_MAPPING[method].tuner_layer_cls
        among = position_layers(self.model) if kind is PositionLayer else self.model.modules()
        return [module for module in among if isinstance(module, kind)]

    @property
    def _heads(self) -> list[AuxiliaryTrainingWrapper]:
        return [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, method by method, in the order of activation."""
        names: dict[str, None] = {}
        for method in dict.fromkeys(config.peft_type for config in self.peft_config.values()):
            mine = self._of(method)
            for layer in self._layers(method):
                names.update(dict.fromkeys(name for name in layer.active_adapters if name in mine))
        return list(names)

    active_adapter = active_adapters

    def tuner_of(self, names: Iterable[str]) -> BaseTuner:
        """The tuner of the method that all of ``names`` belong to.

        Raises:
            ValueError: They are of several methods, or of one that was attached without a tuner.
        """
        methods = {self.peft_config[name].peft_type for name in names}
        tuner = self._tuners.get(next(iter(methods)))
        if len(methods) != 1 or tuner is None or not hasattr(tuner, "_enable_peft_forward_hooks"):
            method_names = sorted(method.value for method in methods)
            raise ValueError(
                f"adapter_names in one batch must be of one method that supports it, these are of {method_names}; "
                "run the batch once per method's adapters, with set_adapter"
            )
        return tuner

    @contextlib.contextmanager
    def showing(self, names: Iterable[str]) -> Iterator[dict[str, PeftConfig]]:
        """Within the context PEFT sees no other adapters than these: it compares fields that other methods lack."""
        everything = self.peft_config
        shown = {name: everything[name] for name in names}
        del self.model.peft_config
        if shown:
            self.model.peft_config = shown
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                yield dict(shown)
        finally:
            self.model.peft_config = everything

    def add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool = False, waits: bool = False) -> None:
        """Put an adapter on the model; the first of its method is active unless it waits, a further one waits, frozen.

        Whoever calls it puts the model back if it raises.
        """
        with self._aside.lifted():
            self._add(name, config, low_cpu_mem_usage, waits)

    def _add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool, waits: bool) -> None:
        method = config.peft_type
        rivals, active = self._of(method), self.active_adapters
        first = not rivals and not waits
        if first:
            check_heads({**self.peft_config, name: config}, [*active, name])
        fit_copies(self.model, name, config)
        # The first adapter freezes the base; a later one changes nobody's requires_grad.
        kept = flags_kept(self.model) if self.peft_config else contextlib.nullcontext()
        with kept, hooks_lifted(self.model):
            with self.showing(rivals) as mine:
                if rivals and method in self._tuners:
                    tuner = self._tuners[method]
                    tuner.peft_config = {**mine, name: config}
                    # PEFT goes by these; the tuner's own are from when it was made, and may be gone or renamed.
                    tuner.active_adapter = [other for other in active if other in mine] or rivals[:1]
                    tuner.inject_adapter(self.model, name, low_cpu_mem_usage=low_cpu_mem_usage)
                else:
                    kind = PEFT_TYPE_TO_TUNER_MAPPING[method]
                    tuner = kind(self.model, {name: config}, name, low_cpu_mem_usage=low_cpu_mem_usage)
                config = tuner.peft_config[name]  # a tuner without configs of its own has those that are shown
            check_layers(self.model, name)
            self.peft_config[name] = config
            self._keep(tuner)
        train_biases(self.model, name, config, alone=len(self.peft_config) == 1)
        self._set_active(
            [*active, *([name] if first else [])], {method}, inference_mode=config.inference_mode, keep=bool(rivals)
        )

    def activate(self, names: list[str], inference_mode: bool = False, methods: Iterable[Any] = ()) -> None:
        """Make ``names`` the active adapters of their methods, and of ``methods``; others stay as they are.

        Raises:
            ValueError: Two active adapters would share a module of ``modules_to_save``.
        """
        named = {*methods, *(self.peft_config[name].peft_type for name in names)}
        with self._aside.lifted():
            active = [name for name in self.active_adapters if self.peft_config[name].peft_type not in named] + names
            check_heads(self.peft_config, active)
            self._set_active(active, named, inference_mode)

    def _set_active(self, active: list[str], methods: set[Any], inference_mode: bool, keep: bool = False) -> None:
        with flags_kept(self.model) if keep else contextlib.nullcontext():
            for method in methods:
                mine = [name for name in active if self.peft_config[name].peft_type == method]
                for layer in self._layers(method):
                    if layer.merged:
                        layer.unmerge()
                    layer.set_adapter(mine, inference_mode=inference_mode)
            for head in self._heads:
                wanted = [name for name in active if name in head._adapters]
                named = any(self.peft_config[name].peft_type in methods for name in wanted)
                left = [name for name in head.active_adapters if name in self.peft_config and name not in wanted]
                with contextlib.nullcontext() if named else flags_kept(head):
                    if wanted and head.disable_adapters:  # older PEFT does so when another method's adapter comes
                        head.enable_adapters(True)
                    if named or wanted != head.active_adapters:
                        head.set_adapter(wanted, inference_mode=inference_mode)
                head.set_requires_grad(left, False)  # PEFT 0.18 forgets it where no other copy comes

    def without(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Within the context ``names`` take no part; gradients, and everything afterwards, are as before."""
        return self._aside.without(names)

    def remove(self, name: str) -> None:
        """Take one adapter off; the last of its method takes the method's layers with it.

        Raises:
            ValueError: It is merged into the base's weights.
        """
        if any(name in layer.merged_adapters for layer in self._layers(self.peft_config[name].peft_type)):
            raise ValueError(f"adapter {name!r} is merged into the base's weights; call unmerge_adapter() first")
        with self._aside.lifted(gone=[name]):
            self._take_off(name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """What the model's own does, for those who call PEFT's ``model.base_model.set_adapter``."""
        self.activate(check_known(adapter_name, self.peft_config), inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """What the model's own does."""
        self.remove(*check_known([adapter_name], self.peft_config))

    def _take_off(self, name: str) -> None:
        method, before = self.peft_config[name].peft_type, self.active_adapters
        for layer in self._layers(method):
            layer.delete_adapter(name)
        for head in (head for head in self._heads if name in head._adapters):
            head.delete_adapter(name, None)
        del self.peft_config[name]
        if not self._of(method):
            self._strip([method])
        active, clash = guards.still_active(self.peft_config, self.active_adapters, before)
        self._set_active(active, {method} if clash else set(), inference_mode=False, keep=not clash)

    def _strip(self, methods: Iterable[Any], merge: bool = False, **options: Any) -> None:
        """Put the base's own modules back in the place of the methods' layers and of heads that nobody owns."""
        kinds = tuple(PEFT_TYPE_TO_TUNER_MAPPING[method].tuner_layer_cls for method in methods)
        for layer in attached_layers(self.model) if RegisterLayer in kinds else []:
            layer.detach()
        if PositionLayer in kinds:
            for offsets in position_layers(self.model) if merge else []:
                offsets.merge(**options)
            take_off(self.model)
        with hooks_lifted(self.model):
            done: list[str] = []
            for path, module in list(self.model.named_modules()):
                if isinstance(module, RegisterLayer) or any(path.startswith(f"{outer}.") for outer in done):
                    continue
                shared = isinstance(module, AuxiliaryTrainingWrapper)
                head = shared and set(module._adapters).isdisjoint(self.peft_config)
                if shared and not head:
                    guards.settle_head(module, self.peft_config, merge)
                if not head and not (isinstance(module, kinds) and hasattr(module, "base_layer")):
                    continue
                with onload_layer(module):
                    if head and (not merge or not module.active_adapters):  # PEFT 0.18 looks for a copy at work
                        plain = module.original_module
                    elif hasattr(module, "unload_and_optionally_merge_module"):
                        plain = module.unload_and_optionally_merge_module(
                            merge=merge, safe_merge=options.get("safe_merge", False), adapter_names=None
                        )
                    else:
                        if merge:
                            module.merge(**options)
                        plain = module.base_layer
                        while isinstance(plain, kinds):
                            plain = plain.base_layer
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, plain)
                done.append(path)
        for method in methods:
            self._tuners.pop(method, None)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, for what can be merged; registers stay: all of it, or nothing.

        Raises:
            NotImplementedError: There is nothing but registers, or ``adapter_names`` names some.
            ValueError: An adapter is not there, its method does not merge, or ``safe_merge`` finds a broken weight.
        """
        chosen: dict[Any, list[str]] = {}
        for name in self._mergeable(adapter_names):
            mine = chosen.setdefault(self.peft_config[name].peft_type, [])
            if name in (adapter_names or ()):
                mine.append(name)
        with self._aside.lifted():
            layers = [
                (layer, mine or None)
                for method, mine in chosen.items()
                for layer in self._layers(method)
                if mine or adapter_names is None
            ]
            check_merges(layers, safe_merge)
            for layer, names in layers:
                with onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=names)

    def unmerge_adapter(self) -> None:
        """As in PEFT; registers are never merged."""
        for layer in (module for module in self.model.modules() if isinstance(module, BaseTunerLayer)):
            if layer.merged:
                with onload_layer(layer):
                    layer.unmerge()

    def _mergeable(self, adapter_names: list[str] | None) -> list[str]:
        """Names of all adapters that are no registers, after a check of those that are to be merged."""
        check_known(adapter_names or (), self.peft_config)
        others = [name for name, config in self.peft_config.items() if not isinstance(config, RegisterConfig)]
        if not others or not set(adapter_names or ()) <= set(others):
            refuse_merging()
        for method in {self.peft_config[name].peft_type for name in others} & self._tuners.keys():
            self._tuners[method]._check_merge_allowed()
        return others

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge what can be merged, registers stay; or take everything off. PEFT's ``unload`` and ``merge_and_unload``.

        Raises:
            NotImplementedError: There is nothing but registers, or ``adapter_names`` names some.
            ValueError: ``safe_merge`` finds a broken weight; the model is as it was.
        """
        methods = {config.peft_type for config in self.peft_config.values()}
        others = list(self.peft_config)
        if merge:
            others = self._mergeable(adapter_names)
            methods = {self.peft_config[name].peft_type for name in others}
            layers = [layer for method in methods for layer in self._layers(method)]
            # PEFT's modules that come out of themselves merge what is active.
            own = [hasattr(layer, "unload_and_optionally_merge_module") for layer in layers]
            names = [None if alone else adapter_names for alone in own]
            check_merges(zip(layers, names, strict=True), safe_merge)
        self._aside.leave_biases([] if merge else others)
        gone = {name: self.peft_config.pop(name) for name in others}
        try:
            self._strip(methods, merge, **({"safe_merge": safe_merge, "adapter_names": adapter_names} if merge else {}))
        except Exception:
            self.peft_config.update(gone)
            raise
        if not self.peft_config:
            del self.model.peft_config
        return self._aside.settled(gone if merge else ())

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters are put on with add_adapter")
