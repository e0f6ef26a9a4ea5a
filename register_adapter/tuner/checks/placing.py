"""Whether an adapter fits a model: blocks, hidden units, attention, heads, and the base that it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from peft import PeftConfig
from torch import nn

from ...errors import AdapterFileError, BaseModelMismatchError, UnsupportedModelError
from ...towers.identity import TowerIdentity, brings_biases, with_biases_of
from ...towers.tower import Tower
from ...utils.adapter_file import TensorInfo, check_savable_modules
from ...utils.module_names import check_copies_load
from ...utils.shipped import is_shipped, shipped_name
from ..config import RegisterConfig
from ..heads import lacking_modules, modules_called
from ..hooks.attention import reads_implementation
from ..hooks.fitting import misfit
from ..neuron_shift import count_neurons
from ..saved_keys import copied_modules
from .copied_layers import check_free
from .saved_heads import check_saved_heads

__all__ = [
    "beside_biases_of",
    "biases_tell",
    "by_block",
    "check_named",
    "check_placement",
    "check_task",
    "check_units",
    "checked_identity",
    "heads_of",
]

#: Whether adapters that were there before the call in progress have trained biases; ``None`` outside of one.
_BESIDE: ContextVar[bool | None] = ContextVar("biases beside", default=None)
#: What PEFT's classes for a task take from the model as they are made.
_ASKED: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("prepare_inputs_for_generation",),
    "SEQ_2_SEQ_LM": ("prepare_inputs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation"),
}


def by_block(config: RegisterConfig, units: list[int]) -> dict[int, Any]:
    """The flat list of a file, by block."""
    rest = iter(units)
    return {
        block: [next(rest) for _ in range(count)]
        for block, count in count_neurons(config.register_neurons or {}).items()
    }


def check_units(tower: Tower, neurons: Mapping[int, Any], source: str) -> None:
    """The MLPs have the hidden units that are named; numbers of them (of which a file says more) are passed over."""
    name, blocks = type(tower.module).__name__, len(tower.part("blocks"))
    for block, units in neurons.items():
        last = tower.block_part(block, "mlp_out") if block < blocks else None
        if last is None:
            raise UnsupportedModelError(
                f"{source} has register neurons in block {block} of {name}, which has {blocks} blocks, with an MLP at "
                f"{tower.anatomy.mlp_out!r}"
            )
        width = getattr(last, "in_features", None)
        highest = max(units) if isinstance(units, list) else units - 1
        if isinstance(width, int) and highest >= width:
            raise AdapterFileError(
                f"{source} names hidden unit {highest} of block {block} of {name}, whose MLP has {width}. "
                "Nothing was changed."
            )
        known = sorted(unit for unit in units if unit >= 0) if isinstance(units, list) else []  # -1 is yet to come
        if twice := [unit for unit, following in pairwise(known) if unit == following]:
            raise AdapterFileError(
                f"{source} names hidden unit {twice[0]} of block {block} of {name} more than once. Nothing was changed."
            )


def check_task(model: nn.Module, config: PeftConfig) -> None:
    """The model can do what PEFT's class for the ``task_type`` asks of it.

    Raises:
        ValueError: The task is to generate text, and the model does not.
    """
    if lacking := [name for name in _ASKED.get(str(config.task_type), ()) if not hasattr(model, name)]:
        raise ValueError(
            f"task_type {str(config.task_type)!r} is for models that generate text, and {type(model).__name__} has no "
            f"{lacking[0]!r}. Leave task_type out."
        )


def check_placement(tower: Tower, config: RegisterConfig) -> None:
    """The tower can have registers where the config wants them."""
    name, blocks = type(tower.module).__name__, len(tower.part("blocks"))
    if config.insert_layer >= blocks:
        raise ValueError(
            f"insert_layer={config.insert_layer} is not a block of {name}, which has {blocks} (0 to {blocks - 1})"
        )
    if config.insert_layer and tower.part("positions_between") is not None:
        raise UnsupportedModelError(
            f"insert_layer cannot be had with {name}, which adds position embeddings between its blocks, for the "
            "length that the sequence has from the start. Use insert_layer=0."
        )
    neurons, saved = config.register_neurons or {}, config.saved_weights
    check_units(tower, neurons, "the config")
    if saved is not None and saved.units is not None:
        check_units(tower, by_block(config, saved.units), str(saved.path))
    wanted = [mode for mode in ("key_value", "gate") if getattr(config, mode) not in (None, False)]
    if wanted and not reads_implementation(tower):
        raise UnsupportedModelError(
            f"{wanted[0]} needs a model whose attention goes through transformers' attention interface, where pairs "
            f"and biases can be added; the blocks of {name} do not. Use registers in the sequence (deep=True for fresh "
            "ones at every block)."
        )
    if sentence := misfit(tower, config.placement, bool(wanted), set(neurons)):
        raise UnsupportedModelError(f"{sentence}. Use registers with insert_layer=0 and none of deep, key_value, gate.")


def heads_of(
    model: nn.Module, tower: Tower, config: RegisterConfig, adapter_name: str
) -> tuple[list[str], list[str], dict[str, TensorInfo] | None]:
    """The ``modules_to_save`` that the model has, those of a saved adapter that it lacks, and what its file has.

    The last is ``None`` where there is no file.
    """
    names = config.modules_to_save or []
    lacking = [name for name in lacking_modules(model, tower, names) if config.needs(name)]
    # What a saved adapter names is in its file, where it is looked for.
    if not config.from_file:
        check_named(model, tower, [name for name in names if config.needs(name)])
    else:  # timm's num_classes=0 and ``model.head = nn.Identity()`` leave the name of a head without one
        lacking += [name for name in names if _is_empty(modules_called(model, name)) and config.needs(name)]
    heads = [name for name in names if name not in lacking]
    if not config.from_file:
        check_copies_load(model, heads)
        check_savable_modules(dict(copied_modules(model, heads)))
    check_free(model, heads, adapter_name)
    layout = None
    if config.saved_weights is not None:
        present = [name for name in dict.fromkeys(heads) if modules_called(model, name)]
        layout = check_saved_heads(model, tower, present, config.saved_weights)
    return heads, lacking, layout


def check_named(model: nn.Module, tower: Tower, names: list[str]) -> None:
    """What a new config names in ``modules_to_save`` is in the model, and there is something in it to train.

    Raises:
        ValueError: It is not, or is all of the tower's blocks, which PEFT's copy would not be in turn.
    """
    for name in names:
        called = modules_called(model, name)
        if not called:
            children = [child for child, _ in model.named_children()]
            raise ValueError(f"modules_to_save names {name!r}, which {type(model).__name__} lacks; it has {children}")
        if _is_empty(called):
            raise ValueError(
                f"modules_to_save names {name!r}, a {type(next(iter(called.values()))).__name__} without parameters: "
                "there is nothing in it to train or to save. Leave it out, or put a module with parameters in its "
                "place first."
            )
        if tower.part("blocks") in called.values():
            raise ValueError(
                f"modules_to_save names {name!r}, all blocks of {type(tower.module).__name__}, which PEFT cannot copy "
                f"as one module. Name a head, or single blocks: ['{name}.0', '{name}.1']."
            )


def _is_empty(modules: Mapping[str, nn.Module]) -> bool:
    """Whether there are modules, and nothing in them to save."""
    return bool(modules) and not any(module.state_dict() for module in modules.values())


@contextmanager
def beside_biases_of(model: nn.Module) -> Iterator[None]:
    """Have a loader know of biases that adapters of other methods have trained, where it sees none of their configs.

    Those that are put on within the context have trained none so far.
    """
    known = _BESIDE.get()
    token = _BESIDE.set(brings_biases(model) if known is None else known)
    try:
        yield
    finally:
        _BESIDE.reset(token)


def biases_tell(model: nn.Module) -> bool:
    """Whether biases tell anything of the base that a model is: an adapter on it may have trained them."""
    known = _BESIDE.get()
    return not (brings_biases(model) if known is None else known)


def checked_identity(identity: TowerIdentity, config: Any, biases: bool = True) -> TowerIdentity:
    """A tower's identity, after comparing it with the one that the config was saved with, which an override keeps.

    Args:
        identity: The tower's.
        config: The adapter's config.
        biases: Whether biases tell anything of the base; otherwise they remain what the config says, if it does.
    """
    saved = config.identity
    if saved is None or not config.from_file:  # a new one, or one in use on another base too
        return identity if biases else identity.without_biases()
    if not biases:
        identity = with_biases_of(identity, saved)
    differences = identity.differences(saved)
    if "hidden_size" in differences or (differences and not config.ignore_base_mismatch):
        advice = (
            "An adapter of another width can never fit."
            if "hidden_size" in differences
            else "If you know that it fits this base all the same, say so: "
            "PeftModel.from_pretrained(base, adapter, ignore_base_mismatch=True)."
        )
        name = shipped_name(config.base_model_name_or_path)
        base = f" of {name!r}" if name else ""
        kind = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
        load = f"{'register_adapter.testbed.load_shipped' if is_shipped(name) else f'{kind}.from_pretrained'}({name!r})"
        expected = f" Load that base: {load}." if name else " Load the base that it was made for."
        raise BaseModelMismatchError(
            f"the adapter was made for the vision tower {saved}{base}, the given base has {identity}: they differ in "
            f"{', '.join(differences)}.{expected} {advice} Nothing was changed."
        )
    return saved if differences else identity
