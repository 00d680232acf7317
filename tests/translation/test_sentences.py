import pytest

from fairseq_ext.translation.decode.checkpoint import lines_of
from fairseq_ext.translation.decode.options import DecodeOptions
from fairseq_ext.translation.text.sentences import (
    Lines,
    has_several,
    share_of_several,
    split_sentences,
)
from tests.translation.test_translate import echo

PARAGRAPH = "It rains. Who is there? Nobody!"


@pytest.mark.parametrize(
    "text, lang, sentences",
    [
        (PARAGRAPH, "en", ["It rains.", "Who is there?", "Nobody!"]),
        (
            "Dr. Smith paid 3.14 dollars. He left.",
            "en",
            ["Dr. Smith paid 3.14 dollars.", "He left."],
        ),
        ("下雨了。谁在那里？没有人！", "zh", ["下雨了。", "谁在那里？", "没有人！"]),
        ("他说：“下雨了。”我走了。", "zh_Hant", ["他说：“下雨了。”", "我走了。"]),
        ("Hyvää päivää. Kuka siellä?", "fi", ["Hyvää päivää.", "Kuka siellä?"]),
        ("One line", "en", ["One line"]),
    ],
)
def test_sentences_end_where_a_reader_sees_an_end(text, lang, sentences):
    pytest.importorskip("pysbd", reason="pip install -e '.[sentences]'")
    assert split_sentences(text, lang) == sentences
    assert has_several(text) == (len(sentences) > 1)


def test_one_sentence_is_one_whatever_marks_end_it():
    for text in (
        "It rains.",
        "下雨了。",
        "“下雨了。”",
        'He said "no."',
        "Wait…",
        "Really?!",
        "3.14",
        "",
    ):
        assert not has_several(text), text
    assert share_of_several(["a. b", "a.", "c", "d"]) == 0.25


@pytest.mark.parametrize(
    "lines, split, parts",
    [
        (Lines(100, 0.0), True, 3),
        (Lines(100, 0.5), True, 1),  # the training had paragraphs of this length
        (Lines(10, 0.5), True, 3),
        (Lines(100, 0.0), False, 1),
        (None, True, 1),
    ],
)
def test_a_paragraph_is_split_where_the_training_had_sentences(lines, split, parts):
    from dataclasses import replace

    translator = echo()
    translator.vocabulary = replace(translator.vocabulary, lines=lines)
    (found,) = translator.translate([PARAGRAPH], DecodeOptions(split=split, beam=1))
    assert (found.parts, found.text) == (parts, PARAGRAPH)
    assert lines_of({"lines": lines._asdict() if lines else None}) == lines
