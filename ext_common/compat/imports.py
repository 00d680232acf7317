"""Importing fairseq without what it imports for metrics that nobody asked for. Imports no fairseq itself."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# fairseq.criterions.sentence_prediction and fairseq.tasks.audio_classification name functions of these
_HEAVY = ("scipy", "scipy.stats", "sklearn", "sklearn.metrics")


@contextlib.contextmanager
def heavy_modules_later() -> Iterator[None]:
    """Symptom: `import fairseq` loads scikit-learn and scipy, half of its time, for metrics of other tasks.

    What is imported from them within the block are names that import the real ones when they are first used,
    so that a criterion that needs one still finds it; afterwards both can be imported as ever. Where more
    of them is wanted, by another fairseq or by what it imports, all is as without this; what is loaded
    already stays. (No thread upstream;
    fairseq.criterions.sentence_prediction, fairseq.tasks.audio_classification.)
    """
    absent = [name for name in _HEAVY if name not in sys.modules]
    if "fairseq" in sys.modules or not absent:
        yield
        return
    stand_ins = _StandIns(absent)
    try:
        yield
    finally:
        stand_ins.end()


class _StandIns:
    """Modules in the place of the heavy ones, and the finder that is asked for any other part of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.modules = {name: _Module(name) for name in names}
        sys.modules.update(self.modules)
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        for name, module in self.modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        if package not in self.modules:
            return None
        self.end()
        importlib.import_module(package)
        return importlib.util.find_spec(name)


class _Module(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []

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
