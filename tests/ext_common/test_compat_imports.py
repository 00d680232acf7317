"""fairseq is imported without what it needs for other tasks; whoever needs it finds it all the same."""

import importlib
import sys

import pytest

from ext_common.compat import imports


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """A package `heavy` with heavy.metrics and heavy.more, in the place of scipy and scikit-learn."""
    (tmp_path / "heavy").mkdir()
    for name, code in {
        "__init__": "base = 1",
        "metrics": "def twice(x): return 2 * x",
        "more": "value = 7",
    }.items():
        (tmp_path / "heavy" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fairseq", raising=False)
    monkeypatch.setattr(imports, "_HEAVY", ("heavy", "heavy.metrics"))
    before = list(sys.meta_path)
    yield
    assert sys.meta_path == before
    for name in [name for name in sys.modules if name.startswith("heavy")]:
        del sys.modules[name]


def loaded():
    return [name for name in sys.modules if name.startswith("heavy")]


def test_names_are_found_when_they_are_used(heavy):
    with imports.heavy_modules_later():
        from heavy import metrics
        from heavy.metrics import twice
    assert loaded() == []
    assert twice(3) == 6 and metrics.twice(4) == 8
    assert loaded() == ["heavy", "heavy.metrics"]
    assert importlib.import_module("heavy").base == 1


def test_another_part_brings_the_whole(heavy):
    with imports.heavy_modules_later():
        from heavy.metrics import twice
        from heavy.more import value

        assert sys.modules["heavy"].base == 1 and sys.modules["heavy"].more.value == value == 7
    assert twice(1) == 2


def test_what_does_not_exist_is_missing(heavy):
    with imports.heavy_modules_later():
        with pytest.raises(ModuleNotFoundError, match="heavy.nothing"):
            importlib.import_module("heavy.nothing")
    assert importlib.import_module("heavy").base == 1


def test_what_is_loaded_already_stays(heavy):
    real = importlib.import_module("heavy.metrics")
    with imports.heavy_modules_later():
        assert sys.modules["heavy.metrics"] is real


def test_a_part_of_what_is_loaded_can_wait(heavy):
    real = importlib.import_module("heavy")
    with imports.heavy_modules_later():
        from heavy.metrics import twice
    assert loaded() == ["heavy"] and sys.modules["heavy"] is real
    assert twice(3) == 6 and loaded() == ["heavy", "heavy.metrics"]
