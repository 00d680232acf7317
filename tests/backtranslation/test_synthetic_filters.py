"""What filters say of pairs whose source a model wrote."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import OptionError, UsageError, UserError
from fairseq_ext.backtranslation.assemble.filters import (
    DEFAULT_SYNTHETIC_FILTERS,
    Context,
    RoundTrip,
)
from fairseq_ext.backtranslation.assemble.synthetic import (
    GAP,
    SourceEncoder,
    clean_synthetic,
    split_fillers,
    with_gaps,
    without_gaps,
)
from fairseq_ext.backtranslation.modes import FILLER
from fairseq_ext.translation.prepare.filter_chain import FILTERS, FilterChain
from fairseq_ext.translation.text.normalise import length, normalise
from fairseq_ext.translation.text.spm import UNK

from .test_guards import toy_pairs


def build(name, options=None, languages=("en", "zh")):
    return FILTERS.build(name, languages, options=options)


# --- leftovers ----------------------------------------------------------------------------------

LEFT = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "▁like",
    "app@@ les",
    ">>cmn_Hans<<",
    ">>zh<<",
    "<0xE2>",
    "a �",
]


@pytest.mark.parametrize("text", LEFT)
def test_what_models_leave_is_found(text):
    one = build("leftovers")
    assert "was left in the source" in one(f"I {text} it.", "我喜欢。")
    assert "was left in the source" in one(text, "我喜欢。")


@pytest.mark.parametrize(
    "text",
    [
        "I like it.",
        "me@@example.org",
        "a > b >> c << d",
        "x <b> y",
        "1 < 2",
        FILLER,
        "@ 5 pm",
        "snake_case",
    ],
)
def test_ordinary_text_is_none(text):
    assert build("leftovers")(text, "我喜欢。") is None


def test_what_the_real_side_says_too_is_text():
    one = build("leftovers")
    assert one("Use the <s> tag.", "用<s>标签。") is None
    assert one("Use the <s> tag. </s>", "用<s>标签。") == "</s> was left in the source"


def test_symbols_of_the_vocabulary_and_ones_own():
    one = build("leftovers", "more=[SEP]")
    assert one("<BT> I like it.", "我") is None
    one.setup(Context(symbols=("<BT>", "<new>", FILLER)))
    assert one("<BT> I like it.", "我") == "<BT> was left in the source"
    assert one("I <new> it.", "我") and one("I [SEP] it.", "我")
    assert one(f"I {FILLER} it.", "我") is None


# --- lengths ------------------------------------------------------------------------------------


def bitext(count, seed=1):
    """Sources of 5 to 40 words, targets of 1.2 to 2.0 characters for each."""
    rng = random.Random(seed)
    sizes = [rng.randrange(5, 41) for _ in range(count)]
    return [(sentence(n), characters(round(n * rng.uniform(1.2, 2.0)))) for n in sizes]


def sentence(words):
    """Different words, so that nothing is a loop."""
    return " ".join(chr(97 + n // 26) + chr(97 + n % 26) for n in range(words))


def characters(count):
    return "".join(chr(0x4E00 + n) for n in range(count))


@given(st.integers(1, 60), st.integers(1, 200))
def test_ratio_limits_are_the_quantiles_of_the_bitext(words, characters):
    one, pairs = build("ratio_quantile", "low=0.05,high=0.9,slack=3"), bitext(500)
    one.fit(pairs)
    ratios = np.array([len(t) / len(s.split()) for s, t in pairs])
    low, high = np.quantile(ratios, [0.05, 0.9])
    kept = low * words - 3 <= characters <= high * words + 3
    assert (one(sentence(words), "字" * characters) is None) == kept


def test_ratio_counts_the_slack_in_the_finer_unit_both_ways():
    """A synthetic side of characters: the mirror image has the mirrored verdict."""
    forward, backward = build("ratio_quantile"), build("ratio_quantile", None, ("zh", "en"))
    pairs = bitext(2000)
    forward.fit(pairs)
    backward.fit([(t, s) for s, t in pairs])
    verdicts = set()
    for words in (1, 2, 5, 10, 30):
        for characters in range(1, 90):
            pair = sentence(words), "字" * characters
            verdict = forward(*pair) is None
            edge = min(
                abs(forward.limits[0] * words - 5 - characters),
                abs(forward.limits[1] * words + 5 - characters),
            )
            if edge > 1:
                assert (backward(*pair[::-1]) is None) == verdict
                verdicts.add(verdict)
    assert verdicts == {True, False}


def test_small_bitexts_say_nothing_about_ratios():
    one = build("ratio_quantile")
    assert one("a", "字" * 99) is None
    one.fit(bitext(99))
    assert one("a", "字" * 99) is None
    one.fit(bitext(100))
    assert one("a", "字" * 99) is not None
    # pairs of fewer than 5 units on a side are not counted
    one.fit([("a b c d", "字" * 7)] * 5000 + bitext(99))
    assert one("a", "字" * 99) is None


@pytest.mark.parametrize("options", ["low=0.9,high=0.1", "low=-1", "high=1.5"])
def test_quantiles_that_are_none(options):
    with pytest.raises(OptionError):
        build("ratio_quantile", options)


# --- scores -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=200), st.floats(0, 0.99))
def test_at_most_the_worst_part_goes(scores, q):
    one = build("score_quantile", {"q": q})
    one.fit_scores(scores)
    kept = [score for score in scores if one("a", "b", score) is None]
    gone = [score for score in scores if one("a", "b", score) is not None]
    assert len(gone) <= q * len(scores)
    assert not gone or max(gone) < min(kept)
    if len(set(scores)) == len(scores):
        assert len(gone) == math.floor(q * len(scores))


def test_pairs_without_score_stay_and_so_do_all_before_a_fit():
    one = build("score_quantile", "q=0.5")
    assert one("a", "b", -99.0) is None
    one.fit_scores([-3.0, -2.0, -1.0])
    assert one("a", "b", None) is None and one("a", "b") is None
    assert one("a", "b", -3.0).startswith("score -3.000 is among the worst 50.0%")
    one.fit_scores([])
    assert one("a", "b", -3.0) is None


def test_chain_hands_the_score_on_to_who_wants_it():
    chain = FilterChain("empty; score_quantile:q=0.5", "en", "zh")
    chain.fit(toy_pairs(20))
    chain.filters["score_quantile"].fit_scores([-2.0, -1.0])
    assert chain("a", "甲", -1.0) is None and chain("a", "甲") is None
    assert chain.judge("a", "甲", -2.0)[0] == "score_quantile"
    assert chain("", "甲", -2.0).startswith("empty")
    assert chain.counts == {"empty": 1, "score_quantile": 1} and chain.kept == 2


# --- repetitions --------------------------------------------------------------------------------


def test_loops_on_one_side_are_found_by_repetition():
    one = build("repetition")
    assert one("the " * 9 + "cat", "那只猫很可爱。") is not None
    assert one("I like it very " + "very " * 30, "我非常喜欢它。") is not None
    assert one("I like red apples.", "我喜欢红苹果。") is None


def test_a_target_stays_so_many_times():
    one = build("repeated_target", "max=2")
    assert [one(f"t{n}", "谢谢。") is None for n in range(4)] == [True, True, False, False]
    assert one("thank you", "谢谢！") == "the same target occurred 2 times before"
    assert one("thank you", "不谢。") is None


# --- round trip ---------------------------------------------------------------------------------


class Parrot:
    """Stands for a Translator."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def __call__(self, lines, beam):
        self.asked += lines
        return [self.answers[line] for line in lines]


