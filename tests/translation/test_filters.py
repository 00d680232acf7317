"""Good pairs stay, bad ones go with a reason, for Chinese as for English."""

import os
import pickle
import random
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import OptionError, UserError
from ext_common.registry import UnknownName
from fairseq_ext.translation.prepare.filter_chain import (
    DEFAULT_FILTERS,
    FILTERS,
    FilterChain,
    parse_filters,
    sample,
)
from fairseq_ext.translation.prepare.filters import longest_loop
from fairseq_ext.translation.prepare.hashes import HashSet, key_hash, text_hash
from fairseq_ext.translation.text.normalise import length, normalise, read_pairs
from tests import processes

ALIGNED = [
    ("Stop!", "站住！"),
    ("Congratulations!", "恭喜恭喜！"),
    ("Okay.", "好。"),
    ("Good morning.", "早上好。"),
    ("He smokes.", "他抽烟。"),
    ("Where's Tom?", "汤姆在哪儿？"),
    ("It is 7:30.", "现在是七点半。"),
    ("Ha ha ha ha ha!", "哈哈哈哈哈！"),
    ("No, no, no, no, no!", "不，不，不，不，不！"),
    ("I forgot to buy milk.", "我忘了买牛奶。"),
    ("My phone died last night.", "我的手机昨晚没电了。"),
    ("The train to Nanjing leaves at six.", "开往南京的火车六点发车。"),
    ("NASA and ESA launched Solar Orbiter in 2020.", "NASA和ESA在2020年发射了Solar Orbiter。"),
    ("She has played the violin since she was five.", "她从五岁起就拉小提琴。"),
    (
        "If it rains tomorrow, we will stay at home and play cards.",
        "如果明天下雨，我们就待在家里打牌。",
    ),
    (
        "The museum opens at nine, but the line in front of it is already long by eight.",
        "博物馆九点开门，可是八点钟门口就已经排起了长队。",
    ),
    (
        "My grandmother taught me how to make dumplings when I was so small that I had to stand on a "
        "chair.",
        "外婆教我包饺子的时候，我还小得要站在椅子上才够得着。",
    ),
    (
        "Before you sign the contract, read every page carefully, because the price that is written "
        "in large letters on the first page does not include the fees.",
        "签合同之前请仔细阅读每一页，因为第一页上用大字写的价格并不包括各种手续费。",
    ),
    (
        "Although the bridge had been closed for repairs since the spring, the villagers kept using it "
        "at night, since the only other way to the market on the far side of the river took more than "
        "two hours on foot.",
        "虽然那座桥从春天起就因维修而封闭，村民们夜里还是照走不误，因为去河对岸集市的另一条路要步行两个多小时。",
    ),
    (
        "When the engineers finally opened the old machine, they found that most of its parts had been "
        "replaced over the years by different people who had never met each other, so that nobody "
        "could say any longer which of the many drawings in the archive, if any, still described the "
        "thing that was standing in front of them and humming quietly.",
        "工程师们终于打开那台旧机器时，发现多年来它的大部分零件已被素未谋面的不同的人更换过，"
        "以至于再也没有人说得清，档案里那么多图纸之中，究竟还有没有哪一张描述的是眼前这台轻声嗡嗡作响的东西。",
    ),
]


def chain(spec=DEFAULT_FILTERS, languages=("en", "zh")):
    return FilterChain(spec, *languages)


def spaced(chinese):
    """As text comes out of a tokeniser that splits characters, but not Latin words."""
    return " ".join(re.sub(r"([^\x00-\x7f])", r" \1 ", chinese).split())


@pytest.mark.parametrize("pair", ALIGNED, ids=lambda pair: f"{length(pair[0], 'en')}-words")
def test_aligned_pairs_stay(pair):
    english, chinese = normalise(pair[0], "en"), normalise(pair[1], "zh")
    assert chain()(english, chinese) is None
    assert chain()(english, spaced(chinese)) is None
    assert chain(languages=("zh", "en"))(chinese, english) is None
    assert chain(languages=("zh-Hans", "en_GB"))(spaced(chinese), english) is None


def test_aligned_pairs_span_1_to_60_words():
    counts = [length(english, "en") for english, _ in ALIGNED]
    assert min(counts) == 1 and max(counts) >= 60
    assert len({*counts}) >= 12


LONG = [pair for pair in ALIGNED if length(pair[0], "en") >= 13]


