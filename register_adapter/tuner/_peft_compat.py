"""Every touch of PEFT's internals: the new members of its enum of methods, the registration, what older versions lack.

PEFT has no plug-in entry points: ``register_peft_method`` insists that the name is a member of ``PeftType``, and
transformers calls ``.value`` on it, so the enum gets real members.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import peft.auto
import peft.functional
import peft.peft_model
import peft.utils.save_and_load
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import nn

from ..utils.adapter_file import check_savable_values

__all__ = [
    "CHECKS_IMPORTS",
    "METHOD",
    "POSITIONS",
    "PREFIX",
    "REMAPS",
    "FromFile",
    "activate_heads",
    "enable_heads",
    "member",
    "name_linear_layers",
    "named_as_in_state",
    "peft_type",
    "register",
    "register_positions",
    "remap_on_load",
    "renamed_by_transformers",
    "renew_on_save",
]

METHOD = "register_adapter"
PREFIX = "register_adapter_"
#: The method that moves position embeddings.
POSITIONS = "offset_positions"
_LEFT_OUT = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Whether AutoPeftModel itself refuses to import packages that are not on a list (not in PEFT 0.18).
CHECKS_IMPORTS = hasattr(peft.auto, "check_import_allowlist")
#: Class of the config, and of the tuner, by method of this package.
_READERS: dict[str, Any] = {}
_LOADERS: dict[str, Any] = {}


def peft_type() -> Any:
    """The enum member ``PeftType.REGISTER_ADAPTER``, made on first use."""
    return member(METHOD)


def name_linear_layers(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Have the config's ``target_modules="all-linear"`` name the layers that PEFT means by it."""
    return tuners_utils._maybe_include_all_linear_layers(config, model)


def member(method: str) -> Any:
    """The member of ``PeftType`` for a method of this package, made on first use."""
    name = method.upper()
    if name not in PeftType.__members__:
        made = str.__new__(PeftType, name)
        made._name_ = name
        made._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = made
        PeftType._value2member_map_[name] = made
        type.__setattr__(PeftType, name, made)
    return PeftType.__members__[name]