def test_round_trip_is_chrf_against_the_target():
    from sacrebleu import sentence_chrf

    answers = {
        "a": "我喜欢红的苹果。",
        "b": "我喜欢绿的苹果。",
        "c": "下雨了",
        "d": "",
        "e": "苹果",
    }
    real = "我喜欢红的苹果。"
    one = build("round_trip", "min=30")
    one.translator = Parrot(answers)
    scores = [sentence_chrf(back, [real]).score for back in answers.values()]
    assert scores[0] == pytest.approx(100) and min(scores) == 0 and 30 < scores[1] < 100
    found = one.judge_many([(source, real) for source in answers])
    assert [reason is None for reason in found] == [score >= 30 for score in scores]
    assert found[2] == "chrF 0.0 of the way back: 下雨了"
    assert one("a", real) is None


def test_round_trip_does_not_translate_gaps():
    one = build("round_trip")
    one.translator = Parrot({"I apples .": "我"})
    assert one(f"I {GAP} apples {GAP} .", "我") is None


def test_round_trip_needs_a_model():
    one = build("round_trip")
    with pytest.raises(UsageError, match="give --forward"):
        one.setup(Context())
    with pytest.raises(UserError, match="none.pt"):
        one.setup(Context(forward="none.pt"))
    with pytest.raises(UsageError, match="use it in assemble"):
        one("a", "b")


def test_round_trip_refuses_a_model_of_the_other_direction(monkeypatch):
    from types import SimpleNamespace

    from fairseq_ext.translation.decode.translator import Translator

    model = SimpleNamespace(vocabulary=SimpleNamespace(source_lang="zh", target_lang="en"))
    monkeypatch.setattr(Translator, "from_checkpoint", lambda *_, **__: model)
    with pytest.raises(UserError, match="translates zh to en, the round trip needs en to zh"):
        build("round_trip").setup(Context(forward="x.pt"))
    assert RoundTrip.stateful  # a chain must not run it on the sample of the bitext


