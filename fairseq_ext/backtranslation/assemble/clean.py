"""Synthetic pairs to those that are trained on: normalised, filtered, kept away from valid and test.

All in bounded memory: of a pair nothing stays but its score while a filter wants scores (8 bytes), its
place in a draw where only some are wanted (8 bytes), and what filters remember.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ext_common.cli import progress
from ext_common.parallel import in_order
from fairseq_ext.backtranslation.assemble.synthetic import (
    Pair,
    Synthetic,
    clean_synthetic,
    with_gaps,
    without_gaps,
)
from fairseq_ext.translation.prepare.filter_chain import FilterChain, sample
from fairseq_ext.translation.prepare.hashes import text_hash
from fairseq_ext.translation.prepare.leaks import LeakGuard
from fairseq_ext.translation.prepare.report import count_reason
from fairseq_ext.translation.prepare.steps import BATCH, batches, open_lines, reject_line
from fairseq_ext.translation.text.normalise import normalise

UNUSABLE, LEAK, DRAW = "unusable", "leak", "max_synthetic"
SAMPLED = 2000


class Row(NamedTuple):
    """A synthetic pair after cleaning.

    name: what train.ids calls it; source, target: normalised; judged: the source as filters see it;
    verdict: (place in the chain, reason) of the first filter without memory that removes it, or None;
    unusable, leak: why it cannot or must not be trained on, or None.
    """

    name: str
    source: str
    target: str
    judged: str
    score: float | None
    verdict: tuple[int, str] | None = None
    unusable: str | None = None
    leak: str | None = None


class Cleaner:
    """Pairs of a synthetic folder to :class:`Row`, without memory, so that processes can share the work.

    name: of the folder in train.ids; direction: (synthetic language, real language).
    """

    def __init__(
        self,
        name: str,
        synthetic: Synthetic,
        direction: tuple[str, str],
        convention: str,
        chain: FilterChain,
        guard: LeakGuard | None,
    ):
        self.name, self.direction, self.convention = name, direction, convention
        self.fillers, self.guard = synthetic.fillers, guard
        self.filters = [
            (place, one) for place, one in enumerate(chain.filters.values()) if not is_stateful(one)
        ]

    def __call__(self, batch: Sequence[Pair]) -> list[Row]:
        return [self.row(pair) for pair in batch]

    def row(self, pair: Pair) -> Row:
        name = pair_name(self.name, pair.line, pair.rank)
        source = clean_synthetic(pair.synthetic, self.direction[0], self.convention, self.fillers)
        target = normalise(pair.real, self.direction[1], self.convention).strip()
        judged = with_gaps(source) if self.fillers else source
        row = Row(name, source, target, judged, pair.score)
        if pair.reason or not source or not target:
            side = "real" if source else "synthetic"
            return row._replace(unusable=pair.reason or f"nothing is left of the {side} line")
        for place, one in self.filters:
            texts = (pair.synthetic, pair.real) if is_raw(one) else (judged, target)
            reason = one(*texts, *more_arguments(one, pair.score))
            if reason is not None:
                return row._replace(verdict=(place, reason))
        if self.guard is not None:
            # a gap is no letter, so it is not seen by the guard either
            leak = self.guard.find_pair(dict(zip(self.direction, (judged, target), strict=True)))
            return row._replace(leak=leak)
        return row


@dataclass
class Found:
    """What became of the pairs of one folder.

    removed: by filter, "leak" or "unusable"; reasons: why lines were unusable, without their numbers;
    places: of the kept pairs in a draw; leaks: the first few.
    """

    name: str
    read: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    leaks: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """A random sample of a folder's usable (source, target) lines, and all their finite scores."""

    pairs: list[tuple[str, str]]
    scores: "array[float]"


def survey(synthetic: Synthetic, want_scores: bool, seed: int) -> Survey:
    """Read a folder once; UserError where its files do not fit each other."""
    scores = array("d")

    def usable() -> Iterator[tuple[str, str]]:
        total = synthetic.lines * synthetic.nbest
        for pair in progress(
            synthetic.pairs(), f"read {synthetic.path.name}", "pairs", total=total
        ):
            if pair.reason is None:
                if want_scores and pair.score is not None and isfinite(pair.score):
                    scores.append(pair.score)
                yield pair.synthetic, pair.real

    drawn = sample(usable(), SAMPLED, seed)
    if synthetic.fillers:
        drawn = [(without_gaps(with_gaps(source)), target) for source, target in drawn]
    return Survey(drawn, scores)


