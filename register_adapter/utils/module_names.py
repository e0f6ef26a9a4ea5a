"""Which modules PEFT copies for the names in ``modules_to_save``, and whether what is saved of them can be loaded."""

from __future__ import annotations

from collections.abc import Iterable

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["check_copies_load", "names_that_load"]

_SHOWN = 4


def check_copies_load(model: nn.Module, names: Iterable[str], by_end: bool = True) -> None:
    """What PEFT copies and saves for ``names`` is what a loader looks for.

    PEFT copies every module whose name ends with one of them, letters and all: for ``head`` also ``auxiliary_head``
    and ``head.head``.

    Args:
        model: The base model.
        names: ``modules_to_save``.
        by_end: Refuse modules that only end so, as ``auxiliary_head`` does; registers' loaders know no such names.

    Raises:
        ValueError: One of the modules lies in another, or only ends with a name.
    """
    names = list(dict.fromkeys(names))
    taken, faults = _copies(model, names), _faults(model, names, by_end)
    if not faults:
        return
    better = names_that_load(model, names)
    advice = f"Name {better}" if better != names else "Name modules whose names end as no other's do"
    raise ValueError(
        f"modules_to_save={names} would copy {faults[:_SHOWN]} too: PEFT takes every module of {type(model).__name__} "
        f"whose name ends so, also inside of another one, here {list(taken)[:_SHOWN]}, and what it saves of them could "
        f"not be loaded. {advice} instead."
    )


def names_that_load(model: nn.Module, names: Iterable[str]) -> list[str]:
    """``names``, or others for the same modules where what is saved for ``names`` could not be loaded."""
    names = list(dict.fromkeys(names))
    if not _faults(model, names):
        return names
    taken = _copies(model, names)
    outer = {path: module for path, module in taken.items() if not _inside(path, taken)}
    for paths in ([path for path in outer if _called(path, names)], list(outer)):
        parts = [part for path in paths for part in _parts(path, outer[path], taken)]
        for better in (paths, parts):
            if better and not _faults(model, better):
                return better
    return names


def _copies(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules with a state whose name ends with one of ``names``, as PEFT finds them, by their names."""
    modules = list(model.named_modules(remove_duplicate=False))
    wrapped = [path for path, module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    found = {path: module for path, module in modules if path and path.endswith(tuple(names))}
    return {path: module for path, module in found.items() if not _inside(path, wrapped) and module.state_dict()}


def _parts(path: str, module: nn.Module, taken: Iterable[str]) -> list[str]:
    """The children of a module in which others are copied too; the module itself where it has parameters of its own."""
    if not any(_inside(other, [path]) for other in taken) or any(True for _ in module.parameters(recurse=False)):
        return [path]
    return [f"{path}.{name}" for name, child in module.named_children() if child.state_dict()]


def _faults(model: nn.Module, names: list[str], by_end: bool = True) -> list[str]:
    taken = _copies(model, names)
    return [path for path in taken if _inside(path, taken) or (by_end and not _called(path, names))]


def _called(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _inside(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)
