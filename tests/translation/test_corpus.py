"""corpus.json says what a folder is, and is not believed where the files say otherwise."""

import json
import shutil

import pytest

from ext_common.cli import UserError
from ext_common.folders import partial_folder
from fairseq_ext.translation.corpus import Corpus


@pytest.fixture
def data(toy_data, tmp_path):
    return shutil.copytree(toy_data, tmp_path / "data")


def change(data, **fields):
    file = data / "corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_says_what_the_folder_holds(data):
    corpus = Corpus.open(data)
    assert corpus.languages == ("en", "zh")
    assert corpus.splits == {"train": 601, "valid": 43, "test": 56}
    assert corpus.text("valid", "zh") == data / "text" / "valid.zh"
    assert corpus.ids("valid") == data / "text" / "valid.ids"
    assert corpus.dictionary_path("zh") == data / "dict.zh.txt"
    assert corpus.binarised("test", "zh") == data / "test.en-zh.zh"
    assert corpus.codec("en") is corpus.codec("zh")
    assert corpus.codec("en").symbol_id("<BT>") >= 4


def test_saved_and_opened_is_the_same(data):
    corpus = Corpus.open(data)
    (data / "corpus.json").unlink()
    corpus.save()
    assert Corpus.open(data) == corpus
    assert json.loads((data / "corpus.json").read_text()) == corpus.to_dict()


@pytest.mark.parametrize("call", ["codec", "dictionary_path"])
def test_unknown_language_and_split_are_told(data, call):
    corpus = Corpus.open(data)
    with pytest.raises(UserError, match=r"no language 'de': it has en and zh"):
        getattr(corpus, call)("de")
    with pytest.raises(UserError, match="no split 'dev': it has train, valid, test"):
        corpus.text("dev", "en")


def test_no_corpus_is_told(data, tmp_path):
    with pytest.raises(UserError, match="does not exist: run"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        Corpus.open(data / "corpus.json")
    with pytest.raises(UserError, match=r"no corpus\.json"):
        Corpus.open(tmp_path)
    partial_folder(tmp_path / "soon").mkdir()
    with pytest.raises(UserError, match="interrupted: run the same command again"):
        Corpus.open(tmp_path / "soon")


def test_other_kind_of_data_is_told(data):
    (data / "corpus.json").write_text('{"format": 1, "speakers": ["a"]}')
    with pytest.raises(UserError, match="another kind of data"):
        Corpus.open(data)


@pytest.mark.parametrize("content", ["", "{", "\xff", '{"kind": "translation", "version": 1}'])
def test_damage_is_told(data, content):
    (data / "corpus.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"corpus\.json is damaged"):
        Corpus.open(data)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"version": 2}, "version 2, this program reads 1"),
        ({"languages": ["en", "en"]}, "no usable spm"),
        ({"spm": {"en": {"file": "spm.en.model"}}}, "no usable spm"),
        ({"joint": "yes"}, "no usable joint"),
        ({"splits": None, "normalise": 1}, "no usable normalise, splits"),
    ],
)
def test_wrong_fields_are_told(data, fields, said):
    change(data, **fields)
    with pytest.raises(UserError, match=said):
        Corpus.open(data)


def test_another_model_is_refused(data):
    model = (data / "spm.zh.model").read_bytes()
    (data / "spm.zh.model").write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    with pytest.raises(UserError, match=r"spm\.zh\.model is missing or is not the model"):
        Corpus.open(data)


@pytest.mark.parametrize(
    "name", ["spm.en.model", "dict.zh.txt", "valid.en-zh.en.bin", "train.en-zh.zh.idx"]
)
def test_missing_file_is_told(data, name):
    (data / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Corpus.open(data)
