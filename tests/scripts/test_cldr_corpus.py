"""scripts/cldr_corpus.py: the same bytes, both languages say the same, nothing of test in train or mono."""

import csv
import importlib.util
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from fairseq_ext.translation.text.normalise import match_key, normalise, script_share
from tests import processes

pytest.importorskip("babel")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cldr_corpus.py"


def load_script():
    spec = importlib.util.spec_from_file_location("cldr_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules["cldr_corpus"] = module
    spec.loader.exec_module(module)
    return module


cldr = load_script()


def make(*args):
    return processes.call(cldr.main, *args)


@pytest.fixture(scope="module")
def corpus():
    return cldr.make_corpus(cldr.CorpusOptions(pairs=3000, valid=200, test=300, mono=1500))


def test_same_command_same_bytes(tmp_path):
    for name in "ab":
        done = make(tmp_path / name, "--pairs", 300, "--valid", 20, "--test", 30, "--mono", 90)
        assert done.returncode == 0 and "generated text" in done.stdout, done.stderr
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["manifest.json", "mono.zh", "test.tsv", "train.tsv", "valid.tsv"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert make(tmp_path / "c", "--pairs", 300, "--mono", 90, "--seed", 2).returncode == 0
    for name in ("train.tsv", "mono.zh"):
        assert (tmp_path / "c" / name).read_bytes() != (tmp_path / "a" / name).read_bytes()
    with open(tmp_path / "a" / "train.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 300 and {len(row) for row in rows} == {3}
    assert {row[2] for row in rows} == set(cldr.KINDS)


def test_no_value_and_no_name_of_one_split_is_in_another(corpus):
    values = {split: {v for pair in pairs for v in pair.values} for split, pairs in corpus.items()}
    assert all(values.values())
    assert len(values) == 4
    for one, other in itertools.combinations(values, 2):
        assert values[one].isdisjoint(values[other])
    groups = {group for group, _ in values["test"]}
    assert groups == {"date", "time", "number", "territory", "language", "currency"}


def test_values_are_found_in_the_text_itself(corpus):
    """The split by what the lines say, not by what the generator says of them."""

    def dates(pairs):
        return {d for pair in pairs for d in re.findall(r"\d{4}年\d+月\d+日", pair.target)}

    def numbers(pairs):
        return {
            re.sub(r"\D", "", n)
            for pair in pairs
            if pair.kind in ("number", "money")
            for n in re.findall(r"(?<![\d年月:])\d[\d,.]*(?![\d,.:年月日])", pair.target)
        }

    for found in (dates, numbers):
        held = found(corpus["test"])
        for split in ("train", "mono"):
            others = found(corpus[split])
            assert min(len(held), len(others)) > 20 and held.isdisjoint(others)


def test_no_line_is_twice_on_either_side(corpus):
    for side in (0, 1):
        keys = Counter(match_key(pair[side]) for pairs in corpus.values() for pair in pairs)
        assert max(keys.values()) == 1


def test_sizes_kinds_and_scripts(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == {
        "train": 3000,
        "valid": 200,
        "test": 300,
        "mono": 1500,
    }
    for pairs in corpus.values():
        kinds = Counter(pair.kind for pair in pairs)
        for kind, share in cldr.KINDS.items():
            assert kinds[kind] / len(pairs) == pytest.approx(share / 100, abs=0.08)
    for pair in corpus["train"]:
        assert not {"\t", "\n", "{", "}", "\u202f"} & set(pair.source + pair.target)
        assert script_share(pair.source, "en") > 0.9
        assert normalise(pair.source, "en") == pair.source
        assert re.search(r"[\u4e00-\u9fff]", pair.target)
        # An unknown unit would come out under its own name in CLDR.
        assert not re.search(r"[a-z]-[a-z]", pair.target)


def test_both_sides_have_the_same_digits(corpus):
    for pair in corpus["train"]:
        if pair.kind in ("number", "money") and "年" not in pair.target:
            sides = [re.findall(r"\d[\d,.]*\d|\d", text) for text in pair[:2]]
            assert sorted(sides[0]) == sorted(sides[1]), pair


def test_every_sentence_has_its_values_on_both_sides():
    for templates in cldr.TEMPLATES.values():
        for source, target in templates:
            fields = [sorted(re.findall(r"{(\w+)}", text)) for text in (source, target)]
            assert fields[0] == fields[1] and fields[0]


def test_units_are_words_in_both_languages():
    values = cldr.Values(1)
    for unit in cldr.UNITS:
        texts = [cldr.in_unit(7, unit, locale) for locale in (values.en, values.zh)]
        assert all("7" in text and unit not in text for text in texts), texts
    assert cldr.in_unit(1.5, "length-kilometer", values.zh) == "1.5公里"


def test_names_are_known_pairs():
    names = cldr.Values(1).names
    assert ("Germany", "德国") in names["territory"] and ("French", "法语") in names["language"]
    for group in names.values():
        assert len(group) > 150
        for side in (0, 1):
            assert len({match_key(name[side]) for name in group}) == len(group)


def test_monolingual_lines_are_new_and_of_every_kind(tmp_path):
    """By the files alone: Chinese that no other file has, case, width and punctuation aside."""
    sizes = ["--pairs", 2000, "--valid", 100, "--test", 200, "--mono", 800]
    assert make(tmp_path, *sizes).returncode == 0
    lines = (tmp_path / "mono.zh").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and len(lines) == 800
    assert {"train", "valid", "test"} == {path.stem for path in tmp_path.glob("*.tsv")}
    known = {
        match_key(row.split("\t")[1])
        for path in tmp_path.glob("*.tsv")
        for row in path.read_text(encoding="utf-8").splitlines()
    }
    keys = set(map(match_key, lines))
    assert len(keys) == 800 and keys.isdisjoint(known)
    assert all(re.search(r"[\u4e00-\u9fff]", line) and "\t" not in line for line in lines)


def test_no_monolingual_lines_where_none_are_wanted(tmp_path):
    sizes = ["--pairs", 50, "--valid", 5, "--test", 5]
    assert make(tmp_path, *sizes, "--mono", 0).returncode == 0
    assert not (tmp_path / "mono.zh").exists()
    done = make(tmp_path / "x", "--mono", -1)
    assert done.returncode == 2 and "must not be negative" in done.stderr


def test_the_other_files_do_not_depend_on_how_many_lines_are_wanted(tmp_path):
    for name, mono in (("a", 0), ("b", 60)):
        sizes = ["--pairs", 200, "--valid", 20, "--test", 20]
        assert make(tmp_path / name, *sizes, "--mono", mono).returncode == 0
    for split in ("train", "valid", "test"):
        a, b = (tmp_path / name / f"{split}.tsv" for name in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_asking_too_much_and_mistakes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cldr, "KINDS", {"time": 1})
    monkeypatch.setattr(cldr, "MISSES", 20)
    monkeypatch.setitem(cldr.TEMPLATES, "time", [("It is {time}.", "现在{time}。")])
    with pytest.raises(cldr.UserError, match="there are only .* different pairs for test"):
        cldr.make_corpus(cldr.CorpusOptions(pairs=1, valid=1, test=10_000))
    (tmp_path / "file").touch()
    done = make(tmp_path / "file")
    assert done.returncode == 1 and "is a file" in done.stderr
    assert make(tmp_path / "x", "--pairs", 0).returncode == 2
