"""Makes packages absent from the process that imports this."""

from __future__ import annotations

import importlib.abc
import sys


class _Absent(importlib.abc.MetaPathFinder):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)


def forbid(*names: str) -> None:
    """No module of these packages can be imported from now on, also none that was imported before."""
    for module in list(sys.modules):
        if module.partition(".")[0] in names:
            del sys.modules[module]
    sys.meta_path.insert(0, _Absent(names))
