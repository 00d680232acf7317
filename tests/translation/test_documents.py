import csv
import itertools
import json
import random
from pathlib import Path

import pytest

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation.documents import is_intact, open_document
from tests.translation.test_translate import echo

MARKS = [
    "%s",
    "%d",
    "%(name)s",
    "{0}",
    "{user}",
    "<b>",
    "</b>",
    "&amp;",
    "``code``",
    ":ref:`x <y>`",
]
MARKS += ["https://a.b/c?d=1", "${HOME}", "%1$s", "|version|", "**bold**", "%%", "%.2f", "\\n"]
WORDS = ["open", "the", "file", "again", "please", "now"]


@pytest.fixture
def catalogue(tmp_path):
    """500 entries with up to four marks each, and the marks of each, which were put in here."""
    polib = pytest.importorskip("polib", reason="pip install -e '.[po]'")
    draw = random.Random(1)
    po = polib.POFile()
    po.metadata = {
        "Content-Type": "text/plain; charset=UTF-8",
        "Plural-Forms": "nplurals=1; plural=0;",
    }
    marks = []
    for number in range(500):
        own = [draw.choice(MARKS) for _ in range(draw.randrange(5))]
        words = [f"e{number}", *(draw.choice(WORDS) for _ in range(4))]
        for mark in own:
            words.insert(draw.randrange(len(words) + 1), mark)
        text = " ".join(words)
        if number % 7 == 0:
            text = f"\n{text}\n"
        plural = {"msgid_plural": f"{text} all"} if number % 11 == 0 else {}
        po.append(polib.POEntry(msgid=text, **plural))
        marks.append(own)
    path = tmp_path / "a.po"
    po.save(str(path))
    return path, marks


def good(text):
    return text.upper() if not any(mark in text for mark in MARKS) else text


def losing(text):
    """What a model does that has never seen a placeholder."""
    for mark in MARKS:
        text = text.replace(mark, "")
    return " ".join(text.split()).upper()


@pytest.mark.parametrize(
    "model, way",
    [(good, "whole"), (losing, "in_pieces"), (lambda text: text + "%s {0}", "left_as_source")],
)
def test_every_placeholder_of_a_catalogue_is_there_afterwards(catalogue, model, way):
    import polib

    path, marks = catalogue
    document = open_document(path)
    content, counts = document.render(list(map(model, document.texts)))
    assert counts["entries"] == 500 and counts[way] >= 380
    assert sum(counts.get(way, 0) for way in ("whole", "in_pieces", "left_as_source")) == 500
    found = list(polib.pofile(content.decode()))
    assert len(found) == 500
    for before, entry, own in zip(polib.pofile(str(path)), found, marks, strict=True):
        assert entry.msgid == before.msgid and entry.translated()
        text = entry.msgstr_plural[0] if entry.msgid_plural else entry.msgstr
        assert [text.count(mark) >= own.count(mark) for mark in own] == [True] * len(own)
        source = entry.msgid_plural or entry.msgid
        assert is_intact(source, text)
        assert [text[n] == "\n" for n in (0, -1)] == [source[n] == "\n" for n in (0, -1)]


def test_what_is_translated_stays_and_what_is_fuzzy_is_done(tmp_path):
    pytest.importorskip("polib", reason="pip install -e '.[po]'")
    path = tmp_path / "a.po"
    path.write_text(
        'msgid ""\nmsgstr "Plural-Forms: nplurals=2; plural=n!=1;\\n"\n\n# a comment\n#: a.c:1\n'
        'msgid "Yes"\nmsgstr "Ja"\n\n#, fuzzy, c-format\nmsgid "%d file"\nmsgid_plural "%d files"\n'
        'msgstr[0] "x"\nmsgstr[1] "y"\n',
        encoding="utf-8",
    )
    document = open_document(path)
    assert "Yes" not in document.texts
    content, counts = document.render([text.upper().replace("%D", "%d") for text in document.texts])
    text = content.decode()
    assert counts == {"entries": 1, "there_before": 1, "whole": 1}
    assert 'msgstr "Ja"' in text and "# a comment" in text and "#: a.c:1" in text
    assert 'msgstr[0] "%d FILE"' in text and 'msgstr[1] "%d FILES"' in text
    assert "fuzzy" not in text and "c-format" in text


