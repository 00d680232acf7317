"""Modes as what a decoder is told, and the noise of Edunov et al. beside its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import OptionError
from ext_common.random import uniforms
from ext_common.registry import UnknownName
from fairseq_ext.backtranslation.modes import FILLER, MODES, add_noise, make_mode
from fairseq_ext.translation.decode.options import DecodeOptions, SampleOptions

WORDS = [f"w{n}" for n in range(200)]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("beam", None, DecodeOptions(beam=5)),
        ("beam", "beam=4,lenpen=0.6", DecodeOptions(beam=4, lenpen=0.6)),
        ("sampling", None, SampleOptions()),
        ("sampling", "temperature=0.7", SampleOptions(temperature=0.7)),
        ("topk", None, SampleOptions(topk=10)),
        ("topk", "k=5,temperature=2", SampleOptions(topk=5, temperature=2.0)),
        ("topp", "p=0.5", SampleOptions(topp=0.5)),
        ("noised-beam", None, DecodeOptions(beam=5)),
    ],
)
def test_what_a_decoder_is_told(name, options, wanted):
    mode = make_mode(name, options)
    assert mode.search() == wanted and type(mode.search()) is type(wanted)
    assert mode.search(nbest=7, max_len_b=3).nbest == 7
    assert mode.name == name and set(mode.options) == set(vars(MODES.options(name)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beam", "beam=0"),
        ("topk", "k=0"),
        ("topp", "p=0"),
        ("topp", "p=1.5"),
        ("sampling", "temperature=0"),
        ("noised-beam", "drop=1"),
        ("noised-beam", "fill=-0.1"),
        ("noised-beam", "shuffle=-1"),
        ("beam", "beams=3"),
    ],
)
def test_options_that_cannot_be(name, options):
    with pytest.raises((OptionError, ValueError)):
        make_mode(name, options)


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'topk'"):
        make_mode("top-k")


def test_drawn_modes_leave_text_as_it_is():
    for name in ("beam", "sampling", "topk", "topp"):
        assert make_mode(name).finish("a <BLANK> b", 1, "en") == "a <BLANK> b"


@given(
    st.integers(1, 60),
    st.floats(0, 0.99),
    st.floats(0, 1),
    st.integers(0, 6),
    st.integers(0, 2**64 - 1),
)
def test_words_are_dropped_filled_and_moved_no_further(count, drop, fill, shuffle, seed):
    words = WORDS[:count]
    noised = add_noise(words, uniforms([seed], 3 * count).reshape(3, -1), drop, fill, shuffle)
    assert 1 <= len(noised) <= count
    kept = [w for w in noised if w != FILLER]
    assert len(set(kept)) == len(kept) and set(kept) <= set(words)
    if fill == 0:
        # places are counted among the words that were kept
        order = sorted(noised, key=words.index)
        assert all(abs(order.index(w) - n) <= shuffle for n, w in enumerate(noised))
    if shuffle == 0:
        assert kept == sorted(kept, key=words.index)
    if drop == 0:
        assert len(noised) == count


def test_probabilities_are_those_asked_for():
    words = [f"w{n}" for n in range(20_000)]
    draws = np.random.default_rng(3).random((3, len(words)))
    noised = add_noise(words, draws, 0.1, 0.1, 3)
    # four standard deviations of a binomial
    assert abs(len(noised) - 18_000) < 4 * (20_000 * 0.09) ** 0.5
    assert abs(noised.count(FILLER) - 1_800) < 4 * (18_000 * 0.09) ** 0.5
    still = add_noise(words, draws, 0, 0, 3)
    moved = [abs(int(w[1:]) - n) for n, w in enumerate(still)]
    assert max(moved) == 3 and 0.5 < np.mean(np.array(moved) > 0) < 0.9


def test_no_noise_is_no_change():
    assert add_noise(WORDS, np.full((3, len(WORDS)), 0.5), 0, 0, 0) == WORDS
    assert add_noise([], np.zeros((3, 0)), 0.5, 0.5, 3) == []


@given(st.text(max_size=60), st.integers(0, 2**64 - 1))
def test_noise_belongs_to_the_seed_and_gives_one_line(text, seed):
    mode = make_mode("noised-beam")
    for lang in ("en", "zh"):
        found = mode.finish(text, seed, lang)
        assert found == mode.finish(text, seed, lang)
        assert "\n" not in found


def test_a_filler_that_the_model_wrote_is_none():
    mode = make_mode("noised-beam", "drop=0,fill=0,shuffle=0")
    assert mode.finish("a <BLANK> b", 1, "en") == "a b"


def test_units_are_characters_where_a_language_has_no_spaces():
    mode = make_mode("noised-beam", "drop=0,fill=0,shuffle=0")
    assert mode.finish("我喜欢iPhone 12。", 1, "zh") == "我喜欢iPhone12。"
    blank = make_mode("noised-beam", "drop=0,fill=1,shuffle=0")
    assert blank.finish("我喜欢iPhone", 1, "zh").split() == [FILLER] * 4
    assert blank.finish("I like it", 1, "en") == " ".join([FILLER] * 3)
