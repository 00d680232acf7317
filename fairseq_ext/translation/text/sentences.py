"""Where a line holds several sentences, which a model of single ones would lose all but one of."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from fairseq_ext.translation.text.languages import language
from fairseq_ext.translation.text.normalise import unit
from fairseq_ext.translation.text.overlong import SENTENCE_END

# Of the lines of a training text: with fewer of several sentences, it is one of single ones.
FEW = 0.05


class Lines(NamedTuple):
    """What the source lines of a training were: the 99th percentile of their pieces, and the share of
    those with several sentences."""

    longest: int
    several: float

    def splits(self, text: str, pieces: int) -> bool:
        """Whether a text is to be translated sentence by sentence."""
        return (pieces > self.longest or self.several < FEW) and has_several(text)


def has_several(text: str) -> bool:
    """Whether there may be more than one sentence; an abbreviation is taken for an end."""
    return SENTENCE_END.search(text.strip()) is not None


def share_of_several(lines: Iterable[str]) -> float:
    """Share of the lines that hold several sentences."""
    found = list(map(has_several, lines))
    return sum(found) / max(len(found), 1)


def split_sentences(text: str, lang: str) -> list[str]:
    """The sentences of a text, without the white space between them.

    By pysbd in the languages with spaces that it knows (Dr. Smith is no end), else behind marks that end one.
    """
    segmenter = _segmenter(language(lang))
    parts = segmenter.segment(text) if segmenter else SENTENCE_END.split(text)
    return [part.strip() for part in parts if part.strip()]


@functools.cache
def _segmenter(lang: str) -> Any:
    try:
        import pysbd
        from pysbd.languages import LANGUAGE_CODES
    except ImportError:
        return None
    # in Chinese and Japanese it puts a closing quotation mark before the next sentence
    known = lang in LANGUAGE_CODES and unit(lang) == "words"
    return pysbd.Segmenter(language=lang, clean=False) if known else None
