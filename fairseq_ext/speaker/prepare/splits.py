"""Which utterances are trained on: seeded splits, stratified by speaker, that keep a group on one
side.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

TRAIN = "train"
H = TypeVar("H", bound=Hashable)


def assign_splits(
    speakers: Sequence[str],
    groups: Iterable[Hashable],
    given: Sequence[str | None],
    fractions: Mapping[str, float],
    seed: int = 1,
) -> list[str]:
    """Complete the splits that the data gives: the rows without one are drawn, by speaker and
    seeded.

    speakers: N names; groups: N hashable, rows with equal ones stay together; given: N split names
    or None; fractions: {"valid": 0.1, "test": 0.1}, of each speaker's rows, for splits that are to
    be drawn. Returns N split names.

    A drawn row follows a given one of its group. Every speaker keeps at least one row in train; one
    with two groups or more gets into the first split of `fractions`, with three or more into
    both, and so on.
    """
    check_fractions(fractions)
    splits = list(given)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    free = []
    for rows in members.values():
        fixed = {given[row] for row in rows} - {None}
        if len(fixed) == 1:
            (split,) = fixed
            for row in rows:
                splits[row] = split
        elif any(given[row] is None for row in rows):
            free.append([row for row in rows if given[row] is None])
    draw(free, speakers, splits, fractions, seed)
    return [split or TRAIN for split in splits]


def draw(
    units: Sequence[list[int]],
    speakers: Sequence[str],
    splits: list[str | None],
    fractions: Mapping[str, float],
    seed: int,
) -> None:
    """Move units (lists of rows) out of train, writing into `splits`."""
    sizes = [count(speakers[row] for row in unit) for unit in units]
    of_speaker: dict[str, list[int]] = defaultdict(list)
    for index, size in enumerate(sizes):
        for speaker in size:
            of_speaker[speaker].append(index)
    rng = np.random.default_rng(seed)
    for speaker in sorted(of_speaker):
        rng.shuffle(of_speaker[speaker])
    drawable = {s: sum(sizes[i][s] for i in indices) for s, indices in of_speaker.items()}
    left = count(s for s, split in zip(speakers, splits, strict=True) if split in (None, TRAIN))
    active = [name for name, fraction in fractions.items() if fraction > 0]
    taken: dict[str, dict[str, int]] = {name: defaultdict(int) for name in active}
    free = [True] * len(units)

    def movable(index: int) -> bool:
        return free[index] and all(left[s] > rows for s, rows in sizes[index].items())

    def move(index: int, split: str) -> None:
        free[index] = False
        for speaker, rows in sizes[index].items():
            left[speaker] -= rows
            taken[split][speaker] += rows
        for row in units[index]:
            splits[row] = split

    for later, split in zip(reversed(range(len(active))), active, strict=True):
        for speaker in sorted(of_speaker):
            target = max(1, round(fractions[split] * drawable[speaker]))
            # What later splits are to draw must not come out of train's last row.
            target = min(target, max(1, left[speaker] - 1 - later))
            for index in of_speaker[speaker]:
                if taken[split][speaker] >= target:
                    break
                room = target - taken[split][speaker]
                if sizes[index][speaker] <= room and movable(index):
                    move(index, split)
            candidates = [] if taken[split][speaker] else filter(movable, of_speaker[speaker])
            smallest = min(candidates, key=lambda i: sum(sizes[i].values()), default=None)
            if smallest is not None:
                move(smallest, split)


def overlapping_groups(
    recordings: Sequence[Hashable],
    starts: Sequence[float | None],
    ends: Sequence[float | None],
    groups: Iterable[Hashable | None],
) -> list[int]:
    """Group numbers, N: rows share one where their group is equal or where they overlap in time.

    recordings: N hashable; starts, ends: N seconds (None: from the start, to the end); groups: N
    hashable, None for a row that is alone.
    """
    parent = list(range(len(recordings)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_of: dict[Hashable, int] = {}
    for row, group in enumerate(groups):
        if group is not None:
            parent[find(row)] = find(first_of.setdefault(group, row))
    for rows in by_time(recordings, starts, ends):
        reach, last = rows[0][1], rows[0][2]
        for start, end, row in rows[1:]:
            if start < reach:
                parent[find(row)] = find(last)
            if end > reach:
                reach, last = end, row
    return [find(row) for row in range(len(recordings))]


def split_overlaps(
    recordings: Iterable[Hashable],
    starts: Sequence[float | None],
    ends: Sequence[float | None],
    splits: Sequence[str],
) -> list[tuple[int, int]]:
    """Pairs of rows (i, j) of different splits that overlap in time, at least one for each such
    recording.
    """
    pairs: list[tuple[int, int]] = []
    for rows in by_time(recordings, starts, ends):
        open_rows: list[tuple[float, int]] = []
        for start, end, row in rows:
            open_rows = [(e, r) for e, r in open_rows if e > start]
            others = [r for _, r in open_rows if splits[r] != splits[row]]
            pairs += [(min(r, row), max(r, row)) for r in others[:1]]
            open_rows.append((end, row))
    return pairs


def shared_between_splits(recordings: Iterable[H], splits: Iterable[str]) -> list[H]:
    """Keys of `recordings` that have rows in more than one split, in order of appearance."""
    seen: dict[H, set[str]] = defaultdict(set)
    for recording, split in zip(recordings, splits, strict=True):
        seen[recording].add(split)
    return [recording for recording, found in seen.items() if len(found) > 1]


def check_fractions(fractions: Mapping[str, float]) -> None:
    """ValueError where fractions are negative or leave nothing to train on."""
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} fraction {fraction} must lie in [0, 1)")
    if sum(fractions.values()) >= 1:
        raise ValueError(f"fractions {fractions} leave nothing to train on")


def by_time(
    recordings: Iterable[Hashable],
    starts: Sequence[float | None],
    ends: Sequence[float | None],
) -> list[list[tuple[float, float, int]]]:
    """For each recording its rows as (start, end, row), sorted by start."""
    rows: dict[Hashable, list[tuple[float, float, int]]] = defaultdict(list)
    for row, recording in enumerate(recordings):
        start, end = starts[row], ends[row]
        first = 0.0 if start is None else start
        rows[recording].append((first, float("inf") if end is None else end, row))
    return [sorted(group) for group in rows.values()]


def count(items: Iterable[H]) -> dict[H, int]:
    """{item: how often}."""
    counts: dict[H, int] = defaultdict(int)
    for item in items:
        counts[item] += 1
    return counts
