"""Which language a text is in, where its script does not say.

Of two languages whose bitext is there, by the character n-grams of its own sides (Cavnar & Trenkle 1994;
naive Bayes as in Lui & Baldwin 2012); of a text without a bitext, by the package py3langid.
"""

import functools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import regex

from ext_common.cli import UserError
from fairseq_ext.translation.text.languages import language

_N = 3
_SMOOTHING = 0.5
# Of one n-gram: names and rare spellings must not decide alone.
_MOST = 4.0
# Natural logarithm of the odds, in all and for each n-gram, from which a text is in the other language.
CERTAIN = 12.0
CLEAR = 0.6
_NO_LETTER = regex.compile(r"[^\p{L}\p{M}']+")
# What identifiers confuse even in long texts.
_NEAR = [
    set(one.split())
    for one in ("no nb nn da", "hr bs sr sh", "ms id", "xh zu", "zh yue wuu", "cs sk")
]
_LINES, _PARTS, _LEAST_PARTS = 20, 40, 10
AGREEING = 0.8
"""Share of the parts of a text that are read as one other language, from which it is refused."""


class TwoLanguages:
    """Tells two languages apart; fitted from lines of each, of which some may be of the other."""

    def __init__(self, first: Iterable[str], second: Iterable[str]) -> None:
        counts: list[Counter[str]] = [Counter(), Counter()]
        for side, lines in zip(counts, (first, second), strict=True):
            for line in lines:
                side.update(_grams(line))
        every = counts[0].keys() | counts[1].keys()
        totals = [side.total() + _SMOOTHING * len(every) for side in counts]
        self._leans = {}
        for gram in every:
            first_share, second_share = (
                (side[gram] + _SMOOTHING) / total
                for side, total in zip(counts, totals, strict=True)
            )
            self._leans[gram] = max(-_MOST, min(_MOST, math.log(first_share / second_share)))

    def lean(self, text: str) -> tuple[float, int]:
        """(log odds of the first language, number of known n-grams) of a text."""
        found = [self._leans[gram] for gram in _grams(text) if gram in self._leans]
        return sum(found), len(found)

    def is_other(self, text: str, second: bool = False) -> bool:
        """Whether a text of the first language (`second`: of the second) is surely in the other one."""
        odds, count = self.lean(text)
        odds = -odds if second else odds
        return odds < -CERTAIN and odds < -CLEAR * count


def _grams(text: str) -> Iterator[str]:
    padded = f" {_NO_LETTER.sub(' ', text.casefold()).strip()} "
    return (padded[i : i + _N] for i in range(len(padded) - _N + 1))


def check_language(
    lines: Sequence[str], lang: str, name: str, other: str = "", remedy: str = ""
) -> None:
    """UserError where a text is in another language than `lang`, by py3langid.

    Decided for the text, of which 20 lines at a time are looked at: six words alone confuse everyone. Fewer
    than 200 lines, and languages that the package does not know, pass. other: the language of the other side
    of a bitext.
    """
    found, code = _identifier(), language(lang)
    if found is None or code not in found[1]:
        return
    classify = found[0]
    parts = [" ".join(lines[i : i + _LINES]) for i in range(0, len(lines) - _LINES + 1, _LINES)]
    parts = parts[:: max(1, len(parts) // _PARTS)]
    if len(parts) < _LEAST_PARTS:
        return
    most, count = Counter(classify(part)[0] for part in parts).most_common(1)[0]
    near = any({code, most} <= group for group in _NEAR)
    if most == code or near or count < AGREEING * len(parts):
        return
    swapped = ": are the two sides exchanged?" if other and most == language(other) else ":"
    raise UserError(
        f"{name} is not {lang} but {most}, by {count} of {len(parts)} samples of its lines{swapped} give "
        f"text of that language, or its code{remedy}"
    )


@functools.cache
def _identifier() -> tuple[Any, frozenset[str]] | None:
    """py3langid's function and the languages it knows; None, which is said, where it is not there."""
    try:
        import py3langid
    except ImportError:
        note = "the language of texts is not checked: pip install 'fairseq-ext[langid]' does"
        print(f"note: {note}", file=sys.stderr)
        return None
    return py3langid.classify, frozenset(name for name, _ in py3langid.rank("a"))