def register(config_cls: type, model_cls: type) -> None:
    """Make the method known to PEFT; a second call does nothing."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
        _READERS[METHOD.upper()], _LOADERS[METHOD.upper()] = config_cls, model_cls
        _read_by_method()
        _load_by_method(model_cls)
        _save_with(model_cls)


def register_positions(config_cls: type, model_cls: type) -> None:
    """The same for the method that moves position embeddings."""
    if member(POSITIONS) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=POSITIONS, config_cls=config_cls, model_cls=model_cls, prefix=f"{POSITIONS}_")
        _READERS[POSITIONS.upper()], _LOADERS[POSITIONS.upper()] = config_cls, model_cls


def _read_by_method() -> None:
    """Have ``PeftConfig.from_pretrained`` read these methods' folders by the methods' own readers.

    transformers' loaders and AutoPeftModel ask it for a config, and it makes one without telling the config's class of
    the folder: the weights in it could be checked only after they are in the model, where they may replace the base's.
    """
    inherited = PeftConfig.from_pretrained.__func__

    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        reader = _reader_of(pretrained_model_name_or_path, subfolder, kwargs) if cls is PeftConfig else None
        if reader is not None:
            return reader.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        return inherited(cls, pretrained_model_name_or_path, subfolder, **kwargs)

    from_pretrained.__doc__ = inherited.__doc__
    PeftConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type, unused-ignore]


def _reader_of(name: Any, subfolder: str | None, kwargs: dict[str, Any]) -> Any:
    hub = PeftConfig._split_kwargs(kwargs)[0] | ({"subfolder": subfolder} if subfolder else {})
    try:
        # Also what only means it, such as the name in small letters: the method's own reader refuses it in words.
        said = str(PeftConfig._get_peft_type(str(name), **hub)).upper()
    except Exception:  # no file, or none that can be read: PEFT says so
        return None
    return next((reader for method, reader in _READERS.items() if method in said), None)


def _load_by_method(model_cls: Any) -> None:
    """Have PEFT put a file's values into an adapter of these methods by way of their tuners' ``loading``.

    PEFT looks for the modules of ``modules_to_save`` before it asks the tuner, and finds them by one name alone.
    """
    inherited = peft.utils.save_and_load.set_peft_model_state_dict

    @wraps(inherited)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = getattr(model, "peft_config", {}).get(adapter_name)
        loader = _LOADERS.get(getattr(getattr(config, "peft_type", None), "value", ""))
        if loader is not None or hasattr(model, "renews_bases"):  # one of ours around adapters of other methods
            model = _as_in_state(model)
        if loader is None:
            return inherited(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        with loader.loading(model, peft_model_state_dict, adapter_name) as placed:
            return inherited(model, placed, adapter_name, *args, **kwargs)

    read = peft.utils.save_and_load.load_peft_weights

    @wraps(read)
    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        subfolder = kwargs.get("subfolder")
        model_cls.before_read(model_id, subfolder, partial(_reader_of, model_id, subfolder, kwargs))
        tensors = FromFile(read(model_id, *args, **kwargs))
        tensors.source = str(model_id), kwargs
        return tensors

    for holder in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        holder.set_peft_model_state_dict, holder.load_peft_weights = set_peft_model_state_dict, load_peft_weights


class FromFile(dict[str, Any]):
    """Tensors that PEFT has read, and of which folder or repository, with its options for the Hub."""

    source: tuple[str, dict[str, Any]]


_NO_EMBEDDINGS = (
    "save_embedding_layers=True is not offered for registers and moved position embeddings: they train no embedding "
    "layer, and no loader takes a file with weights of the base's own. Leave it out, and save the base too if its "
    "embeddings were changed."
)


def _save_with(model_cls: Any) -> None:
    """Have PEFT gather an adapter's tensors alone, of these methods, from what can be loaded.

    It would write the base's embedding layers along where the vocabulary of a model around the tower was resized, which
    no loader takes, and leave out what has another adapter's name anywhere in its key, be it "weight" or "gate".
    A PEFT without a hook for what a tuner saves (0.18) is given the state by ``model_cls.state_to_save``.
    """
    inherited = peft.utils.save_and_load.get_peft_model_state_dict
    signature = inspect.signature(inherited)

    @wraps(inherited)
    def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        model, name = getattr(values["model"], "_orig_mod", values["model"]), values["adapter_name"]
        configs = getattr(model, "peft_config", {})
        method = getattr(configs.get(name), "peft_type", None)
        if method in (peft_type(), member(POSITIONS)):
            if values["save_embedding_layers"] is True:
                raise ValueError(_NO_EMBEDDINGS)
            values["save_embedding_layers"] = False
            if method == member(POSITIONS):
                _LOADERS[POSITIONS.upper()].before_save(model)
            state = model.state_dict() if values["state_dict"] is None else values["state_dict"]
            if not SAVES_BY_TUNER and method == peft_type():
                state = model_cls.state_to_save(model, name, state)
            mark = f".{PREFIX}tokens." if method == peft_type() else f".{POSITIONS}_values."
            values["state_dict"] = {k: v for k, v in state.items() if mark not in k or f"{mark}{name}." in k}
            values["model"] = with_one(model, name)
        tensors = inherited(*given.args, **given.kwargs)
        if method == member(POSITIONS):  # registers' tuner has looked at its own
            check_savable_values(tensors, name)
        return tensors

    for holder in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model, peft.functional):
        holder.get_peft_model_state_dict = get_peft_model_state_dict


def view_of(module: Any, **attributes: Any) -> Any:
    """Another object with a module's state, its very modules and tensors, but for these attributes."""
    view = object.__new__(type(module))  # FSDP2 makes copies by a class's own, which wants arguments
    view.__dict__.update({**vars(module), **attributes})
    return view


def with_one(model: Any, name: str) -> Any:
    """A view of a model with one adapter's config in sight, since other threads run or save the model meanwhile.

    ``viewed`` is the model itself, which may be the tower too. Names of modules are those in the keys of its state:
    PEFT looks for the values of a tuner's layers, and of copied modules, by the names that their modules have.
    """
    shown = {name: model.peft_config[name]}
    named = partial(named_as_in_state, model)
    if "peft_config" in vars(model):
        return view_of(model, peft_config=shown, viewed=model, named_modules=named)
    tuner = model.base_model
    field = "shown" if hasattr(tuner, "shown") else "peft_config"
    parts = {**model._modules, "base_model": view_of(tuner, **{field: shown})}
    return view_of(model, _modules=parts, viewed=model, named_modules=named)


