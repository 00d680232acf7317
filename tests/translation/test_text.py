"""Reading lines, normalising them, and what counts as the same text."""

import gzip
import io
import random
import sys
import unicodedata

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation.text import normalise as module
from fairseq_ext.translation.text.normalise import (
    CONVENTIONS,
    detokenise,
    length,
    match_key,
    normalise,
    read_lines,
    read_pairs,
    script_share,
    unit,
)

LANGUAGES = ["en", "zh", "ja", "ko", "ar", "fa", "hi", "th", "de", "xx"]
# What interacts: joiners, selectors, marks that compose, full width, brackets, other line ends.
NASTY = (
    " ,.!?:;()…，。（）“”你好々アｱ㋿1aé\u0301\u0338\u0345\u200b\u200c\u200d\ufe0f\ufe0e\u20e3क्‍مّ😀👨❤#™ℹ🏴"
    "\U000e0067\u2028\u2029\x85\t\r\n\x00\x1c\ufeff\xa8\u3164½²각\uff9e\u0338=<＝▁\ud800ΐſßİŉ鑫𠮷\U000e0100\uffff"
)
NASTY_TEXT = st.text(st.sampled_from(NASTY), max_size=12)
ANY_TEXT = st.one_of(
    st.text(st.characters(codec=None, exclude_categories=()), max_size=30), NASTY_TEXT
)


@pytest.mark.parametrize(
    ("lang", "raw", "expected"),
    [
        ("en", "  Two\u00a0 words \t here\u2028and\u0085there\u3000 ", "Two words here and there"),
        ("en", "so\u00adft ze\u200bro \ufeffbom \u202abidi\u202c", "soft zero bom bidi"),
        ("en", "bell\x07 nul\x00 esc\x1b", "bell nul esc"),
        ("en", "ＦＵＬＬ ｗｉｄｔｈ １２３", "FULL width 123"),
        ("en", "ﬁne ﬂow Ⅳ №", "fine flow IV No"),
        ("en", "cafe\u0301", "café"),
        ("en", "ℹ\ufe0f info", "i info"),
        ("en", "a\u200c\u0308", "ä"),
        ("en", "“quoted” — ‘it’…", "“quoted” — ‘it’…"),
        ("en", "10² m, H₂O, 1½ cups", "10² m, H₂O, 1½ cups"),
        ("en", "▁piece▁marks", "_piece_marks"),
        ("en", "lone \ud800 surrogate", "lone surrogate"),
        ("en", "Hello, world. (Really?)", "Hello, world. (Really?)"),
        ("zh", "ＡＢＣ１２３，你好！“对”；（是）：～", "ABC123，你好！“对”；（是）：～"),
        ("zh", "你好,世界.", "你好，世界。"),
        ("zh", "你好, 世界. 再见", "你好，世界。再见"),
        ("zh", "什么?!! 好;", "什么？！！好；"),
        ("zh", "价格是3.5元,约1,000个.", "价格是3.5元，约1,000个。"),
        ("zh", "时间:3:30", "时间：3:30"),
        ("zh", "我用微软.NET写的", "我用微软.NET写的"),
        ("zh", "等等...", "等等..."),
        ("zh", "Mr. Wang, hello.", "Mr. Wang, hello."),
        ("zh", "他(John)来了,(对吗)?", "他（John）来了，（对吗）？"),
        ("zh", "𠮷野家和鑫鑫", "𠮷野家和鑫鑫"),
        ("zh", "龍\U000e0100⻰豈", "龍⻰豈"),
        ("ja", "ｶﾞｷﾞ,です.", "ガギ，です。"),
        ("ko", "각나, 다.", "각나, 다."),
        ("ar", "ﻣﺮﺣﺒﺎ\u200f بالعالم،", "مرحبا بالعالم،"),
        ("fa", "می\u200cخواهم a\u200cb", "می\u200cخواهم ab"),
        ("hi", "क्\u200dष", "क्\u200dष"),
        ("en", "👨\u200d👩\u200d👧 ❤️ 1️⃣ 👍🏽 x\ufe0f y\u200d", "👨\u200d👩\u200d👧 ❤️ 1️⃣ 👍🏽 x y"),
        (
            "en",
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f a\U000e0067",
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f a",
        ),
        ("en", "", ""),
        ("zh", "\u3000\u200b", ""),
    ],
)  # fmt: skip
def test_normalise_golden(lang, raw, expected):
    assert normalise(raw, lang) == expected
    assert normalise(expected, lang) == expected


def test_convention_none_changes_only_what_breaks_a_file_of_lines():
    raw = "ＡＢ,你好.\u2028 \t\x85a\nb\rc\x00▁\ud800 "
    assert normalise(raw, "zh", "none") == "ＡＢ,你好.\u2028 \t\x85a b c_ "


