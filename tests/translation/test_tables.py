import csv
import gzip
import json

import pytest

from ext_common.cli import UserError
from fairseq_ext.translation.text.tables import Layout, is_quoted, kind_of, open_po, read_pairs

LAYOUT = Layout((1, 2), ("en", "zh"))
PAIRS = [
    ("Yes.", "是的。"),
    ('He said "no".', "他说“不”。"),
    ("two\nlines", "两\n行"),
    ("a, b; c", "甲，乙"),
    ("", "空"),
    ('"quoted"', "引"),
]


def pairs(path, layout=LAYOUT):
    found = list(read_pairs([path], layout))
    assert [number for number, *_ in found] == list(range(1, len(found) + 1))
    return [tuple(pair) for _, *pair in found]


@pytest.mark.parametrize(
    "name, delimiter",
    [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t"), ("d.csv.gz", ","), ("e.txt", "\t")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_spreadsheet_writes_is_read_cell_by_cell(name, delimiter, end, tmp_path, capsys):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(PAIRS)
    expected = [tuple(cell.replace("\n", "\n") for cell in pair) for pair in PAIRS]
    assert pairs(path) == expected
    assert ("quoted as by a spreadsheet" in capsys.readouterr().err) == (delimiter == "\t")


def test_quotes_in_a_plain_table_are_text(tmp_path, capsys):
    rows = [('"Yes."', "“是。”"), ('He said "no".', "他"), ('"A" and "B"', "甲"), ('"open', "乙")]
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    assert pairs(path) == rows and capsys.readouterr().err == ""
    assert not is_quoted(['"Yes."\t"是。"', "a\tb"])
    assert is_quoted(['"He said ""no""."\tb', "a\tb"])


@pytest.mark.parametrize("row", ['"Hello,你好\nno,不', '"He said "no"",他', '"a" ,甲'])
def test_a_row_whose_quotes_do_not_go_together_is_refused(row, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'en,zh\n"two\nlines",二\n{row}\nyes,是\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv, the row of line 4 is not quoted as a table is"):
        pairs(path)


def test_columns_by_the_names_in_the_first_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,Chinese,English\n1,是,yes\n", encoding="utf-8")
    assert pairs(path, Layout((1, 2), ("en", "zh"), ("English", "Chinese"))) == [("yes", "是")]
    with pytest.raises(
        UserError, match="no column 'French': its first row has id, Chinese, English"
    ):
        pairs(path, Layout((1, 2), ("en", "fr"), ("English", "French")))


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"en": "yes", "zh": "是"}, {"translation": {"en": "no\nno", "zh": "不"}}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert pairs(path) == [("yes", "是"), ("no\nno", "不")]
    with pytest.raises(
        UserError, match=r"record 1 has no text 'de' \(it has en, zh\): give --fields"
    ):
        pairs(path, Layout((1, 2), ("en", "de")))
    path.write_text('{"en": 1')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 is no JSON"):
        pairs(path)


def test_tmx(tmp_path):
    path = tmp_path / "a.tmx"
    unit = (
        '<tu><tuv xml:lang="{}"><seg>{}</seg></tuv><tuv xml:lang="zh-CN"><seg>{}</seg></tuv></tu>'
    )
    units = [("en-US", "Press <ph>x</ph> now", "现在按"), ("de", "Ja", "是")]
    body = "".join(unit.format(*one) for one in units)
    path.write_text(f'<tmx version="1.4"><header/><body>{body}</body></tmx>', encoding="utf-8")
    assert pairs(path) == [("Press x now", "现在按"), ("", "是")]
    path.write_text("<tmx><body>")
    with pytest.raises(UserError, match="no whole TMX"):
        pairs(path)


def test_po(tmp_path):
    pytest.importorskip("polib", reason="pip install -e '.[po]'")
    path = tmp_path / "a.po"
    path.write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\nmsgid "Yes"\nmsgstr "是"\n\n'
        '#, fuzzy\nmsgid "No"\nmsgstr "非"\n\nmsgid "%d files"\nmsgstr ""\n',
        encoding="utf-8",
    )
    assert pairs(path) == [("Yes", "是"), ("", ""), ("", "")]
    path.write_text(
        '#| msgid "old\n#~ msgid "x"\n#~ msgstr "y"\n\nmsgid  "a \\"b\\\\"\nmsgstr ""\n"c" \n'
    )
    assert [(entry.msgid, entry.msgstr) for entry in open_po(path)][-1] == ('a "b\\', "c")
    path.write_bytes('msgid "größe"\nmsgstr ""\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.po, line 1 is not UTF-8"):
        open_po(path)


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (['msgid "a', 'msgstr ""'], 1),
        (['msgid "a"', 'msgstr "b'], 2),
        (['msgid ""', '"abc', '"d"', 'msgstr ""'], 2),
        (['msgid "a"', "msgstr b"], 2),
        (['msgid "a"', 'msgstr[0] "b\\"', 'msgstr[1] "c"'], 2),
        (['#~ msgid "a', '#~ msgstr "b"', 'msgid "c"', 'msgstr ""'], 1),
    ],
)
def test_a_catalogue_whose_quotes_are_not_closed_is_refused(tmp_path, lines, number):
    pytest.importorskip("polib", reason="pip install -e '.[po]'")
    path = tmp_path / "a.po"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"a\.po, line {number} has no text in quotes that are c"):
        open_po(path)


def test_the_ending_says_what_a_file_is():
    assert [kind_of(n) for n in ("a.CSV", "b.tmx.gz", "c.po.zst", "d", "e.en")] == [
        "csv",
        "tmx",
        "po",
        "",
        "en",
    ]