@pytest.mark.parametrize("pair", LONG, ids=lambda pair: f"{length(pair[0], 'en')}-words")
@pytest.mark.parametrize("write", [str, spaced])
def test_three_times_the_length_goes(pair, write):
    english, chinese = pair
    ratio = chain("length_ratio")
    assert "characters, expected are 1.50" in ratio(english, write(chinese * 3))
    assert ratio(" ".join([english] * 3), write(chinese)) is not None
    backwards = chain("length_ratio", ("zh", "en"))
    assert backwards(write(chinese * 3), english) is not None
    assert backwards(write(chinese), " ".join([english] * 3)) is not None


def test_there_are_long_pairs():
    assert len(LONG) >= 5


@given(
    st.integers(1, 80),
    st.integers(1, 160),
    st.sampled_from([0.5, 1.0, 1.5, 2.4]),
)
def test_length_ratio_is_the_closed_form_and_symmetric(words, characters, ratio):
    pair = " ".join("w" * words), "字" * characters
    verdict = chain(f"length_ratio:ratio={ratio},factor=2,slack=5")(*pair)
    finer = max(ratio, 1)
    long, short = (
        max(words * finer, characters * finer / ratio),
        min(words * finer, characters * finer / ratio),
    )
    assert (verdict is not None) == (long > 2 * short + 5)
    mirrored = chain(f"length_ratio:ratio={1 / ratio},factor=2,slack=5", ("zh", "en"))(*pair[::-1])
    assert (verdict is None) == (mirrored is None)


def test_length_ratio_is_calibrated_on_the_pairs():
    rng = random.Random(2)
    counts = [rng.randint(5, 30) for _ in range(200)]
    pairs = [("字" * n, "字" * (3 * n)) for n in counts] + [("字" * 9, "字")] * 80
    ratio = chain("length_ratio", ("zh", "ja"))
    assert ratio("字" * 20, "字" * 60) is not None
    ratio.fit(pairs)
    assert ratio("字" * 20, "字" * 60) is None
    assert "20 characters and 20 characters, expected are 3.00" in ratio("字" * 20, "字" * 20)
    few = chain("length_ratio", ("zh", "ja"))
    few.fit(pairs[:99])
    assert few("字" * 20, "字" * 60) is not None
    given_ratio = chain("length_ratio:ratio=1", ("zh", "ja"))
    given_ratio.fit(pairs)
    assert given_ratio("字" * 20, "字" * 60) is not None


def test_calibration_does_not_see_what_earlier_filters_remove():
    good = [(" ".join("w" * 10), "字" * 15)] * 150
    rubbish = [(" ".join("w" * 10), "я" * 90)] * 200
    with_script = chain("script; length_ratio")
    with_script.fit(good + rubbish)
    without = chain("length_ratio")
    without.fit(good + rubbish)
    assert with_script.filters["length_ratio"].ratio == 1.5
    assert without.filters["length_ratio"].ratio == 9


def test_calibration_is_not_an_occurrence():
    filters = chain("duplicate; near_duplicate; length_ratio")
    filters.fit(ALIGNED)
    assert all(filters(*pair) is None for pair in ALIGNED)
    assert filters.kept == len(ALIGNED)


@pytest.mark.parametrize(
    ("name", "source", "target", "reason"),
    [
        ("empty", "", "你好", "the source is empty"),
        ("empty", "Hello", " ", "the target is empty"),
        ("empty", "...", "你好", "only the source has no letter or number"),
        ("length", " ".join("w" * 201), "字" * 300, "201 words, allowed are 1 to 200"),
        ("length", "w " * 200, "字" * 501, "501 characters, allowed are 1 to 500"),
        ("length", "x" * 101, "字" * 9, "a word of 101 characters in the source, over 100"),
        (
            "script",
            "你好吗",
            "Hello there",
            "0% of 3 letters of the source are of en: the sides may be",
        ),
        ("script", "Hello there", "Hallo zusammen", "0% of 2 letters of the target are of zh"),
        ("script", "Hello there", "こんにちは、元気ですか", "of the target are of zh"),
        ("script", "Привет, как дела", "你好", "of the source are of en"),
        ("identical", "Rock 'n' Roll!", "rock'n'roll", "the same 9 letters and digits"),
        (
            "repetition",
            "I like it",
            "我喜欢我喜欢我喜欢我喜欢我喜欢",
            "3 characters 5 times in a row",
        ),
        ("repetition", "the the the the the the cat", "那只猫", "1 words 6 times in a row, of 7"),
        ("repetition", "We go to the, to the, to the, to the, to the", "我们去", "2 words 5 times"),
        ("length_ratio", " ".join("w" * 12), "字" * 60, "12 words and 60 characters"),
    ],
)
def test_bad_pairs_go_with_figures(name, source, target, reason):
    assert reason in chain(name)(source, target)
    assert chain()(source, target) is not None


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("empty", "?!", "？！"),
        ("empty", "1", "一"),
        ("length", " ".join("w" * 200), "字" * 500),
        ("length", f"https://example.org/{'x' * 70}", "字"),
        ("script", "1984", "1984"),
        ("script", "He types 你好 well.", "他打“你好”打得很好。"),
        ("script", "I like my iPhone.", "喜欢iPhone。"),
        ("script", "DVD", "DVD光盘"),
        ("identical", "1984.", "1984。"),
        ("identical", "?", "？"),
        ("repetition", "She said that that that is wrong", "她说那个“那”字错了"),
        ("repetition", "Very, very, very, very, very good", "非常非常非常非常非常好"),
        ("repetition", "10 000 000 000 000 000", "一亿亿"),
        ("repetition", "Wait......", "等等……………………"),
        ("length_ratio", "Hi.", "你好啊！"),
        ("length_ratio", "Call 0800555777 now.", "请立即拨打0800555777。"),
        ("length_ratio", "It is a privilege to meet you.", "幸会。"),
    ],
)
def test_unusual_but_good_pairs_stay(name, source, target):
    assert chain(name)(source, target) is None