def named_as_in_state(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by the names that the keys of its state have.

    FSDP1 and torch's ``checkpoint_wrapper`` leave out there what they call the modules that they wrap.
    """
    for name, module in model.named_modules(*args, **kwargs):
        yield _LEFT_OUT.sub("", f"{name}.")[:-1], module


def _as_in_state(model: nn.Module) -> Any:
    """A view of a model whose modules have the names of :func:`named_as_in_state`; itself if they have them anyway."""
    wrapped = any(_LEFT_OUT.search(f"{name}.") for name, _ in model.named_modules())
    return view_of(model, named_modules=partial(named_as_in_state, model)) if wrapped else model


def renamed_by_transformers(model: nn.Module) -> Callable[[str], str]:
    """What turns a key of an older release of transformers into this one's (transformers 5; 4 renames nothing)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    except (ImportError, AttributeError):  # transformers 4, or no model of transformers
        return str
    return lambda key: str(rename_source_key(key, renamings, [])[0])


#: Whether PEFT asks a tuner what of a model's state is saved of an adapter (not 0.18).
SAVES_BY_TUNER = hasattr(BaseTuner, "_get_adapter_state_dict")
#: Whether PEFT asks a tuner where the keys of an adapter go that is loaded (not 0.18).
REMAPS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")


def remap_on_load(tuner: nn.Module, remap: Callable[..., dict[str, Any]], begin: str = PREFIX) -> None:
    """Have ``remap`` called when an adapter is loaded, also by a PEFT without a hook for it (0.18).

    Args:
        tuner: The module that holds the base as ``tuner.model``, and configs by name as ``tuner.peft_config``.
        remap: Takes the arguments of ``BaseTuner._remap_adapter_state_dict_for_load``, by keyword.
        begin: How the part of the method's keys begins that an adapter's name follows.
    """
    if not REMAPS:
        tuner.register_load_state_dict_pre_hook(partial(_before_load, remap, begin))  # type: ignore[no-untyped-call]


def renew_on_save(holder: nn.Module) -> None:
    """Have ``holder.renew_bases()`` called before a save, also by a PEFT that has no hook for it (0.18)."""
    if not SAVES_BY_TUNER:
        holder.register_state_dict_pre_hook(_before_save)  # type: ignore[no-untyped-call]


def _before_save(holder: Any, *_: Any) -> None:
    holder.renew_bases()


def _before_load(
    remap: Callable[..., dict[str, Any]], begin: str, tuner: Any, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Undo what PEFT 0.18 did to the keys of an adapter, and do what ``remap`` says."""
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    named = {key: key.rpartition(f".{begin}")[2].split(".") for key in given if f".{begin}" in key}
    names = {parts[1] for parts in named.values() if len(parts) > 1}
    if len(names) != 1 or not all(key in named or ".modules_to_save." in key for key in given):
        return  # the state of a whole model, or an adapter of another method
    (name,) = names
    bare = {}
    for key, value in given.items():
        place, mark, end = key.rpartition(f".{begin}")
        bare[f"{place}{mark}{end.replace(f'.{name}.', '.', 1)}" if mark else key] = value
    placed = remap(model=tuner, config=tuner.peft_config[name], adapter_name=name, state_dict=bare)
    for key in given:
        del state_dict[f"{prefix}{key}"]
    state_dict.update({f"{prefix}{key}": value for key, value in placed.items()})


def activate_heads(
    model: nn.Module, deleted: str | None, names: list[str], inference_mode: bool = False, enable: bool = False
) -> None:
    """Modules of ``modules_to_save`` follow the adapters ``names`` that are active now.

    PEFT leaves the base's beside the adapter that follows a ``deleted`` one without a module of its own, and beside the
    second one that transformers loads for ``inference_mode``. ``enable``: PEFT 0.18 has switched that one off too.
    """
    for head in model.modules():
        if isinstance(head, ModulesToSaveWrapper) and not head.active_adapters and deleted not in head.modules_to_save:
            wanted = [name for name in names if name in head.modules_to_save]
            if wanted:
                if enable and head.disable_adapters:
                    head.enable_adapters(True)
                head.set_adapter(wanted[0], inference_mode=inference_mode)


def enable_heads(model: nn.Module, names: list[str]) -> None:
    """Modules of ``modules_to_save`` follow when transformers switches adapters on again.

    ``disable_adapters()`` of a model of transformers switches them off too, and ``enable_adapters()`` passes over them.

    Args:
        model: The model.
        names: Names of the adapters whose modules these are.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return  # PEFT's own calls see to them
    for head in model.modules():
        if (
            isinstance(head, ModulesToSaveWrapper)
            and head.disable_adapters
            and not set(names).isdisjoint(head.modules_to_save)
        ):
            head.enable_adapters(True)
