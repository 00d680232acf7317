"""Replacing a function of fairseq, once, and only while it is the one the remedy is for."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

_MARK = "__ext_common_compat__"


def replace(
    owner: Any, name: str, make: Callable[[Callable], Callable], expects: tuple[str, ...] = ()
) -> bool:
    """Set ``owner.name = make(owner.name)``; True when it is replaced afterwards.

    ``owner`` is a module or a class. Every string of ``expects`` must occur in the source of what
    is replaced, else it is left alone with a warning. Attributes of the function are carried over,
    as fairseq keeps state on some. A second call with the same ``make`` finds the mark of the first
    and does nothing.
    """
    original = getattr(owner, name, None)
    marks = getattr(original, _MARK, frozenset())
    if make.__qualname__ in marks:
        return True
    if not _looks_like(original, expects):
        where = f"{getattr(owner, '__name__', owner)}.{name}"
        warnings.warn(
            f"ext_common.compat leaves {where} as it is: this fairseq differs from the one the "
            "remedy was written for (ve-fairseq 0.12.3)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    new = functools.wraps(original)(make(original))
    setattr(new, _MARK, marks | {make.__qualname__})
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(new) if is_static else new)
    return True


def _looks_like(function: Any, expects: tuple[str, ...]) -> bool:
    try:
        source = inspect.getsource(function)
    except (TypeError, OSError):
        return False
    return all(text in source for text in expects)
