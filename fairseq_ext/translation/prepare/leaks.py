"""What keeps valid and test sentences out of training data, parallel or monolingual.

A line leaks where its match key is that of a held-out line, whatever the length ("Yes." too: an exact copy
is never evidence of translating), or where it shares nearly all word sequences of a longer held-out line.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import regex

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.filter_chain import sample
from fairseq_ext.translation.prepare.filters import Language
from fairseq_ext.translation.prepare.hashes import HashSet, text_hash
from fairseq_ext.translation.prepare.settings import held_out_splits
from fairseq_ext.translation.text.normalise import (
    language,
    match_key,
    normalise,
    read_lines,
    standard,
    unit,
)

SHORTEST = {"words": 8, "characters": 12}
"""Held-out lines of fewer units are only found as a whole: within others they are everyday phrases."""
GRAM = {"words": 3, "characters": 4}
"""Units of an n-gram."""
THRESHOLD = 0.8
"""Share of a held-out line's n-grams from which a line contains it.

One changed word breaks 3 of them, so this lets one word in 17 differ (one character in 23), and in shorter
lines the first or last one; two sentences on one pattern ("Tom likes to play tennis after school",
"… football …") stay apart.
"""
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


EQUAL = "it is a line of valid or test"


class LeakGuard:
    """Finds held-out lines in other text; holds hashes only (about 12 bytes per held-out n-gram).

    heldout: language → lines of valid and test, normalised or not. Picklable.
    """

    def __init__(self, heldout: Mapping[str, Iterable[str]]) -> None:
        self._sides = {lang: _Side(lines, unit(lang)) for lang, lines in heldout.items()}

    @classmethod
    def from_files(cls, files: Mapping[str, Iterable[str | os.PathLike[str]]]) -> "LeakGuard":
        """files: language → files of valid and test lines (.gz and .zst too)."""
        return cls({k: chain.from_iterable(map(read_lines, paths)) for k, paths in files.items()})

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._sides)

    def __len__(self) -> int:
        """How many different held-out lines there are, over all languages."""
        return sum(len(side.keys) for side in self._sides.values())

    def find(self, line: str, lang: str, partial: bool = True) -> str | None:
        """Why `line` must not be trained on, None where it may.

        partial: also look for held-out lines inside it; otherwise equal ones only.
        Raises UserError for a language without held-out lines.
        """
        if lang not in self._sides:
            known = ", ".join(self._sides)
            raise UserError(f"no held-out lines of language {lang!r} to compare with, only {known}")
        return self._sides[lang].find(line, partial)

    def find_pair(self, sides: Mapping[str, str], partial: bool = True) -> str | None:
        """:meth:`find` on each side of a pair, language → line, with the language in front."""
        for lang, line in sides.items():
            reason = self.find(line, lang, partial)
            if reason:
                return f"{lang}: {reason}"
        return None


class _Side:
    """The held-out lines of one language: hashes of keys, and an index of n-grams to lines."""

    def __init__(self, lines: Iterable[str], units: str) -> None:
        self.units = units
        self.keys = HashSet()
        grams = []
        for line in lines:
            key = match_key(line)
            if key and self.keys.add(text_hash(key)):
                found = self._grams(line, key)
                if len(found):
                    grams.append(found)
        self.sizes = np.array([len(found) for found in grams], dtype=np.int32)
        flat = np.concatenate(grams) if grams else np.zeros(0, dtype=np.uint64)
        order = np.argsort(flat, kind="stable")
        self.grams = flat[order]
        self.lines = np.repeat(np.arange(len(grams), dtype=np.int32), self.sizes)[order]

    def find(self, line: str, partial: bool) -> str | None:
        key = match_key(line)
        if text_hash(key) in self.keys and key:
            return EQUAL
        grams = self._grams(line, key) if partial and len(self.sizes) else ()
        if not len(grams):
            return None
        first = np.searchsorted(self.grams, grams, "left")
        last = np.searchsorted(self.grams, grams, "right")
        spans = [self.lines[a:b] for a, b in zip(first, last, strict=True) if a < b]
        if not spans:
            return None
        lines, counts = np.unique(np.concatenate(spans), return_counts=True)
        shares = counts / self.sizes[lines]
        best = int(np.argmax(shares))
        if shares[best] < THRESHOLD:
            return None
        size = int(self.sizes[lines[best]])
        return (
            f"it shares {counts[best]} of the {size} {GRAM[self.units]}-grams ({self.units}) of a line of "
            "valid or test"
        )

    def _grams(self, line: str, key: str) -> np.ndarray:
        """uint64: hashes of the different n-grams of a line; none for one that is too short."""
        if self.units == "words":
            shown = unicodedata.normalize("NFKC", standard(line, ""))
            words = _WORD.findall(shown.casefold())
            values = np.fromiter(map(text_hash, words), dtype=np.uint64, count=len(words))
        else:
            values = np.frombuffer(key.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            values = values.astype(np.uint64)
        if len(values) < SHORTEST[self.units]:
            return np.zeros(0, dtype=np.uint64)
        return np.unique(ngram_hashes(values, GRAM[self.units]))


def ngram_hashes(values: np.ndarray, n: int) -> np.ndarray:
    """uint64 (len − n + 1,): a hash of every n consecutive `values` (uint64), modulo 2⁶⁴."""
    total = np.zeros(len(values) - n + 1, dtype=np.uint64)
    for offset in range(n):
        total = (total ^ values[offset : offset + len(total)]) * _BASE
        total ^= total >> np.uint64(32)
    return total


class Guard:
    """The valid and test lines of a prepared bitext on the side of `lang`; call it with a line.

    Lines in the bitext's other language are found too, where both have one script.

    sha256: of what decides its answers. Raises UserError where the bitext has no such lines.
    """

    def __init__(self, data: str | os.PathLike[str], lang: str) -> None:
        corpus = Corpus.open(data)
        own = [code for code in corpus.languages if language(code) == language(lang)]
        if not own:
            raise UserError(
                f"{data} is of {' and '.join(corpus.languages)}, and the text is {lang}: give --guard "
                "the bitext that the forward model is trained on"
            )
        self.lang, self.convention = own[0], corpus.convention
        files = [corpus.text(split, self.lang) for split in held_out_splits(corpus)]
        if not files:
            raise UserError(f"{data} has neither valid nor test: give --guard a bitext that has")
        self.sha256 = _digest(files, self.convention)
        self._leaks = LeakGuard.from_files({self.lang: files})
        train = [
            corpus.text("train", code) for code in corpus.languages if "train" in corpus.splits
        ]
        self._language = Language(corpus.languages)
        self._second = self.lang == corpus.languages[1]
        if train:
            self._language.fit(sample(zip(*map(read_lines, train), strict=True)))

    def __call__(self, line: str) -> str | None:
        """Why a line must not be used, None where it may be."""
        line = normalise(line, self.lang, self.convention)
        model = self._language.model
        if model is not None and model.is_other(line, self._second):
            return f"language: it is not {self.lang} but the other language of the bitext"
        leak = self._leaks.find(line, self.lang)
        return leak and f"leak: {leak}"


def _digest(files: list[Path], convention: str) -> str:
    parts = [convention, *map(sha256_file, files)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
