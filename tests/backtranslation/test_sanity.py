"""The check stops garbage, and only garbage."""

import runpy
from pathlib import Path

import pytest

from ext_common.cli import UserError
from fairseq_ext.backtranslation.generate import sanity

_marian = runpy.run_path(str(Path(__file__).with_name("tiny_marian.py")))
PAIRS = _marian["toy_pairs"](20)
SOURCES = [source for source, _ in PAIRS]
GOOD = [target for _, target in PAIRS]


def answer(outputs):
    """A model that gives these outputs whatever it reads."""

    def translate(lines):
        return list(outputs[: len(lines)])

    return translate


def garbled(share: float, bad: str) -> list[str]:
    """Good outputs, of which a share is replaced, each a little differently where it has a digit."""
    count = round(share * len(GOOD))
    return [bad.replace("0", chr(97 + n)) for n in range(count)] + GOOD[count:]


GARBAGE = {
    "": "no output",
    "  ": "no output",
    "the <unk> fish 0": "pieces or tags",
    "▁the ▁fish 0": "pieces or tags",
    "th@@ e fish 0": "pieces or tags",
    ">>eng<< the fish 0": "pieces or tags",
    "the the the the the fish 0": "repeats itself",
    "kakakakakakakakakaka0": "repeats itself",
    "你喜欢鱼 0": "script of en",
    "он видит дом": "script of en",
    "... , .": "without a letter",
}


@pytest.mark.parametrize("bad, why", GARBAGE.items(), ids=repr)
def test_more_than_half_is_garbage(bad, why):
    with pytest.raises(UserError) as error:
        sanity.check(answer(garbled(0.55, bad)), SOURCES, "en", "the model M")
    message = str(error.value)
    assert "the model M writes garbage" in message and why in message
    assert "11 of 20" in message
    # two examples of what was seen
    assert message.count(" -> ") == 2 and repr(SOURCES[0]) in message


@pytest.mark.parametrize("bad", GARBAGE, ids=repr)
def test_half_is_only_a_weak_model(bad):
    sanity.check(answer(garbled(0.5, bad)), SOURCES, "en", "M")


def test_different_kinds_of_garbage_add_up():
    outputs = [
        "",
        "",
        "",
        "",
        "x x x x x",
        "y y y y y",
        "z z z z",
        "鱼",
        "书",
        "他",
        "<unk>",
        *GOOD[11:],
    ]
    with pytest.raises(UserError, match="no output or output that repeats itself or .*11 of 20"):
        sanity.check(answer(outputs), SOURCES, "en", "M")


def test_one_sentence_for_everything():
    with pytest.raises(UserError, match="the same output for 17 of 20"):
        sanity.check(answer(["I do not know."] * 17 + GOOD[17:]), SOURCES, "en", "M")
    # a weak model has a favourite sentence
    sanity.check(answer(["I do not know."] * 16 + GOOD[16:]), SOURCES, "en", "M")


def test_equal_lines_may_have_equal_translations():
    sanity.check(answer(["Hello."] * 20), ["你好。"] * 20, "en", "M")
    sanity.check(answer(["Hello."] * 4), ["你好。", "您好。", "喂。", "嗨。"], "en", "M")


def test_good_output_passes_in_both_directions():
    sanity.check(answer(GOOD), SOURCES, "en", "M")
    sanity.check(answer(SOURCES), GOOD, "zh", "M")


def test_what_the_source_has_may_stay():
    sources = ["<unk> 是什么？", "哈哈哈哈哈哈哈哈哈哈", "2024", "？！", "a@@ b 是什么"] * 2
    outputs = ["What is <unk>?", "Ha ha ha ha ha ha", "2024", "?!", "What is a@@ b"] * 2
    assert sanity.faults(sources, outputs, "en") is None


def test_poor_but_real_output_passes():
    poor = ["he fish.", "I I like.", "the big big fish", "red", "you you you see", "we"] * 4
    sanity.check(answer(poor), SOURCES, "en", "M")


