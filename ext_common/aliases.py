"""Old names of moved modules: an alias is one line, and imports nothing until it is used."""

import importlib
from collections.abc import Callable
from typing import Any


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package or an old module whose names now stand in ``module``.

    AttributeError for a name that is not there, and for dunder names, which belong to the alias itself.
    """

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)

    return __getattr__
