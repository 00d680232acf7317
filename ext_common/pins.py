"""What this project requires, read where it is stated; standard library only, as doctor is."""

import configparser
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "fairseq-ext"


class Pin(NamedTuple):
    """A requirement: distribution name and version specifiers, e.g. `>=2.9,<2.15`."""

    name: str
    specifier: str

    def __str__(self) -> str:
        return f"'{self.name}{self.specifier}'"


def requirements() -> tuple[str, dict[str, Pin], str | None]:
    """(Python range, pins by name, where they were read): setup.cfg beside this, else metadata.

    setup.cfg first: the metadata of an editable install is as old as the installation.
    """
    config = Path(__file__).resolve().parent.parent / "setup.cfg"
    if config.is_file():
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(config, encoding="utf-8")
        if parser.get("metadata", "name", fallback="") == DISTRIBUTION:
            lines = parser.get("options", "install_requires", fallback="").splitlines()
            python = parser.get("options", "python_requires", fallback="")
            return python, parse_pins(lines), str(config)
    try:
        found = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ">=3.11,<3.13", {}, None
    lines = found.get_all("Requires-Dist") or []
    return found["Requires-Python"] or "", parse_pins(lines), DISTRIBUTION


def parse_pins(lines: list[str]) -> dict[str, Pin]:
    """Requirements by name; comments and those of extras are left out."""
    pins = {}
    for line in lines:
        requirement, _, marker = line.split("#")[0].partition(";")
        found = re.match(r"\s*([A-Za-z0-9._-]+)\s*\(?\s*([^)]*?)\s*\)?\s*$", requirement)
        if found and "extra" not in marker:
            pins[found[1]] = Pin(found[1], found[2].replace(" ", ""))
    return pins


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version lies within comma-separated bounds (>=, >, <=, <, ==, !=).

    Enough of PEP 440 for the bounds in setup.cfg: release numbers; a local part (+cu130) is not
    compared, and a pre-release of an excluded upper bound is excluded with it.
    """
    have = _release(version)
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for operator, text in re.findall(r"([<>=!~]+)([^,]*)", specifier):
        limit = _release(text)
        width = max(len(have), len(limit))
        padded = [numbers + (0,) * (width - len(numbers)) for numbers in (have, limit)]
        if operator in compare and not compare[operator](*padded):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version.strip())
    return tuple(map(int, found.group().split("."))) if found else ()
