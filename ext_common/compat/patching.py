"""Replacing a function of fairseq, once, and only while it is the one the remedy is for.

However many rooms have something to say about a function, it gets one wrapper, which calls them all.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

_LAYERS = "__ext_common_compat__"


def replace(
    owner: Any, name: str, make: Callable[[Callable], Callable], expects: tuple[str, ...] = ()
) -> bool:
    """Call `make(owner.name)` where `owner.name` is called; True when it is so afterwards.

    `owner` is a module or a class. Every string of `expects` must occur in the source of what
    is replaced, else it is left alone with a warning. Attributes of the function are carried over,
    as fairseq keeps state on some. A later remedy goes around the earlier ones, inside the same
    wrapper; a second call with the same `make` does nothing.
    """
    original = getattr(owner, name, None)
    layers = getattr(original, _LAYERS, None)
    if layers is not None and make.__qualname__ in layers.names:
        return True
    if not as_expected(original, expects, f"{getattr(owner, '__name__', owner)}.{name}"):
        return False
    if layers is None:
        layers = _install(owner, name, original)
    layers.names.append(make.__qualname__)
    layers.call = make(layers.call)
    return True


def before(owner: Any, name: str, action: Callable, expects: tuple[str, ...] = ()) -> bool:
    """`replace` by a function that first calls `action` with the same arguments."""

    def make(original: Callable) -> Callable:
        def call(*args, **kwargs):
            action(*args, **kwargs)
            return original(*args, **kwargs)

        return call

    make.__qualname__ = action.__qualname__
    return replace(owner, name, make, expects)


def after(owner: Any, name: str, action: Callable, expects: tuple[str, ...] = ()) -> bool:
    """`replace` by a function that then calls `action(result, *arguments)`; the result stays."""

    def make(original: Callable) -> Callable:
        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            action(result, *args, **kwargs)
            return result

        return call

    make.__qualname__ = action.__qualname__
    return replace(owner, name, make, expects)


def as_expected(function: Any, expects: tuple[str, ...], where: str) -> bool:
    """Whether the source of `function` has all of `expects`; a warning where it has not."""
    if _looks_like(function, expects):
        return True
    warnings.warn(
        f"ext_common.compat leaves {where} as it is: this fairseq differs from the one the "
        "remedy was written for (ve-fairseq 0.12.3)",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


class _Layers:
    """What a wrapper calls: the outermost remedy, and the names of all."""

    def __init__(self, call: Callable) -> None:
        self.call = call
        self.names: list[str] = []


def _install(owner: Any, name: str, original: Callable) -> _Layers:
    layers = _Layers(original)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return layers.call(*args, **kwargs)

    setattr(wrapper, _LAYERS, layers)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)
    return layers


def _looks_like(function: Any, expects: tuple[str, ...]) -> bool:
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (TypeError, OSError):
        return False
    return all(text in source for text in expects)