def test_identical_keeps_short_names_on_request():
    assert chain("identical", ("de", "en"))("Hotel", "hotel") is not None
    assert chain("identical:keep=5", ("de", "en"))("Hotel", "hotel") is None
    assert chain("identical:keep=5", ("de", "en"))("Hotels", "hotels") is not None


def test_japanese_and_unknown_languages_have_their_scripts():
    assert chain("script", ("en", "ja"))("Coffee, please.", "コーヒーをください。") is None
    assert chain("script", ("tlh", "zh"))("qaStaH nuq", "怎么了") is None


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_longest_loop_against_all_possible_ones(units, period, longest):
    units = units + units[-period:] * 3
    best = 1
    for p in range(1, min(longest, len(units) // 2) + 1):
        for start in range(len(units)):
            times = 1
            while units[start + times * p : start + (times + 1) * p] == units[start : start + p]:
                times += 1
            best = max(best, times)
    assert longest_loop(units, 0.0, longest)[0] == best


def test_a_loop_has_to_be_most_of_its_side():
    assert longest_loop(list("xyzzzzz"), 0.7) == (5, 1)
    assert longest_loop(list("vwxyzzzzz"), 0.7) == (1, 0)
    assert longest_loop([], 0.5) == (1, 0)


def test_duplicates_keep_the_first_and_count_apart():
    filters = chain("duplicate; near_duplicate")
    pairs = [
        ("Go on.", "继续。"),
        ("Go on.", "继续。"),
        ("go on!", "继续！"),
        ("Go on.", "走吧。"),
        ("Continue.", "继续。"),
        ("Go", "on继续"),
    ]
    verdicts = [filters(*pair) for pair in pairs]
    assert [v and v.split(":")[0] for v in verdicts] == [
        None,
        "duplicate",
        "near_duplicate",
        None,
        None,
        None,
    ]
    assert filters.kept == 4
    assert filters.counts == {"duplicate": 1, "near_duplicate": 1}


def test_a_pair_counts_under_the_first_filter_that_removes_it():
    filters = chain()
    assert filters.judge("", "你好") == ("empty", "the source is empty")
    assert filters("Hello", "") == "empty: the target is empty"
    assert filters("Hello.", "你好。") is None
    assert (filters.kept, filters.counts["empty"], sum(filters.counts.values())) == (1, 2, 2)
    filters.reset()
    assert (filters.kept, sum(filters.counts.values())) == (0, 0)
    assert filters("Hello.", "你好。").startswith("duplicate")


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_gets_a_verdict(source, target):
    filters = chain()
    reason = filters(source, target)
    assert filters.kept + sum(filters.counts.values()) == 1
    assert (reason is None) == (filters.kept == 1)
    assert reason is None or "\n" not in reason


def test_spec_with_options():
    assert parse_filters("empty; length:min=2,max=9 ;script") == [
        ("empty", ""),
        ("length", "min=2,max=9"),
        ("script", ""),
    ]
    assert list(chain("none").filters) == []
    assert chain("none")("", "") is None
    assert "1 words, allowed are 2 to 9" in chain("length:min=2,max=9")("a", "你好")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("empty; lenght", UnknownName, "length"),
        ("length:maxx=3", OptionError, "maxx"),
        ("length:max=many", OptionError, "max"),
        ("length_ratio:factor=0.5", OptionError, "factor must be at least 1"),
        ("empty;;script", OptionError, "a filter without a name"),
        ("", OptionError, "a filter without a name"),
        ("empty; empty", OptionError, "twice"),
    ],
)
def test_bad_specs_are_refused_in_words(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        chain(spec)
    assert isinstance(caught.value, UserError)


def test_every_filter_explains_itself():
    assert set(FILTERS.names()) >= {part.strip() for part in DEFAULT_FILTERS.split(";")}
    for line in FILTERS.describe().splitlines():
        assert ": " in line


def test_a_chain_travels_to_a_worker_with_its_state():
    filters = chain()
    filters("Hello.", "你好。")
    copy = pickle.loads(pickle.dumps(filters))
    assert copy("Hello.", "你好。").startswith("duplicate")
    assert copy.kept == 1


PLUGIN = """
from dataclasses import dataclass, field
from fairseq_ext.translation.prepare.filter_chain import FILTERS

@dataclass
class Options:
    word: str = field(default="http", metadata={"help": "what must not occur"})

@FILTERS.register("no_word", options=Options)
class NoWord:
    '''Pairs with a word.'''
    def __init__(self, languages, word):
        self.word = word
    def __call__(self, source, target):
        return f"has {self.word}" if self.word in source + target else None
"""
USE = """
import argparse, sys
from fairseq.utils import import_user_module
from fairseq_ext.translation.prepare.filter_chain import FilterChain
import_user_module(argparse.Namespace(user_dir=sys.argv[1]))
chain = FilterChain("empty; no_word:word=www", "en", "zh")
print(chain("see www.a.org", "看这里"), chain("see http here", "看这里"), chain.counts["no_word"])
"""


@pytest.mark.slow
def test_someones_own_filter_comes_with_their_user_dir(tmp_path, repo_root):
    folder = tmp_path / "my_filters"
    folder.mkdir()
    (folder / "__init__.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    done = processes.run(
        [sys.executable, "-c", USE, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no_word: has www None 1"


def test_sample_is_uniform_seeded_and_whole_when_short():
    pairs = [(str(i), str(i)) for i in range(100)]
    assert sample(iter(pairs[:7]), 7) == pairs[:7]
    assert sample(pairs, 10, seed=3) == sample(pairs, 10, seed=3)
    assert len(set(sample(pairs, 10))) == 10
    drawn = [0] * 100
    for seed in range(2000):
        for one, _ in sample(pairs, 10, seed):
            drawn[int(one)] += 1
    # 200 expected each, standard deviation 13.4
    assert all(140 < count < 260 for count in drawn)


def test_hash_set_is_a_set():
    rng = random.Random(1)
    values = [rng.randrange(1, 2**64) for _ in range(3000)] + list(range(1, 2000)) + [2**64 - 1]
    rng.shuffle(values)
    ours, plain = HashSet(), set()
    for value in values + values[:500]:
        assert ours.add(value) == (value not in plain)
        plain.add(value)
    assert len(ours) == len(plain)
    assert all(value in ours for value in plain)
    assert not any(value in ours for value in range(2000, 4000))
    copy = pickle.loads(pickle.dumps(ours))
    assert len(copy) == len(plain) and values[0] in copy


def test_a_million_hashes_stay_small():
    slots = HashSet(range(1, 200_001))._slots
    # At most 8 bytes / 0.3: between growing at 60 % and having doubled.
    assert len(slots) * slots.itemsize < 200_000 * 27


def test_hashes_are_fixed_for_ever():
    """They are in published split hashes: a change breaks every corpus that was prepared."""
    assert text_hash("helloworld") == 0x5E644672268C4E6A
    assert text_hash("你好") == 0xDCCE8C2E765A1C55
    assert key_hash("Hello, World!") == text_hash("helloworld")
    assert key_hash(" 你好。") == text_hash("你好")


@pytest.mark.slow
def test_real_pairs_survive(shared_data):
    """At most 2 % of Tatoeba goes, duplicates apart; the issue's own corpus."""
    path = shared_data / "cmn-eng" / "cmn.txt"
    if not path.is_file():
        pytest.skip(f"no bitext at {path}")
    pairs = [(normalise(s, "en"), normalise(t, "zh")) for _, s, t in read_pairs([path])]
    filters = chain()
    filters.fit(sample(pairs))
    for pair in pairs:
        filters(*pair)
    repeated = filters.counts["duplicate"] + filters.counts["near_duplicate"]
    removed = len(pairs) - filters.kept - repeated
    assert filters.filters["length_ratio"].ratio == pytest.approx(1.5, abs=0.1)
    assert removed < 0.001 * len(pairs)
    assert 100 < repeated < 0.02 * len(pairs)
