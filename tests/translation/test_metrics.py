"""Sums over batches give sacreBLEU's own corpus scores."""

import random

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.translation.score.metrics import (
    BLEU_KEYS,
    CHRF_KEYS,
    CorpusScorer,
    bleu,
    chrf,
    report,
    statistics,
    tokenizer_for,
)

WORDS = "the cat sat on a mat . 我 爱 你 们 。 猫 狗 ! it's 3.5 don't café 😀".split()


def corpus(seed, lines, separator=" "):
    draw = random.Random(seed)
    reference = [separator.join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(lines)]
    hypothesis = [
        separator.join(draw.choices(WORDS, k=draw.randint(0, 3))) + line[draw.randint(0, 5) :]
        for line in reference
    ]
    return hypothesis, reference


def summed(hypothesis, reference, lang, cuts):
    edges = [0, *sorted(c % (len(reference) + 1) for c in cuts), len(reference)]
    total = dict.fromkeys(BLEU_KEYS + CHRF_KEYS, 0.0)
    for start, end in zip(edges, edges[1:], strict=False):
        for key, value in statistics(hypothesis[start:end], reference[start:end], lang).items():
            assert type(value) is float, "what is logged goes into a checkpoint"
            total[key] += value
    return total


@pytest.mark.parametrize("lang", ["en", "zh", "th"])
@given(
    seed=st.integers(0, 999),
    lines=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 99), max_size=6),
)
def test_sums_over_any_batches_equal_the_corpus_score(lang, seed, lines, cuts):
    hypothesis, reference = corpus(seed, lines, "" if lang == "zh" else " ")
    sums = summed(hypothesis, reference, lang, cuts)
    expected = sacrebleu.corpus_bleu(hypothesis, [reference], tokenize=tokenizer_for(lang))
    assert bleu(sums, lang) == pytest.approx(expected.score, abs=1e-12)
    assert chrf(sums) == pytest.approx(
        sacrebleu.corpus_chrf(hypothesis, [reference]).score, abs=1e-12
    )


def test_identical_text_scores_100_and_nothing_scores_0():
    lines = ["我爱你们的猫。", "他看见了一只狗！"]
    sums = statistics(lines, lines, "zh")
    assert bleu(sums, "zh") == pytest.approx(100) and chrf(sums) == pytest.approx(100)
    nothing = statistics([], [], "zh")
    assert bleu(nothing, "zh") == 0.0 == chrf(nothing)
    empty = statistics(["", ""], lines, "zh")
    assert bleu(empty, "zh") == 0.0 == chrf(empty)


def test_chinese_needs_its_tokenizer():
    """Seen as words between spaces, a Chinese sentence with one wrong character is all wrong."""
    hypothesis, reference = ["我今天去学校看书。"], ["我今天去学校读书。"]
    by_hand = 100 * (8 / 9 * 6 / 8 * 4 / 7 * 3 / 6) ** (1 / 4)
    assert bleu(statistics(hypothesis, reference, "zh"), "zh") == pytest.approx(by_hand)
    assert bleu(statistics(hypothesis, reference, "en"), "en") < 1


@pytest.mark.parametrize(
    "lang, expected",
    [("zh", "zh"), ("zh-Hant", "zh"), ("zh_CN", "zh"), ("cmn", "zh"), ("yue", "zh")]
    + [("en", "13a"), ("de", "13a"), ("xx", "13a"), ("th", "char"), ("km", "char")],
)
def test_tokenizer_follows_the_language(lang, expected):
    assert tokenizer_for(lang) == expected


@pytest.mark.parametrize("lang, mecab", [("ja", "ja-mecab"), ("ko", "ko-mecab")])
def test_mecab_only_where_it_is_installed(lang, mecab, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokenizer_for(lang) == "char"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert tokenizer_for(lang) == mecab


def test_report_names_the_tokenizer_in_its_signature():
    hypothesis, reference = corpus(1, 9)
    line = report(hypothesis, reference, "zh")
    assert "tok:zh" in line and "chrF2" in line and "version:" in line and "\n" not in line
    scorer = CorpusScorer("zh")
    for h, r in zip(hypothesis, reference, strict=True):
        scorer.add_string(r, h)
    assert scorer.result_string() == line
    expected = sacrebleu.corpus_bleu(hypothesis, [reference], tokenize="zh").score
    assert scorer.score() == pytest.approx(expected)
