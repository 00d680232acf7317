"""The steps of prepare over many pairs: survey, clean and filter, divide, each in bounded memory.

Of a pair that is kept 28 bytes stay in memory (line number, a hash of each side, ratio of lengths); its
text goes to a file.
"""

import gzip
import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from ext_common.cli import progress
from ext_common.parallel import in_order
from fairseq_ext.translation.prepare.filter_chain import FilterChain, sample
from fairseq_ext.translation.prepare.hashes import key_hash
from fairseq_ext.translation.prepare.leaks import EQUAL, LeakGuard
from fairseq_ext.translation.prepare.splits import SPLITS
from fairseq_ext.translation.text.moses import detokeniser
from fairseq_ext.translation.text.normalise import length, normalise
from fairseq_ext.translation.text.tables import Layout, read_pairs

BATCH = 2000


class Row(NamedTuple):
    """A pair after cleaning.

    number: input line from 1; source, target: normalised; keys: hash of each side's match key; ratio:
    length of the target / of the source; verdict: (place in the chain, filter, reason) or None; leak: why
    it must not be trained on, or None.
    """

    number: int
    source: str
    target: str
    keys: tuple[int, int]
    ratio: float
    verdict: tuple[int, str, str] | None
    leak: str | None


@dataclass
class Kept:
    """What is remembered of the pairs that are kept, in input order; texts lie in `files`."""

    files: tuple[Path, Path]
    numbers: "array[int]" = field(default_factory=lambda: array("Q"))
    keys: "tuple[array[int], array[int]]" = field(default_factory=lambda: (array("Q"), array("Q")))
    ratios: "array[float]" = field(default_factory=lambda: array("f"))

    def __len__(self) -> int:
        return len(self.numbers)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, target) of each."""
        with open_lines(self.files[0]) as source, open_lines(self.files[1]) as target:
            for pair in zip(source, target, strict=True):
                yield pair[0].removesuffix("\n"), pair[1].removesuffix("\n")


@dataclass
class Leaks:
    """Pairs with a side that is a held-out line, or shares most of one; the first of them."""

    equal: int = 0
    near: int = 0
    first: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        equal = str(row.leak).endswith(EQUAL)
        self.equal += equal
        self.near += not equal
        if len(self.first) < 3:
            self.first.append(row)


class Cleaner:
    """Raw pairs to :class:`Row`, without memory, so that processes can share the work."""

    def __init__(self, languages: tuple[str, str], convention: str, detokenise: bool = False):
        self.languages, self.convention = languages, convention
        self.detokenise = detokenise
        self.filters: list[tuple[int, str, Callable[..., Any]]] = []
        self.guard: LeakGuard | None = None

    def use(self, chain: FilterChain, guard: LeakGuard | None) -> None:
        """Judge rows by the filters of a chain that have no memory, and by a guard."""
        self.guard = guard
        self.filters = [
            (place, name, one)
            for place, (name, one) in enumerate(chain.filters.items())
            if not getattr(one, "stateful", False)
        ]

    def __call__(self, batch: Sequence[tuple[int, str, str]]) -> list[Row]:
        return [self.row(*item) for item in batch]

    def row(self, number: int, source: str, target: str) -> Row:
        source, target = self.pair(source, target)
        lengths = [
            length(t, lang) for t, lang in zip((source, target), self.languages, strict=True)
        ]
        verdict = None
        for place, name, one in self.filters:
            reason = one(source, target)
            if reason is not None:
                verdict = place, name, reason
                break
        leak = None
        if self.guard is not None and verdict is None:
            leak = self.guard.find_pair(dict(zip(self.languages, (source, target), strict=True)))
        keys = key_hash(source), key_hash(target)
        return Row(number, source, target, keys, lengths[1] / max(lengths[0], 1), verdict, leak)

    def pair(self, source: str, target: str) -> tuple[str, str]:
        """Both sides as they are trained on."""
        return self.side(source, self.languages[0]), self.side(target, self.languages[1])

    def side(self, text: str, lang: str) -> str:
        text = detokeniser(lang)(text) if self.detokenise else text
        return normalise(text, lang, self.convention)


def survey(
    inputs: Sequence[Path], layout: Layout, cleaner: Cleaner, seed: int
) -> tuple[int, list[tuple[str, str]]]:
    """(number of pairs, a cleaned random sample of them); reads the inputs once."""
    last = 0

    def raw() -> Iterator[tuple[str, str]]:
        nonlocal last
        for number, source, target in progress(read_pairs(inputs, layout), "read", "pairs"):
            last = number
            yield source, target

    drawn = sample(raw(), seed=seed)
    return last, [cleaner.pair(*pair) for pair in drawn]


def clean(
    pairs: Iterable[tuple[int, str, str]],
    total: int,
    chain: FilterChain,
    cleaner: Cleaner,
    folder: Path,
    rejects: IO[str],
    workers: int,
    keep_leaks: bool = False,
) -> tuple[Kept, Counter[str], Leaks]:
    """Filter `pairs` into two files of `folder`; what is left out goes to `rejects`.

    cleaner: what raw pairs go through first, with the same chain.
    Returns (what is kept, removed pairs by name of the filter or "leak", the leaks, kept or not).
    """
    kept = Kept((folder / "source", folder / "target"))
    removed: Counter[str] = Counter()
    leaks = Leaks()
    with ExitStack() as stack:
        files = [stack.enter_context(open_lines(path, "w")) for path in kept.files]
        bar = stack.enter_context(progress(total, "clean", "pairs"))
        for rows in in_order(cleaner, batches(pairs, BATCH), workers):
            for row in rows:
                verdict = judge(row, chain)
                if verdict is None and row.leak:
                    leaks.add(row)
                    verdict = None if keep_leaks else ("leak", row.leak)
                if verdict:
                    removed[verdict[0]] += 1
                    reason = f"{verdict[0]}: {verdict[1]}"
                    rejects.write(reject_line(row.number, reason, row.source, row.target))
                    continue
                kept.numbers.append(row.number)
                for column, key in zip(kept.keys, row.keys, strict=True):
                    column.append(key)
                kept.ratios.append(row.ratio)
                files[0].write(row.source + "\n")
                files[1].write(row.target + "\n")
            bar.update(len(rows))
    return kept, removed, leaks


def judge(row: Row, chain: FilterChain) -> tuple[str, str] | None:
    """(filter, reason) of the first filter of the chain that removes a pair.

    Filters without memory have judged already; the others see what those before them let through.
    """
    for place, (name, one) in enumerate(chain.filters.items()):
        if row.verdict and row.verdict[0] == place:
            return row.verdict[1:]
        if getattr(one, "stateful", False):
            reason = one(row.source, row.target)
            if reason is not None:
                return name, reason
    return None


def reject_line(number: int, reason: str, source: str, target: str) -> str:
    # tabs survive the convention "none"
    cells = (text.replace("\t", " ") for text in (reason, source, target))
    return "\t".join((str(number), *cells)) + "\n"


def write_splits(
    kept: Kept,
    labels: Iterable[int],
    languages: Sequence[str],
    names: Sequence[str],
    folder: Path,
) -> None:
    """text/SPLIT.LANG and text/SPLIT.ids of the pairs whose label is the split's place in `SPLITS`."""
    with ExitStack() as stack:
        files = {
            SPLITS.index(name): [
                stack.enter_context(open_lines(folder / f"{name}.{end}", "w"))
                for end in (*languages, "ids")
            ]
            for name in names
        }
        for label, number, pair in zip(labels, kept.numbers, kept.texts(), strict=True):
            for file, text in zip(files[label], (*pair, number), strict=True):
                file.write(f"{text}\n")


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def open_lines(path: Path, mode: str = "r") -> IO[str]:
    r"""UTF-8 in which only "\n" ends a line."""
    return open(path, mode, encoding="utf-8", newline="\n")


@contextmanager
def open_rejects(path: Path) -> Iterator[IO[str]]:
    """A gzip file to write to, without time and name, so that equal content gives equal bytes."""
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file,
    ):
        yield file
