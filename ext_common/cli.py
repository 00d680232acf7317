"""The grammar every command shares: exit codes, flags from option dataclasses, progress.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 and 143 ended by a signal. A user's mistake is one sentence on
stderr, never a traceback.

    def main(argv):
        parser = Parser(prog="python -m fairseq_ext.speaker.prepare", description=__doc__)
        add_dataclass(parser, PrepareOptions)
        options = from_args(PrepareOptions, parser.parse_args(argv))

    if __name__ == "__main__":
        run(main)
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from ext_common import threads
from ext_common.progress import progress

__all__ = [
    "OptionError",
    "Parser",
    "UsageError",
    "UserError",
    "add_dataclass",
    "did_you_mean",
    "from_args",
    "progress",
    "run",
]

# A full disk, a folder without permission or a file where a folder is needed is nobody's bug; the rest of
# OSError may well be one.
_ENVIRONMENT_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries that write by themselves say the same, and torch that a file ended before what it wrote.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "unexpected pos")
_MAKE_ROOM = "what was finished before it is whole; make room, and run the same command again"

# As many choices as are listed.
_FEW = 12


class UserError(Exception):
    """A user's mistake or bad data, in one sentence that names the place and the remedy."""


class UsageError(UserError):
    """Bad usage of a command: exit code 2."""


