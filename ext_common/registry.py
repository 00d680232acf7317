"""The one registry helper: names for this project's kinds (pooling, margin, sampler, ...).

    POOLINGS = Registry("pooling")

    @POOLINGS.register("self_attentive", options=SelfAttentiveOptions)
    class SelfAttentive(nn.Module):
        '''Weights from a learned query.'''

    POOLINGS.build("self_attentive", 80, options="heads=4,hidden=64")
    POOLINGS.bind("self_attentive:heads=4,hidden=64")(80)

Someone's own `--user-dir` adds an entry with the same decorator.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ext_common.cli import (
    OptionError,
    UserError,
    did_you_mean,
    field_default,
    is_list,
    option_fields,
    parse_option,
    show_value,
)

T = TypeVar("T", bound=Callable[..., Any])


class UnknownName(UserError, ValueError):
    """A name that is not registered; the message lists the known ones and the nearest."""


class Registry:
    """Names of one `kind`, each with a function or class and a dataclass of its options."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[..., Any]] = {}
        self._options: dict[str, type | None] = {}

    def register(self, name: str, options: type | None = None) -> Callable[[T], T]:
        """Decorator that enters a function or class under `name`.

        `options` is a dataclass whose every field has `help` in its metadata, or None.
        Raises ValueError for a name already taken or a field without help.
        """
        if not name or any(mark in name for mark in ",=:"):
            raise ValueError(f"{self.kind} needs a name without ',', '=' and ':', got {name!r}")
        if options is not None:
            option_fields(options)

        def enter(entry: T) -> T:
            if name in self._entries:
                first = self._entries[name]
                place = f"{first.__module__}.{first.__qualname__}"
                raise ValueError(f"{self.kind} {name!r} is already registered, by {place}")
            self._entries[name] = entry
            self._options[name] = options
            return entry

        return enter

    def names(self) -> tuple[str, ...]:
        """The known names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Any:
        """The registered function or class; raises UnknownName."""
        if name not in self._entries:
            near = did_you_mean(str(name), self._entries) or ";"
            known = ", ".join(self.names()) or "none"
            raise UnknownName(f"unknown {self.kind} {name!r}{near} known: {known}")
        return self._entries[name]

    def options(self, name: str, given: Any = None) -> Any:
        """The options of `name` as an instance of its dataclass (None for an entry without).

        `given`: `"key=value,key=value"` (a part without `=` continues a list), a mapping, an
        instance, or None for the defaults. Raises OptionError for an unknown key, with the
        nearest, for a value that does not fit and for a missing one without default.
        """
        self.get(name)
        cls = self._options[name]
        if cls is not None and isinstance(given, cls):
            return given
        fields = {} if cls is None else {field.name: (field, k) for field, k in option_fields(cls)}
        lists = {key for key, (_, kind) in fields.items() if is_list(kind)}
        try:
            pairs = _pairs(given, lists)
            for key in pairs:
                if key not in fields:
                    known = f"known: {', '.join(fields)}" if fields else "it has no options"
                    near = did_you_mean(key, fields) or ";"
                    raise OptionError(f"unknown option {key!r}{near} {known}")
            for key, (field, _) in fields.items():
                if key not in pairs and field_default(field) is dataclasses.MISSING:
                    raise OptionError(f"option {key!r} is missing ({field.metadata['help']})")
            values = {key: parse_option(*fields[key], value) for key, value in pairs.items()}
            return None if cls is None else cls(**values)
        except ValueError as error:  # also what the dataclass itself refuses in __post_init__
            raise OptionError(f"{self.kind} {name!r}: {error}") from error

    def build(self, name: str, *args: Any, options: Any = None, **kwargs: Any) -> Any:
        """`entry(*args, **options, **kwargs)` with `options` as :meth:`options` reads them."""
        return self._bound(name, options)(*args, **kwargs)

    def bind(self, text: str) -> functools.partial[Any]:
        """The entry that `"name"` or `"name:key=value,key=value"` describes, with its options."""
        name, _, options = text.partition(":")
        return self._bound(name.strip(), options)

    def _bound(self, name: str, options: Any) -> functools.partial[Any]:
        chosen = self.options(name, options)
        extra = {} if chosen is None else dataclasses.asdict(chosen)
        # not a lambda: a loading worker of a spawned process gets it pickled
        return functools.partial(self.get(name), **extra)

    def describe(self) -> str:
        """For `--help`: each name, the first line of its docstring, its options with defaults."""
        lines = []
        for name in self.names():
            doc = inspect.getdoc(self._entries[name]) or ""
            lines.append(f"  {name}: {doc.splitlines()[0]}" if doc else f"  {name}")
            cls = self._options[name]
            for field, _ in [] if cls is None else option_fields(cls):
                default = field_default(field)
                required = default is dataclasses.MISSING
                shown = "required" if required else f"default: {show_value(default)}"
                lines.append(f"      {field.name}: {field.metadata['help']} ({shown})")
        return "\n".join(lines)


def _pairs(given: Any, lists: set[str]) -> dict[str, Any]:
    """The key → value mapping in `given`; `lists` are the keys whose values have commas."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise OptionError(f"options must be 'key=value,...' or a mapping, got {given!r}")
    pairs: dict[str, Any] = {}
    last = None
    for part in given.split(",") if given.strip() else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if equals:
            if key in pairs:
                raise OptionError(f"option {key!r} is given twice")
            pairs[key], last = value.strip(), key
        elif last in lists:
            pairs[last] += "," + part
        else:
            raise OptionError(f"expected key=value, got {part.strip()!r}")
    return pairs
