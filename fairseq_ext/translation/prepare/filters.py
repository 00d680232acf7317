"""The filters of a bitext's pairs; :mod:`fairseq_ext.translation.prepare.filter_chain` puts them in a chain.

Each is a class of (languages, **options) whose instances are called with a normalised source and target. The
call returns None to keep the pair or the reason for removing it, with figures. Optional: `fit(pairs)`,
called before with a sample of the corpus, and `stateful = True` for what remembers the pairs it saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Optional

import regex

from ext_common.cli import OptionError
from ext_common.registry import Registry
from fairseq_ext.translation.prepare.hashes import HashSet, text_hash
from fairseq_ext.translation.text.identify import TwoLanguages
from fairseq_ext.translation.text.normalise import length, match_key, script_share, unit

FILTERS = Registry("filter")

CALIBRATION_PAIRS = 10_000
# Fewer say less about the ratio of two languages than the default below does.
_ENOUGH_PAIRS = 100
# Short sentences are whole numbers apart: 1 word is 1 to 4 characters.
_CALIBRATION_UNITS = 5
_CHARACTERS_PER_WORD = 1.5
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
# What can be repeated: not digits, 000 000 000 is no loop.
_LOOP_UNITS = {
    "words": regex.compile(r"[\p{L}\p{M}]+"),
    "characters": regex.compile(r"\p{Latin}+|[\p{L}\p{M}]"),
}
_LETTER = regex.compile(r"\p{L}")
_LATIN_WORD = regex.compile(r"(\p{Latin})\p{Latin}+")
_LATIN_RUN = regex.compile(r"([\p{Latin}\d]{2})[\p{Latin}\d]+")


@FILTERS.register("empty")
class Empty:
    """Pairs with an empty side, or one of punctuation only where the other has words."""

    def __init__(self, languages: Sequence[str]) -> None:
        pass

    def __call__(self, source: str, target: str) -> str | None:
        sides = ("source", source), ("target", target)
        for side, text in sides:
            if not text.strip():
                return f"the {side} is empty"
        wordless = [side for side, text in sides if not _WORD.search(text)]
        return f"only the {wordless[0]} has no letter or number" if len(wordless) == 1 else None


@dataclass
class LengthOptions:
    min: int = field(default=1, metadata={"help": "shortest side, words or characters"})
    max: int = field(default=200, metadata={"help": "longest side, words"})
    max_characters: int = field(
        default=500, metadata={"help": "longest side, characters, in zh, ja, th, lo, km, my, yue"}
    )
    max_word: int = field(
        default=100, metadata={"help": "longest word, characters, in the other languages"}
    )


@FILTERS.register("length", options=LengthOptions)
class Length:
    """Pairs with a side that is too short or too long, or with one endless word."""

    def __init__(
        self, languages: Sequence[str], min: int, max: int, max_characters: int, max_word: int
    ) -> None:
        self.sides = [
            (side, lang, unit(lang), max if unit(lang) == "words" else max_characters)
            for side, lang in zip(("source", "target"), languages, strict=True)
        ]
        self.min, self.max_word = min, max_word

    def __call__(self, source: str, target: str) -> str | None:
        for text, (side, lang, units, longest) in zip((source, target), self.sides, strict=True):
            count = length(text, lang)
            if not self.min <= count <= longest:
                return f"the {side} has {count} {units}, allowed are {self.min} to {longest}"
            if units == "words" and len(text) > self.max_word:
                word = max(map(len, text.split()))
                if word > self.max_word:
                    return f"a word of {word} characters in the {side}, over {self.max_word}"
        return None


@dataclass
class ScriptOptions:
    min_share: float = field(
        default=0.5, metadata={"help": "smallest share of letters in the language's own scripts"}
    )


@FILTERS.register("script", options=ScriptOptions)
class Script:
    """Pairs with a side in the wrong script: another language, or the sides swapped.

    Languages of one script (English and German) the filter language tells apart. Beside Chinese or Japanese
    characters a Latin word counts as one letter: 喜欢iPhone is Chinese.
    """

    def __init__(self, languages: Sequence[str], min_share: float) -> None:
        self.languages, self.min_share = tuple(languages), min_share

    def __call__(self, source: str, target: str) -> str | None:
        for side, text, lang, other in (
            ("source", source, *self.languages),
            ("target", target, *reversed(self.languages)),
        ):
            if unit(lang) == "characters":
                text = _LATIN_WORD.sub(r"\1", text)
            share = script_share(text, lang)
            if share < self.min_share:
                letters = len(_LETTER.findall(text))
                note = ": the sides may be swapped" if script_share(text, other) > 0.5 else ""
                return f"{share:.0%} of {letters} letters of the {side} are of {lang}{note}"
        return None


@FILTERS.register("language")
class Language:
    """Pairs with a side that is in the language of the other, where both are written in one script.

    Told by the n-grams of characters that a sample of the corpus has on either side; nothing is removed
    where that has fewer than 100 pairs, and no side that is too short to be sure of.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        self.languages = tuple(languages)
        self.model: TwoLanguages | None = None

    def fit(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Learn both languages, each from its side of the pairs."""
        pairs = pairs[:CALIBRATION_PAIRS]
        if len(pairs) < _ENOUGH_PAIRS:
            return
        sources, targets = zip(*pairs, strict=True)
        if script_share(" ".join(sources), self.languages[1]) > 0.5:
            self.model = TwoLanguages(sources, targets)

    def __call__(self, source: str, target: str) -> str | None:
        if self.model is None:
            return None
        for side, text, second in (("source", source, False), ("target", target, True)):
            if self.model.is_other(text, second):
                return f"the {side} is in {self.languages[not second]}"
        return None


@dataclass
class IdenticalOptions:
    keep: int = field(
        default=0, metadata={"help": "identical sides of up to this many letters and digits stay"}
    )


@FILTERS.register("identical", options=IdenticalOptions)
class Identical:
    """Pairs whose sides are the same but for case and punctuation: text that was not translated.

    Numbers alone stay: 1984 is 1984 in most languages, and copying numbers is to be learnt.
    """

    def __init__(self, languages: Sequence[str], keep: int) -> None:
        self.keep = keep

    def __call__(self, source: str, target: str) -> str | None:
        key = match_key(source)
        if len(key) <= self.keep or not _LETTER.search(key) or key != match_key(target):
            return None
        return f"both sides are the same {len(key)} letters and digits"


@dataclass
class RepetitionOptions:
    repeats: int = field(default=5, metadata={"help": "a phrase so many times in a row is a loop"})
    share: float = field(
        default=0.5, metadata={"help": "smallest share of a side that is one loop"}
    )


@FILTERS.register("repetition", options=RepetitionOptions)
class Repetition:
    """Pairs in which one side is one phrase over and over, and the other less than half as often.

    Phrases of 1 to 8 words, or characters in zh, ja, th, lo, km, my, yue; digits and punctuation are
    left out. "Ha ha ha ha ha!" with 哈哈哈哈哈！ stays.
    """

    def __init__(self, languages: Sequence[str], repeats: int, share: float) -> None:
        self.units = [unit(lang) for lang in languages]
        self.repeats, self.share = repeats, share

    def __call__(self, source: str, target: str) -> str | None:
        sides = [
            _LOOP_UNITS[units].findall(text.casefold())
            for text, units in zip((source, target), self.units, strict=True)
        ]
        # A loop leaves few different units; this spares most pairs the search for one.
        varied = 1 - self.share * (1 - 1 / self.repeats)
        if all(len(set(side)) > varied * len(side) for side in sides):
            return None
        loops = [longest_loop(side, self.share) for side in sides]
        counts = [count for count, _ in loops]
        if max(counts) < self.repeats or 2 * min(counts) >= max(counts):
            return None
        worst = counts.index(max(counts))
        name, units, total = ("source", "target")[worst], self.units[worst], len(sides[worst])
        return f"{loops[worst][1]} {units} {max(counts)} times in a row, of {total} in the {name}"


@dataclass
class LengthRatioOptions:
    factor: float = field(
        default=2.0, metadata={"help": "largest ratio to the length that the corpus lets expect"}
    )
    slack: float = field(
        default=5.0,
        metadata={"help": "units added to the longer side's limit (characters beside words)"},
    )
    ratio: Optional[float] = field(
        default=None, metadata={"help": "units of the target per unit of the source"}
    )


@FILTERS.register("length_ratio", options=LengthRatioOptions)
class LengthRatio:
    """Pairs of which one side is too long for the other, in words or characters as the language has.

    What is expected is the median target/source ratio of a sample; without one, 1, or 1.5 characters for
    a word (the median of 29,155 English–Chinese pairs of Tatoeba, where 99 % of the pairs of 9 words and
    more stay within a factor of 2; the slack covers short ones, and of all these pairs 2 are removed).
    A Latin word or number inside characters counts as 2: 发射了Solar Orbiter is as long as it sounds.
    With the defaults, three times the expected length is removed from 6 characters of the shorter side
    up, a third of it from 16 expected characters up.
    """

    def __init__(
        self, languages: Sequence[str], factor: float, slack: float, ratio: float | None
    ) -> None:
        self.languages, self.factor, self.slack = tuple(languages), factor, slack
        if factor < 1 or slack < 0 or (ratio is not None and not ratio > 0):
            raise OptionError(
                f"factor must be at least 1, slack at least 0, ratio positive: got {factor:g}, "
                f"{slack:g}, {ratio}"
            )
        self.fixed = ratio is not None
        characters = [unit(lang) == "characters" for lang in languages]
        self.ratio = ratio or _CHARACTERS_PER_WORD ** (characters[1] - characters[0])

    def fit(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Set the expected ratio to the median of pairs with 5 units or more on both sides.

        Does nothing with fewer than 100 of these, and where the option `ratio` is given.
        """
        counts = [self._lengths(*pair) for pair in pairs[:CALIBRATION_PAIRS]]
        ratios = [t / s for s, t in counts if min(s, t) >= _CALIBRATION_UNITS]
        if not self.fixed and len(ratios) >= _ENOUGH_PAIRS:
            self.ratio = median(ratios)

    def __call__(self, source: str, target: str) -> str | None:
        counts = self._lengths(source, target)
        # Compared in the finer unit, so that a pair and its mirror image get one verdict.
        finer = max(self.ratio, 1.0)
        sides = counts[0] * finer, counts[1] * finer / self.ratio
        if max(sides) <= self.factor * min(sides) + self.slack:
            return None
        units = [f"{n} {unit(lang)}" for n, lang in zip(counts, self.languages, strict=True)]
        return f"{units[0]} and {units[1]}, expected are {self.ratio:.2f} for one"

    def _lengths(self, source: str, target: str) -> list[int]:
        return [
            length(_LATIN_RUN.sub(r"\1", text) if unit(lang) == "characters" else text, lang)
            for text, lang in zip((source, target), self.languages, strict=True)
        ]


@FILTERS.register("duplicate")
class Duplicate:
    """Pairs that occurred before, letter for letter; the first stays."""

    stateful = True

    def __init__(self, languages: Sequence[str]) -> None:
        self.seen = HashSet()

    def __call__(self, source: str, target: str) -> str | None:
        new = self.seen.add(text_hash(f"{source}\n{target}"))
        return None if new else "the same pair occurred before"


@FILTERS.register("near_duplicate")
class NearDuplicate:
    """Pairs that occurred before but for case, width, spacing and punctuation; the first stays."""

    stateful = True

    def __init__(self, languages: Sequence[str]) -> None:
        self.seen = HashSet()

    def __call__(self, source: str, target: str) -> str | None:
        new = self.seen.add(text_hash(f"{match_key(source)}\n{match_key(target)}"))
        return None if new else "the same pair but for case or punctuation occurred before"


def longest_loop(units: Sequence[str], share: float = 0.0, longest: int = 8) -> tuple[int, int]:
    """(times, period) of the phrase of up to `longest` units that repeats most often in a row.

    Only loops over at least `share` of the units count; (1, 0) without one.
    """
    best = (1, 0)
    for period in range(1, min(longest, len(units) // 2) + 1):
        run = 0
        for one, before in zip(units[period:], units, strict=False):
            run = run + 1 if one == before else 0
            covered = run + period
            if covered >= share * len(units) and covered // period > best[0]:
                best = (covered // period, period)
    return best