def test_unknown_convention_names_the_known_ones():
    with pytest.raises(UserError, match="standard"):
        normalise("a", "en", "standart")


@given(ANY_TEXT, st.sampled_from(LANGUAGES), st.sampled_from(CONVENTIONS.names()))
def test_normalise_is_idempotent_and_fits_on_a_line(text, lang, convention):
    once = normalise(text, lang, convention)
    assert normalise(once, lang, convention) == once
    assert not set("\n\r\0\u2581") & set(once)
    once.encode("utf-8")
    if convention == "standard":
        assert once == once.strip() and "  " not in once
        assert not {unicodedata.category(c) for c in once} & {"Cc", "Cs", "Zl", "Zp"}
        assert once.split() == once.split(" ") or not once


def test_normalise_of_every_character_is_idempotent():
    rng = random.Random(1)
    block = list(map(chr, range(0x30000)))
    # Each beside random others: alone there is nothing to compose with.
    for lang in ("en", "zh"):
        rng.shuffle(block)
        for start in range(0, len(block), 8):
            once = normalise("".join(block[start : start + 8]), lang)
            assert normalise(once, lang) == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("Ｈｅｌｌｏ　１２", "HELLO 12"),
        ("你好，世界。", "你 好 世 界"),
        ("don’t", "don't"),
        ("Straße", "STRASSE"),
        ("café", "cafe\u0301"),
        ("zero\u200bwidth", "zerowidth"),
        ("❤️ love", "❤ love"),
        ("?!", "？ ！"),
        ("ガ", "ｶﾞ"),
    ],
)
def test_same_key(one, other):
    assert match_key(one) == match_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("?!", "…"),
        ("😀", "😂"),
        ("❤️", "☀️"),
        ("12", "13"),
        ("说", "話"),
        ("कि", "की"),
        ("resume", "résumé"),
        ("a", ""),
    ],
)
def test_different_key(one, other):
    assert match_key(one) != match_key(other)


@given(ANY_TEXT)
def test_key_does_not_depend_on_normalisation(text):
    key = match_key(text)
    assert match_key(normalise(text, "en")) == key
    assert match_key(f"  {text}\n") == key
    assert match_key(key) == key


@given(st.text(st.characters(codec="ascii"), max_size=20))
def test_ascii_key_is_the_general_one(text):
    """The short cut for ASCII against the definition."""
    kept = "".join(c for c in text.casefold() if unicodedata.category(c)[0] in "LNM")
    assert match_key(text) == kept or not kept


def test_length_counts_characters_or_words():
    assert length("你好，Tom Smith。", "zh") == length("你 好 ， TomSmith。", "zh-TW") == 12
    assert length(" I am   here. ", "en") == 3
    assert [length("ab cd", x) for x in ("ja", "th", "lo", "km", "my", "yue", "cmn")] == [4] * 7
    assert length("", "en") == length(" ", "zh") == 0
    assert (unit("zh_CN"), unit("de")) == ("characters", "words")


def test_script_share():
    assert script_share("你好abc", "zh") == pytest.approx(2 / 5)
    assert script_share("你好abc", "en") == pytest.approx(3 / 5)
    assert script_share("コーヒーを飲む", "ja") == 1.0
    assert script_share("コーヒーを飲む", "zh") == pytest.approx(1 / 7)
    assert script_share("Привет, мир", "ru") == 1.0
    assert script_share("Привет", "en") == 0.0
    assert script_share("123 😀 ?", "zh") == script_share("", "zh") == 1.0
    assert script_share("anything", "tlh") == 1.0


@given(ANY_TEXT, st.sampled_from(LANGUAGES))
def test_measures_never_fail(text, lang):
    assert 0 <= script_share(text, lang) <= 1
    assert 0 <= length(text, lang) <= len(text)
    detokenise(text, lang)


def test_detokenise():
    assert detokenise("你 好 ， Tom 说 “ 好 ” 。 a b", "zh") == "你好， Tom 说“好”。 a b"
    assert detokenise("コーヒー を 飲む 。", "ja") == "コーヒーを飲む。"
    assert detokenise("你 好", "en") == "你 好"
    assert detokenise("he said “ hi ”", "zh") == "he said “ hi ”"


@given(st.text(st.sampled_from("你好，。“”ab1 "), max_size=15))
def test_detokenise_removes_spaces_only_and_all_at_once(text):
    once = detokenise(text, "zh")
    assert detokenise(once, "zh") == once
    assert once.replace(" ", "") == text.replace(" ", "")


