"""The mutation benchmark on a small checkout: how mutants are found again, and what becomes of them."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import mutants, mutation
from benchmarks.mutants import Mutant, scopes
from benchmarks.mutation import Options, importing, run_all

SOURCE = """\
def once(x):
    x = x + 1
    return x


def twice(x):
    x = x + 1
    x = x + 1
    return x
"""
TESTS = """\
from package.rooms.walls import twice


def test_wrong_without_a_mutant():
    assert twice(0) == 3


def test_twice():
    assert twice(0) == 2
"""
SECOND = Mutant("walls", "twice", "Add_Sub", 1, ("    x = x + 1",), ("    x = x - 1",))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a module, its test file, and one that imports it by way of the package."""
    tree = tmp_path / "tree"
    (tree / "package" / "rooms").mkdir(parents=True)
    (tree / "tests").mkdir()
    (tree / "package" / "rooms" / "walls.py").write_text(SOURCE)
    (tree / "tests" / "test_house.py").write_text("from package.rooms import walls as w\n")
    (tree / "tests" / "test_walls.py").write_text(TESTS)
    (tree / "tests" / "test_else.py").write_text("from package.rooms import windows\n")
    monkeypatch.setattr(mutants, "MODULES", {"walls": ("package/rooms/walls.py", "walls.py")})
    for name in ("MUTANTS", "RUNS"):
        monkeypatch.setattr(mutation, name, tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(mutation, "warm_up", lambda: None)
    monkeypatch.setattr(mutation, "GRACE", 1.0)
    return SimpleNamespace(
        tree=tree, options=Options(tree=str(tree), modules=["walls"], patience=1)
    )


def test_a_mutant_is_found_by_its_function_whatever_moved():
    """Line 8 of the module: the second of two equal lines, in the second function that has one."""
    assert SECOND.line(SOURCE) == 7
    assert SECOND.apply(SOURCE).splitlines() == [
        line.replace("+", "-") if number == 7 else line
        for number, line in enumerate(SOURCE.splitlines())
    ]


def test_a_mutant_is_found_at_another_depth():
    nested = "if True:\n" + "".join(f"    {line}" for line in SOURCE.splitlines(keepends=True))
    assert SECOND.line(nested) == 8
    assert SECOND.apply(nested).splitlines()[8] == "        x = x - 1"


@pytest.mark.parametrize(
    "gone", [SOURCE.replace("twice", "both"), SOURCE.replace("    x = x + 1\n", "", 2)]
)
def test_a_mutant_whose_lines_are_gone(gone):
    assert SECOND.line(gone) is None


def test_a_decorator_is_its_functions():
    assert scopes("@a\ndef f():\n    pass\nx = 1\n") == ["f", "f", "f", ""]


def test_files_that_import_the_module_its_own_first(checkout):
    assert importing(checkout.tree, "walls") == ["tests/test_walls.py", "tests/test_house.py"]


@pytest.mark.slow
def test_runs(checkout):
    """One is killed, by the test that passes without it; one hangs; one survives; none is run twice."""
    fate = {
        "    x = x - 1": (True, "failed", "tests/test_walls.py::test_twice"),
        "    while True: pass": (True, "timeout", None),
        "    x = x + 1  # the same": (False, "passed", None),
        "    x = (": (True, "failed", "tests/test_walls.py"),
    }
    for after in fate:
        mutant = Mutant("walls", "twice", "any", 1, ("    x = x + 1",), (after,))
        mutation.write(mutation.MUTANTS, {"drawn_from": "before", **mutation.asdict(mutant)})
    run_all(checkout.options)
    recorded = mutation.RUNS.read_text()
    records = [json.loads(line) for line in recorded.splitlines()]
    assert {r["file"]: (r["tests"], r["failed"]) for r in records if "file" in r} == {
        "tests/test_walls.py": (2, ["tests/test_walls.py::test_wrong_without_a_mutant"]),
        "tests/test_house.py": (0, []),
    }
    assert {
        r["after"][0]: (r["killed"], r["how"], r["test"]) for r in records if "killed" in r
    } == fate
    assert (checkout.tree / "package" / "rooms" / "walls.py").read_text() == SOURCE

    run_all(checkout.options)
    assert mutation.RUNS.read_text() == recorded