def test_a_piece_without_a_translation_leaves_no_space_behind(tmp_path):
    pytest.importorskip("polib", reason="pip install -e '.[po]'")
    path = tmp_path / "a.po"
    path.write_text('msgid "the <b>value</b> of"\nmsgstr ""\n')
    document = open_document(path)
    words = {"the": "", "value": "值", "of": "的"}
    content, counts = document.render([words.get(text.strip(), "") for text in document.texts])
    assert 'msgstr "<b>值</b> 的"' in content.decode() and counts["in_pieces"] == 1


@pytest.mark.parametrize(
    "source, translation, intact",
    [
        ("%s has %d", "%d hat %s", False),  # of two without a number the order is the meaning
        ("%1$s has %2$d", "%2$d hat %1$s", True),
        ("{a} and {b}", "{b} und {a}", True),
        ("100% sure", "100 % sicher", True),
        ("<b>x</b>", "<b>x<b>", False),
        ("x", "", False),
        ("x", "{0}", False),
    ],
)
def test_what_counts_as_intact(source, translation, intact):
    assert is_intact(source, translation) is intact


def test_a_column_of_a_table(tmp_path):
    path = tmp_path / "a.csv"
    rows = [["id", "text"], ["1", 'He said "no",\nthen yes'], ["2"], ["3", "a;b"]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    document = open_document(path, "text")
    assert document.texts == ['He said "no",', "then yes", "", "a;b"]
    content, counts = document.render([text.upper() for text in document.texts])
    assert list(csv.reader(content.decode().splitlines(keepends=True))) == [
        ["id", "text"],
        ["1", 'HE SAID "NO",\nTHEN YES'],
        ["2", ""],
        ["3", "A;B"],
    ]
    assert counts == {"cells": 3}
    content, _ = open_document(path, "text:german").render(["w", "x", "y", "z"])
    assert content.decode().splitlines()[0] == "id,text,german"
    plain = tmp_path / "b.tsv"
    plain.write_text('1\t"Yes."\n2\tno\n', encoding="utf-8")
    assert open_document(plain, "2").render(["A", "B"])[0] == b"1\tA\n2\tB\n"
    with pytest.raises(UserError, match="no column 4"):
        open_document(plain, "4")


def test_a_field_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"n": 1, "en": "yes"}, {"translation": {"en": "no\nno"}}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    document = open_document(path, field="en:de")
    content, _ = document.render(["ja", "nein", "nein"])
    assert list(map(json.loads, content.decode().splitlines())) == [
        {"n": 1, "en": "yes", "de": "ja"},
        {"translation": {"en": "no\nno", "de": "nein\nnein"}},
    ]


def test_the_command_translates_a_document(tmp_path, monkeypatch):
    from fairseq_ext.translation import translate as command

    translator = echo()
    monkeypatch.setattr(command.Translator, "from_checkpoint", lambda *args: translator)
    monkeypatch.setattr(command, "KEPT", 2)
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("yes,1\nno,2\nmaybe,3\n")
    Path("c.pt").write_bytes(b"")
    words = ["a.csv", "b.csv", "--path", "c.pt", "--column", "1:3"]
    assert command.main(words) == 0
    assert Path("b.csv").read_text() == "yes,1,yes\nno,2,no\nmaybe,3,maybe\n"
    assert json.loads(next(Path().glob("b*.manifest.json")).read_text())["counts"]["document"] == {
        "cells": 3
    }
    with pytest.raises(UsageError, match="one translation for each text"):
        command.main([*words, "--scores"])
    assert list(itertools.chain(Path().glob(".*"))) == []