RAW = "\ufefffirst\r\n\n\u2028mid\u0085dle\x0b\x0c\x1c\n tab\tcell \r\r\nrare 𠮷😀\nlast".encode()
LINES = ["first", "", "\u2028mid\u0085dle\x0b\x0c\x1c", " tab\tcell \r", "rare 𠮷😀", "last"]


def pack(kind, data):
    if kind == "gz":
        return gzip.compress(data, mtime=0)
    if kind == "zst":
        half = len(data) // 2  # two frames, the cut inside a line
        return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))
    return data


@pytest.mark.parametrize("kind", ["txt", "gz", "zst"])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_only_newlines_end_lines(tmp_path, kind, end):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(pack(kind, RAW + end))
    assert list(read_lines(path)) == LINES


@pytest.mark.parametrize("kind", ["txt", "gz", "zst"])
def test_empty_and_blank_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(pack(kind, b""))
    assert list(read_lines(path)) == []
    path.write_bytes(pack(kind, b"\n\n"))
    assert list(read_lines(path)) == ["", ""]


@given(st.lists(st.text(st.sampled_from("ab\r\t\u2028\x85\x1c你😀 "), max_size=5)))
def test_as_many_lines_as_were_written(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines.zst"
    path.write_bytes(zstandard.compress("".join(f"{line}\n" for line in lines).encode()))
    assert list(read_lines(path)) == [line.removesuffix("\r") for line in lines]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(RAW)))
    assert list(read_lines("-")) == LINES
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\nbad \xff\n", r"a.txt, line 2 is not UTF-8 \(byte 5: 0xff\).*iconv"),
        ("a.txt", "x".encode("utf-16"), "a.txt, line 1 is UTF-16"),
        ("a.txt", None, "a.txt cannot be read.*No such file"),
        ("a.gz", b"no gzip", "a.gz cannot be read"),
        ("a.gz", pack("gz", RAW)[:-9], "a.gz cannot be read after line 5"),
        ("a.zst", b"no zstandard", "a.zst cannot be read.*no whole Zstandard"),
        ("a.zst", pack("zst", RAW)[:-3], "a.zst cannot be read after line .*truncated"),
    ],
)
def test_unreadable_files_name_file_and_line(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_lines(tmp_path / name))


def test_zst_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.zst").write_bytes(pack("zst", RAW))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="install zstandard"):
        list(read_lines(tmp_path / "a.zst"))


def test_pairs_of_a_table(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("hi\t你好\tlicence\r\n\nonly one\n\t\tc\nlast\t末".encode())
    expected = [(1, "hi", "你好"), (2, "", ""), (3, "only one", ""), (4, "", ""), (5, "last", "末")]
    assert list(read_pairs([path])) == expected
    assert next(read_pairs([path], (3, 1))) == (1, "licence", "hi")


def test_pairs_of_two_files(tmp_path):
    (tmp_path / "a").write_text("one\n\nthree\tx\n", encoding="utf-8")
    (tmp_path / "b").write_text("eins\n\u2028\ndrei", encoding="utf-8")
    pairs = list(read_pairs([tmp_path / "a", tmp_path / "b"]))
    assert pairs == [(1, "one", "eins"), (2, "", "\u2028"), (3, "three\tx", "drei")]


@pytest.mark.parametrize(("one", "other"), [(3, 5), (5, 3), (0, 2), (2, 0)])
def test_uneven_files_are_refused_with_both_counts(tmp_path, one, other):
    (tmp_path / "a").write_text("x\n" * one)
    (tmp_path / "b").write_text("y\n" * other)
    with pytest.raises(UserError, match=f"a has {one} lines and .*b {other}:"):
        list(read_pairs([tmp_path / "a", tmp_path / "b"]))


@pytest.mark.parametrize(
    ("inputs", "columns"),
    [([], (1, 2)), (["a", "b", "c"], (1, 2)), (["-", "-"], (1, 2)), (["a"], (0, 1)), (["a"], (1,))],
)
def test_bad_inputs_are_bad_usage(inputs, columns):
    with pytest.raises(UsageError):
        list(read_pairs(inputs, columns))


def test_every_listed_script_is_one():
    for langs in module._SCRIPTS.values():
        for lang in langs.split():
            assert script_share("\u4e00a", lang) in (0.0, 0.5)


def test_conversion_of_chinese_is_part_of_a_convention():
    """So it travels in checkpoints: a model trained on simplified text reads traditional text."""
    pytest.importorskip("opencc", reason="the extra opencc is not installed")
    assert normalise("漢語，書", "zh", "standard+t2s") == "汉语，书"
    assert normalise("漢語，書", "ja", "standard+t2s") == "漢語，書"
    assert normalise("汉语", "zh", "standard+s2t") == "漢語"
    with pytest.raises(UserError, match="no conversion 'x2y'"):
        normalise("漢語", "zh", "standard+x2y")