def test_a_language_whose_script_is_not_known_passes():
    sanity.check(answer(["ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ" + source for source in SOURCES]), SOURCES, "chr", "M")


def test_the_first_twenty_lines_that_are_not_empty():
    asked = []

    def translate(lines):
        asked.append(lines)
        return [f"word {line}" for line in lines]

    lines = ["", "  ", *(f"line {n}" for n in range(30))]
    sanity.check(translate, lines, "en", "M")
    assert asked == [[f"line {n}" for n in range(20)]]
    # nothing to ask about
    sanity.check(translate, ["", " "], "en", "M")
    sanity.check(translate, [], "en", "M")
    assert len(asked) == 1


def test_of_few_lines_all_must_be_garbage():
    sanity.check(answer(["", "", "word"]), SOURCES[:3], "en", "M")
    with pytest.raises(UserError, match="3 of 3"):
        sanity.check(answer(["", "", ""]), SOURCES[:3], "en", "M")
    sanity.check(answer([""] * 2 + GOOD[2:5]), SOURCES[:5], "en", "M")
    with pytest.raises(UserError, match="3 of 5"):
        sanity.check(answer([""] * 3 + GOOD[3:5]), SOURCES[:5], "en", "M")


def test_long_examples_are_shortened():
    with pytest.raises(UserError) as error:
        sanity.check(answer(["字" * 5000] * 20), ["长" * 5000] * 20, "en", "M")
    assert len(str(error.value)) < 600


def test_a_model_that_drops_lines_is_a_bug():
    with pytest.raises(ValueError, match="20 lines were translated to 19"):
        sanity.check(answer(GOOD[:19]), SOURCES, "en", "M")


def translate_with(folder):
    """By greedy search; as in a run, what did not end is no output."""
    from fairseq_ext.backtranslation.models.huggingface import open_model
    from fairseq_ext.translation.decode.options import DecodeOptions
    from fairseq_ext.translation.decode.translator import Translator

    translator = Translator(*open_model(folder))

    def translate(lines):
        found = translator.translate(lines, DecodeOptions(beam=1))
        return ["" if one.cut else one.text for one in found]

    return translate


def test_a_model_of_random_weights_is_refused(tmp_path):
    folder = _marian["make_marian"](tmp_path / "random")
    with pytest.raises(UserError, match="writes garbage"):
        sanity.check(translate_with(folder), SOURCES, "en", str(folder))


def test_a_model_of_random_weights_is_refused_even_where_its_output_ends(tmp_path):
    folder = _marian["make_marian"](tmp_path / "random")
    from fairseq_ext.backtranslation.models.huggingface import open_model
    from fairseq_ext.translation.decode.translator import Translator

    translator = Translator(*open_model(folder))
    with pytest.raises(UserError, match="writes garbage"):
        sanity.check(lambda lines: translator(lines, beam=1), SOURCES, "en", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("updates", [150, 300])
def test_a_model_that_was_trained_a_little_passes(tmp_path, updates):
    folder = _marian["make_marian"](tmp_path / "trained", updates=updates)
    sanity.check(translate_with(folder), SOURCES, "en", str(folder))


def test_scrambled_weights_are_refused(tmp_path):
    """What an upgrade that unties weights does to a good model."""
    import torch

    from fairseq_ext.backtranslation.models.huggingface import open_model
    from fairseq_ext.translation.decode.translator import Translator

    folder = _marian["make_marian"](tmp_path / "trained", updates=150)
    backend, vocabulary = open_model(folder)
    torch.manual_seed(1)
    head = backend.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.3, requires_grad=False)
    translator = Translator(backend, vocabulary)
    with pytest.raises(UserError, match="writes garbage"):
        sanity.check(lambda lines: translator(lines, beam=1), SOURCES, "en", str(folder))
