"""Old names of moved modules: an alias is one line, and imports nothing until it is used."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package or an old module whose names now stand in ``module``.

    AttributeError for a name that is not there, and for dunder names, which belong to the alias itself.
    """
    package = module.rpartition(".")[0]

    def __getattr__(name: str) -> Any:
        # `from package import room` asks here first; on AttributeError Python imports the room
        if name.startswith("__") or importlib.util.find_spec(f"{package}.{name}"):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)

    return __getattr__
