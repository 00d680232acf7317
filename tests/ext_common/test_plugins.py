"""Somebody's --user-dir: imported once, wherever it is named, and never something else of its name."""

import sys

import pytest

from ext_common.checkpoints import import_plugin, load_plugin
from ext_common.cli import UserError


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A folder whose import is counted in `times`."""
    folder = tmp_path / "somebodys_parts"
    folder.mkdir()
    (folder / "__init__.py").write_text("import times\ntimes.seen.append(__name__)\n")
    (tmp_path / "times.py").write_text("seen = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in ("somebodys_parts", "times"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["plain", "as fairseq looks into"])
def test_imported_once_by_whatever_path(plugin, monkeypatch, kind):
    if kind != "plain":
        (plugin / "models").mkdir()
        (plugin / "models" / "mine.py").write_text("import times\ntimes.seen.append('model')\n")
    monkeypatch.chdir(plugin.parent)
    for path in (str(plugin), "somebodys_parts", f"{plugin}/"):
        load_plugin(path)
    load_plugin(None)
    import times

    assert times.seen == ["somebodys_parts"] + (["model"] if kind != "plain" else [])


def test_another_of_its_name_is_refused(plugin, tmp_path):
    load_plugin(str(plugin))
    other = tmp_path / "elsewhere" / "somebodys_parts"
    other.mkdir(parents=True)
    with pytest.raises(UserError, match="another module is called 'somebodys_parts'"):
        load_plugin(str(other))
    with pytest.raises(UserError, match="is not a folder: give the folder of the plugin"):
        load_plugin(str(tmp_path / "nowhere"))


def test_that_of_a_checkpoint(plugin):
    """Of a checkpoint's own it is said where it is not there; what the user names must be."""
    state = {"cfg": {"common": {"user_dir": str(plugin)}}}
    assert import_plugin(state, None) is None and "somebodys_parts" in sys.modules
    gone = {"cfg": {"common": {"user_dir": "gone/parts"}}}
    assert import_plugin(gone, None) == "gone/parts"
    with pytest.raises(UserError, match="gone/parts is not a folder"):
        import_plugin({"cfg": {}}, "gone/parts")
    assert import_plugin({"cfg": {"common": {"user_dir": "any/fairseq_ext"}}}, None) is None