# --- fillers ------------------------------------------------------------------------------------


def test_fillers_are_whole_words():
    assert split_fillers(f"a {FILLER} b c {FILLER}") == ["a", None, "b c", None]
    assert split_fillers(f"a{FILLER} b") == [f"a{FILLER} b"]
    assert split_fillers(f"{FILLER}  {FILLER}") == [None, None]
    assert split_fillers("") == []


@given(
    st.lists(
        st.sampled_from([FILLER, "a", "I like", "鱼", "<BT>", "（x", "BLANK", "."]), max_size=9
    )
)
def test_fillers_stay_what_they_are(words):
    text = " ".join(words)
    cleaned = clean_synthetic(text, "en", "standard", True)
    assert cleaned.split().count(FILLER) == words.count(FILLER)
    assert clean_synthetic(cleaned, "en", "standard", True) == cleaned
    gaps = with_gaps(cleaned)
    assert FILLER not in gaps and gaps.count(GAP) == words.count(FILLER)
    assert GAP not in without_gaps(gaps)
    assert without_gaps(gaps) == " ".join(word for word in words if word != FILLER)


def test_fillers_outlive_a_convention_that_folds_case(monkeypatch):
    from fairseq_ext.translation.text.normalise import CONVENTIONS

    monkeypatch.setitem(CONVENTIONS._entries, "lower", lambda text, lang: text.lower())
    assert clean_synthetic(f"I {FILLER} IT", "en", "lower", True) == f"i {FILLER} it"
    assert clean_synthetic(f"I {FILLER} IT", "en", "lower", False) == "i <blank> it"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_gap_is_one_unit_and_no_letter(lang):
    assert length(GAP, lang) == 1
    assert not GAP.isalpha() and normalise(GAP, lang) == GAP


def test_script_and_lengths_of_noised_chinese():
    """6 of 12 characters blanked: FILLER itself would be 42 Latin letters."""
    noised = with_gaps(f" {FILLER} ".join("我也喜欢他们") + f" {FILLER}")
    chain = FilterChain(DEFAULT_SYNTHETIC_FILTERS, "zh", "en")
    real = "I like them and you do too"
    assert chain(noised, real) is None
    assert FilterChain("script", "zh", "en")(" ".join([FILLER] * 6), real) is not None
    assert "only the source has no letter" in chain(with_gaps(f"{FILLER} {FILLER}"), real)


def test_encoder_writes_unk_for_fillers_alone():
    class Words:
        """A vocabulary of whole words."""

        def encode(self, text):
            return [100 + len(word) for word in text.split()]

    text = f"{FILLER} I like{FILLER} {FILLER} fish"
    assert SourceEncoder(Words(), None, True)(text) == [UNK, 101, 111, UNK, 104]
    assert SourceEncoder(Words(), 9, True)(text) == [9, UNK, 101, 111, UNK, 104]
    assert UNK not in SourceEncoder(Words(), 9, False)(text)


# --- the whole chain ----------------------------------------------------------------------------


def test_good_synthetic_pairs_stay_by_default():
    chain = FilterChain(DEFAULT_SYNTHETIC_FILTERS, "en", "zh")
    chain.fit(toy_pairs(300))
    assert [pair for pair in toy_pairs(200, seed=5) if chain(*pair)] == []


def test_each_default_filter_has_something_to_find():
    chain = FilterChain(DEFAULT_SYNTHETIC_FILTERS, "en", "zh")
    chain.fit(bitext(300))
    bad = {
        "empty": ("...", "我喜欢苹果。"),
        "leftovers": ("I <unk> apples.", "我喜欢苹果。"),
        "length": (sentence(201), characters(320)),
        "script": ("我喜欢苹果。", "我喜欢苹果。"),
        "identical": ("OK", "OK"),
        "repetition": ("ab cd " * 6, "字字典里的话不多呀"),
        "length_ratio": (sentence(40), "只有这几个字呀"),
        "ratio_quantile": (sentence(20), characters(50)),
        "duplicate": ("I like it.", "我喜欢。"),
    }
    chain("I like it.", "我喜欢。")
    found = {name: (chain.judge(*pair) or ("kept",))[0] for name, pair in bad.items()}
    found.pop("identical")  # in these scripts the filter before it is quicker
    assert found == {name: name for name in found}
    assert FilterChain("identical", "en", "zh")(*bad["identical"]) is not None
