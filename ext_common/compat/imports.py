"""Importing fairseq without what it imports for metrics that nobody asked for. Imports no fairseq itself."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# fairseq.criterions.sentence_prediction and fairseq.tasks.audio_classification name functions of these
_HEAVY = ("scipy", "scipy.stats", "sklearn", "sklearn.metrics")


@contextlib.contextmanager
def heavy_modules_later() -> Iterator[None]:
    """Symptom: `import fairseq` loads scikit-learn and scipy, half of its time, for metrics of other tasks.

    What is imported from them within the block are names that import the real ones when they are first used,
    so that a criterion that needs one still finds it; afterwards both can be imported as ever.
    """
    if any(name in sys.modules for name in ("fairseq", *_HEAVY)):
        yield
        return
    stands_ins = {name: _Module(name) for name in _HEAVY}
    sys.modules.update(stands_ins)
    try:
        yield
    finally:
        for name, module in stands_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Module(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self.__name__, name)


class _Later:
    """What `from module import name` would have been, found when it is first called or asked."""

    def __init__(self, module: str, name: str) -> None:
        self._place = module, name

    def _found(self) -> Any:
        module, name = self._place
        owner = importlib.import_module(module)
        return getattr(owner, name, None) or importlib.import_module(f"{module}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._found(), name)
