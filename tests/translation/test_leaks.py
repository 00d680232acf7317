"""Planted valid and test lines are found; lines that only resemble them are not."""

import gzip
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import UserError
from fairseq_ext.translation.prepare.leaks import GRAM, SHORTEST, THRESHOLD, LeakGuard, ngram_hashes
from fairseq_ext.translation.prepare.report import count_reason

ENGLISH = [
    "Yes.",
    "The ferry to the island leaves twice a day in winter.",
    "Nobody had told the new teacher that the heating was broken.",
    "?!",
    "",
]
CHINESE = ["是。", "冬天每天有两班渡轮开往那座岛。", "没有人告诉新来的老师暖气坏了。"]


@pytest.fixture(scope="module")
def guard():
    return LeakGuard({"en": ENGLISH, "zh": CHINESE})


@pytest.mark.parametrize(
    ("lang", "line"),
    [
        ("en", "Yes."),
        ("en", "YES!"),
        ("en", " yes "),
        ("en", "？！"),
        ("en", "the ferry to the island leaves twice a day in winter"),
        ("en", "Ｔhe ferry to the island, leaves twice a day - in winter!!"),
        ("zh", "是！"),
        ("zh", "冬天 每天 有 两班 渡轮 开往 那座 岛"),
        ("zh", "没有人告诉新来的老师：暖气坏了！"),
    ],
)
def test_the_same_line_is_found(guard, lang, line):
    assert guard.find(line, lang) == "it is a line of valid or test"
    assert guard.find(line, lang, partial=False) is not None


@pytest.mark.parametrize(
    ("lang", "line"),
    [
        ("en", "He says: the ferry to the island leaves twice a day in winter, if at all."),
        ("en", "1. The ferry to the island leaves twice a day in winter"),
        ("en", "The ferry to the island leaves twice a day in summer."),
        ("en", "Ferry to the is\u200bland leaves twice a day in winter."),
        ("zh", "听说冬天每天有两班渡轮开往那座岛，夏天更多。"),
        ("zh", "冬天每天有两班渡轮开往那座山。"),
    ],
)
def test_nearly_all_of_a_line_inside_another_is_found(guard, lang, line):
    assert "of a line of valid or test" in guard.find(line, lang)
    assert guard.find(line, lang, partial=False) is None


@pytest.mark.parametrize(
    ("lang", "line"),
    [
        ("en", "Yes, I know."),
        ("en", "No."),
        ("en", "?"),
        ("en", ""),
        ("en", "The ferry to the island leaves twice."),
        ("en", "The ferry to the harbour leaves twice a week in winter."),
        ("en", "winter in day a twice leaves island the to ferry The"),
        ("en", "是。"),
        ("zh", "是的。"),
        ("zh", "冬天每天有两班飞机开往那座城。"),
        ("zh", "冬天每天有两班"),
        ("zh", "\u200b"),
    ],
)
def test_what_only_resembles_is_not_found(guard, lang, line):
    assert guard.find(line, lang) is None


def test_reason_has_the_figures(guard):
    line = "So the ferry to the island leaves twice a day in summer."
    # 11 words have 9 trigrams, the last word is part of one
    assert guard.find(line, "en") == (
        "it shares 8 of the 9 3-grams (words) of a line of valid or test"
    )


@given(st.integers(8, 40), st.data())
def test_threshold_is_the_closed_form(size, data):
    """One word changed at a place breaks as many n-grams as cover it."""
    words = [f"w{i}" for i in range(size)]
    place = data.draw(st.integers(0, size - 1))
    n, grams = GRAM["words"], size - GRAM["words"] + 1
    broken = min(place + 1, n, size - place, grams)
    changed = [*words[:place], "other", *words[place + 1 :]]
    found = LeakGuard({"en": [" ".join(words)]}).find(" ".join(changed), "en")
    assert (found is not None) == ((grams - broken) / grams >= THRESHOLD)


