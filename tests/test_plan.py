"""The plan of the house, read from the imports themselves, those inside functions among them."""

import ast
from collections import Counter
from functools import cache
from itertools import count
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ext_common", "fairseq_ext", "diffusion_ext")
SPEAKER, TRANSLATION, BACK = (
    f"fairseq_ext.{w}" for w in ("speaker", "translation", "backtranslation")
)
WINGS = (SPEAKER, TRANSLATION, BACK, "diffusion_ext")
# a wing → those that it may stand on
STANDS_ON = {BACK: {TRANSLATION}}
MOST_LINES = 400
MOST_ROOMS = 26


@cache
def modules():
    """Name → file of every module of the packages."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {name_of(path): path for path in files}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(name, text, known):
    """The modules among `known` that the source of module `name` imports, anywhere in it."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield from [full] if full in known else [base] if base in known else []


@cache
def graph():
    """Module → the modules it imports; a package itself, which they all lie in, is none of them."""
    known = modules()
    return {
        name: {n for n in imported(name, path.read_text("utf-8"), known) if n != name}
        for name, path in known.items()
    }


def circles(edges):
    """Groups of more than one node that all reach each other (Tarjan 1972)."""
    number, low, stack, found, numbers = {}, {}, [], [], count()

    def visit(node):
        number[node] = low[node] = next(numbers)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in number:
            visit(node)
    return found


def wing_of(name):
    """The wing of a module, None for the ground floor and what is there for all jobs."""
    return next((wing for wing in WINGS if name == wing or name.startswith(f"{wing}.")), None)


def test_no_circles():
    assert circles(graph()) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


@pytest.mark.parametrize(
    "line, found",
    [
        ("import a.b", ["a.b"]),
        ("def f():\n    from a import b, c", ["a.b", "a"]),
        ("if x:\n    from a.b import c", ["a.b"]),
        ("from . import b", ["a.b"]),
        ("from .b import c\nfrom .. import d", ["a.b"]),
        ("import os, json", []),
    ],
)
def test_imports_are_found(line, found):
    known = {"a": Path("a/__init__.py"), "a.b": Path("a/b.py"), "a.x": Path("a/x.py")}
    assert list(imported("a.x", line, known)) == found


def test_no_wing_imports_another_but_what_it_stands_on():
    wrong = [
        (name, other)
        for name, others in graph().items()
        for other in others
        if wing_of(name)
        and wing_of(other) not in {None, wing_of(name)} | STANDS_ON.get(wing_of(name), set())
    ]
    assert wrong == []


def test_the_ground_floor_imports_no_wing():
    wrong = [
        (name, other)
        for name, others in graph().items()
        for other in others
        if name.startswith("ext_common") and not other.startswith("ext_common")
    ]
    assert wrong == []


def test_no_module_is_too_long():
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("wing", WINGS)
def test_the_top_of_a_wing_can_be_looked_over(wing):
    rooms = [
        path
        for path in (ROOT / wing.replace(".", "/")).iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__")
        and (path.is_dir() or path.suffix == ".py")
    ]
    assert len(rooms) <= MOST_ROOMS
    assert max(Counter(path.stem for path in rooms).values()) == 1