class OptionError(UserError, ValueError):
    """An option that does not exist or a value that does not fit it."""


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(argv)` and exit with its code; see the module for what the codes mean.

    Anything but UserError, Ctrl-C and an environment that refuses to be written is a bug in this
    project and keeps its traceback. Programs that this one starts inherit OpenMP's threads.
    """
    if argv is None:
        threads.settle()
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except UsageError as error:
        code = _report(f"error: {error}", 2)
    except UserError as error:
        code = _report(f"error: {error}", 1)
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        sentence = refused_by_the_system(error)
        if sentence is None:
            raise
        code = _report(f"error: {sentence}", 1)
    sys.exit(code)


def refused_by_the_system(error: BaseException) -> str | None:
    """The sentence about an environment that cannot be written or read; None for what may be a bug."""
    full = why_full(error)
    if full:
        path = getattr(error, "filename", None) or "a file"
        return f"{path} cannot be written ({full}): {_MAKE_ROOM}"
    if not isinstance(error, OSError) or error.errno not in _ENVIRONMENT_ERRNOS:
        return None
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def why_full(error: BaseException | None) -> str | None:
    """What the system says where an error, or one behind it, is that there is no room to write; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.strerror or os.strerror(error.errno)
        for text in (
            _FULL_TEXTS if type(error).__name__ in ("RuntimeError", "SafetensorError") else ()
        ):
            if text in str(error):
                return text if text != _FULL_TEXTS[-1] else os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], whole: str = _MAKE_ROOM) -> Iterator[None]:
    """UserError, naming `path`, where the block ends for want of room; whole: what is left and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = why_full(error)
        if full is None:
            raise
        place = getattr(error, "filename", None) or os.fspath(path)
        raise UserError(f"{place} cannot be written ({full}): {whole}") from error


def _report(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence with the nearest flag, and which guesses no flags.

    `--sub` must not silently mean `--subset` today and become ambiguous tomorrow.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(
                f"unknown argument {flag!r}{did_you_mean(flag, self._option_string_actions)}"
            )
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's, which lists all choices there are: fairseq has 200 architectures."""
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            few = f" (known: {', '.join(known)})" if len(known) <= _FEW else ""
            near = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{near}{few}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """argparse's, which keeps the traceback of any other error than a ValueError of a type."""
        if text == "???":
            # fairseq's mark of a default that there is none of, for a flag that others ask for
            raise argparse.ArgumentError(action, "is missing")
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            if "<lambda>" not in error.message:
                raise
            raise argparse.ArgumentError(action, f"invalid value: {text!r}") from None
        except Exception:
            raise argparse.ArgumentError(action, f"invalid value: {text!r}") from None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists what there is)\n")


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`": did you mean 'x'?"`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def add_dataclass(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    cls: type,
    skip: Iterable[str] = (),
) -> None:
    """One `--flag` for each field of an options dataclass (fields in `skip` left out).

    Field metadata: `help` (required; states the unit), `choices`. Types: int, float, str, bool
    (`--x / --no-x`), List of these (comma-separated) and Optional of all of them (`none`).
    A field without default becomes a required flag.
    """
    for field, kind in option_fields(cls):
        if field.name in skip:
            continue
        default = field_default(field)
        required = default is dataclasses.MISSING
        text = field.metadata["help"].replace("%", "%%")
        shown = "" if required else f" (default: {show_value(default)})".replace("%", "%%")
        common: dict[str, Any] = {
            "dest": field.name,
            "required": required,
            "default": None if required else default,
            "help": text + shown,
        }
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            # BooleanOptionalAction writes the default behind the help itself on some Pythons.
            action = parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            action.help = common["help"]
            continue
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _type_name(kind).upper()
        parser.add_argument(flag, type=_argparse_type(field, kind), metavar=metavar, **common)


def from_args(cls: type, args: argparse.Namespace) -> Any:
    """The instance of `cls` that parsed arguments describe; what `cls` refuses is bad usage."""
    given = {f.name: getattr(args, f.name) for f, _ in option_fields(cls) if hasattr(args, f.name)}
    try:
        return cls(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _argparse_type(field: dataclasses.Field[Any], kind: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse_option(field, kind, text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


# --- typed values of option dataclasses, shared with the registry ------------------------------


def option_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """(field, resolved type) for each init field; a field without `help` raises ValueError."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"options must be a dataclass, got {cls!r}")
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    for field in fields:
        if not field.metadata.get("help"):
            raise ValueError(f"{cls.__name__}.{field.name} has no help in its metadata")
    return [(field, hints[field.name]) for field in fields]


def field_default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, `dataclasses.MISSING` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def show_value(value: Any) -> str:
    """A value as it would be typed on a command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(show_value, value)) or "empty"
    return str(value)


def parse_option(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """`value` (text or already typed) as the type of `field`; OptionError names the field."""
    try:
        parsed = _parse(kind, value)
    except (ValueError, TypeError):
        raise OptionError(
            f"bad value {show_value(value)!r} for {field.name}: expected {_type_name(kind)}"
        ) from None
    choices = field.metadata.get("choices")
    if choices and parsed is not None:
        for item in parsed if isinstance(parsed, list) else [parsed]:
            if item not in choices:
                near = did_you_mean(str(item), map(str, choices))
                known = ", ".join(map(str, choices))
                raise OptionError(f"bad value {item!r} for {field.name}{near} (known: {known})")
    return parsed


def is_list(kind: Any) -> bool:
    """Whether a type is List[...] or Optional[List[...]]."""
    return typing.get_origin(_without_none(kind)[0]) is list


def _without_none(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        if len(rest) == 1:
            return rest[0], True
        raise TypeError(f"options cannot have the type {kind}")
    return kind, False


def _parse(kind: Any, value: Any) -> Any:
    kind, optional = _without_none(kind)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value.strip() else []
        return [_parse(item_kind, item) for item in value]
    if kind is bool:
        return _parse_bool(value)
    if isinstance(value, bool) or value is None:
        raise ValueError
    if kind is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if kind is float:
        number = float(value)
        if math.isnan(number):
            raise ValueError
        return number
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    raise TypeError(f"options cannot have the type {kind}")


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError


def _type_name(kind: Any) -> str:
    kind, optional = _without_none(kind)
    if typing.get_origin(kind) is list:
        name = f"{_type_name(typing.get_args(kind)[0])},..."
    else:
        name = {bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{name} or none" if optional else name