@pytest.mark.parametrize(("lang", "joint"), [("en", " "), ("zh", "")])
def test_shorter_lines_are_found_as_a_whole_only(lang, joint):
    size = SHORTEST["words" if lang == "en" else "characters"]
    units = [chr(0x4E00 + i) for i in range(size)]
    long, short = joint.join(units), joint.join(units[:-1])
    assert LeakGuard({lang: [long]}).find(f"外{joint}{long}", lang) is not None
    assert LeakGuard({lang: [short]}).find(f"外{joint}{short}", lang) is None
    assert LeakGuard({lang: [short]}).find(short, lang) is not None


def test_pair_is_looked_at_on_both_sides(guard):
    assert guard.find_pair({"en": "Yes!", "zh": "好。"}) == "en: it is a line of valid or test"
    assert guard.find_pair({"en": "Well.", "zh": "是"}) == "zh: it is a line of valid or test"
    assert guard.find_pair({"en": "Well.", "zh": "好。"}) is None


def test_planted_leaks_among_thousands():
    rng = random.Random(4)
    words = [f"word{i}" for i in range(2000)]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(3000)]
    held_out, training = lines[:300], [line for line in lines[300:] if line not in lines[:300]]
    guard = LeakGuard({"en": held_out})
    planted = {17: held_out[0].upper(), 400: held_out[7] + "!", 2000: f"well, {held_out[33]}"}
    planted[2000] += " " + " ".join(rng.choices(words, k=40))
    assert len(held_out[33].split()) >= SHORTEST["words"]
    for place, line in planted.items():
        training[place] = line
    assert [i for i, line in enumerate(training) if guard.find(line, "en")] == sorted(planted)


def test_from_files_of_both_splits(tmp_path):
    (tmp_path / "valid.en").write_text("one sentence\r\n\nsecond one", encoding="utf-8")
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"third one\n"))
    guard = LeakGuard.from_files({"en": [tmp_path / "valid.en", tmp_path / "test.en.gz"]})
    assert len(guard) == 3 and guard.languages == ("en",)
    assert all(guard.find(line, "en") for line in ("One sentence.", "Second one", "Third one"))
    assert guard.find("", "en") is None


def test_unknown_language_is_refused(guard):
    with pytest.raises(UserError, match="'fr'.*only en, zh"):
        guard.find("oui", "fr")


def test_no_held_out_lines():
    assert LeakGuard({"en": []}).find("A line of more than eight words, to be sure.", "en") is None


def test_pickled_guard_is_small_and_the_same():
    rng = random.Random(5)
    lines = [" ".join(rng.choices(ENGLISH[1].split(), k=20)) + f" {i}" for i in range(2000)]
    guard = LeakGuard({"en": lines})
    data = pickle.dumps(guard)
    # 17 n-grams of 12 bytes, and up to 27 bytes for the line itself
    assert len(data) < 2000 * (19 * 12 + 27 + 4) + 20_000
    assert lines[0].encode() not in data
    copy = pickle.loads(data)
    for line in (lines[5], f"and {lines[6]}", "something else altogether, quite different from it"):
        assert copy.find(line, "en") == guard.find(line, "en")


@given(st.lists(st.integers(0, 3), min_size=3, max_size=20), st.integers(1, 3))
def test_ngram_hashes_are_equal_where_ngrams_are(values, n):
    hashes = ngram_hashes(np.array(values, dtype=np.uint64), n)
    grams = [tuple(values[i : i + n]) for i in range(len(values) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(hashes.tolist())) == len(set(grams))
    assert [hashes.tolist().index(h) for h in hashes.tolist()] == [grams.index(g) for g in grams]


@given(st.text(max_size=40))
def test_any_line_gets_an_answer(line):
    guard = LeakGuard({"zh": [line], "en": [line]})
    for lang in guard.languages:
        assert guard.find("", lang) is None
        assert (guard.find(line, lang) is None) == (len(guard) == 0)


def test_reasons_are_counted_without_their_numbers():
    counts = Counter()
    for reason in ("shares 8 of the 13 13-grams", "shares 1,024 of the 9.5 13-grams", "x 3-2"):
        count_reason(counts, reason)
    assert counts == {"shares … of the … 13-grams": 2, "x 3-…": 1}
    for number in range(200):
        count_reason(counts, "a" * number)
    assert len(counts) == 101 and sum(counts.values()) == 203