def clean(
    synthetic: Synthetic,
    cleaner: Cleaner,
    chain: FilterChain,
    folder: Path,
    rejects: IO[str],
    workers: int,
    place: Callable[[str], int] | None = None,
) -> Found:
    """Write NAME.source, NAME.target and NAME.ids of the pairs to keep into `folder`.

    place: of a pair in a draw, by its name; remembered for kept ones.
    """
    found = Found(cleaner.name)
    total = synthetic.lines * synthetic.nbest
    with ExitStack() as stack:
        files = [
            stack.enter_context(open_lines(path, "w")) for path in part_files(folder, found.name)
        ]
        bar = stack.enter_context(progress(total, f"filter {synthetic.path.name}", "pairs"))
        for rows in in_order(cleaner, batches(synthetic.pairs(), BATCH), workers):
            for row, verdict in zip(rows, judge(rows, chain), strict=True):
                if verdict:
                    found.removed[verdict[0]] += 1
                    rejects.write(reject_line(row.name, ": ".join(verdict), row.source, row.target))
                    if verdict[0] == UNUSABLE:
                        count_reason(found.reasons, verdict[1])
                    elif verdict[0] == LEAK and len(found.leaks) < 3:
                        found.leaks.append(row)
                    continue
                found.kept += 1
                if place is not None:
                    found.places.append(place(row.name))
                for file, text in zip(files, (row.source, row.target, row.name), strict=True):
                    file.write(text + "\n")
            found.read += len(rows)
            bar.update(len(rows))
    return found


def judge(rows: Sequence[Row], chain: FilterChain) -> list[tuple[str, str] | None]:
    """(filter, "leak" or "unusable", reason) for each row to remove, None for one to keep.

    Filters without memory have judged already; each of the others sees, in order, what those before it
    let through.
    """
    verdicts = [(UNUSABLE, row.unusable) if row.unusable else None for row in rows]
    alive = [n for n, row in enumerate(rows) if not row.unusable]
    for place, (name, one) in enumerate(chain.filters.items()):
        if not is_stateful(one):
            verdicts_here = [rows[n].verdict for n in alive]
            reasons = [v[1] if v and v[0] == place else None for v in verdicts_here]
        elif getattr(one, "batched", False):
            reasons = one.judge_many([(rows[n].judged, rows[n].target) for n in alive])
        else:
            judged = (rows[n] for n in alive)
            reasons = [one(r.judged, r.target, *more_arguments(one, r.score)) for r in judged]
        for n, reason in zip(alive, reasons, strict=True):
            if reason is not None:
                verdicts[n] = name, reason
        alive = [n for n in alive if verdicts[n] is None]
    for n in alive:
        leak = rows[n].leak
        if leak:
            verdicts[n] = LEAK, leak
    return verdicts


def draw(found: Sequence[Found], most: int | None, folder: Path, rejects: IO[str]) -> None:
    """Leave a random part of all kept pairs, `most` of them, in the files of `folder`.

    The pairs of a smaller `most` are among those of a larger one.
    """
    kept = sum(one.kept for one in found)
    if most is None or kept <= most:
        return
    places = np.concatenate([np.frombuffer(one.places, dtype=np.uint64) for one in found])
    limit = int(np.partition(places, most)[most])
    for one in found:
        old = part_files(folder, one.name)
        new = [path.with_name(path.name + ".drawn") for path in old]
        with ExitStack() as stack:
            reading = [stack.enter_context(open_lines(path)) for path in old]
            writing = [stack.enter_context(open_lines(path, "w")) for path in new]
            for place, lines in zip(one.places, zip(*reading, strict=True), strict=True):
                if place < limit:
                    for file, line in zip(writing, lines, strict=True):
                        file.write(line)
                    continue
                one.removed[DRAW] += 1
                source, target, name = (line.removesuffix("\n") for line in lines)
                rejects.write(
                    reject_line(name, f"{DRAW}: not among the {most:,} drawn", source, target)
                )
        for path, drawn in zip(old, new, strict=True):
            drawn.replace(path)
        one.kept -= one.removed[DRAW]


def draw_place(seed: int) -> Callable[[str], int]:
    """What orders pairs for :func:`draw`: a hash of their names."""
    return lambda name: text_hash(f"{seed} {name}")


def pair_name(folder: str, line: int, rank: int) -> str:
    """What train.ids calls a pair: bt1:17, and bt1:17:2 for the second best of line 17."""
    return f"{folder}:{line}" if rank == 1 else f"{folder}:{line}:{rank}"


def part_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.{end}" for end in ("source", "target", "ids")]


def more_arguments(one: Callable[..., Any], score: float | None) -> tuple[Any, ...]:
    return (score,) if getattr(one, "wants_score", False) else ()


def is_stateful(one: Callable[..., Any]) -> bool:
    return getattr(one, "stateful", False)


def is_raw(one: Callable[..., Any]) -> bool:
    return getattr(one, "raw", False)
