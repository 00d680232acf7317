"""Lists of trials: who is compared with whom, and whether they are the same person.

Two forms are read, `1 a b` / `0 a b` (VoxCeleb) and `a b target` / `a b nontarget` (Kaldi), and `a b` without
the answer. In memory a trial is two row numbers and a bool.
"""

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from ext_common.cli import UserError, did_you_mean, progress
from ext_common.manifest import atomic_write

ANSWERS = {"target": 1, "nontarget": 0}
FORMS = {"voxceleb": "1 a b", "kaldi": "a b target", "unlabelled": "a b"}


@dataclass(frozen=True)
class Trials:
    """first, second: int32 (N,), row numbers of both sides; targets: bool (N,), None without answers."""

    first: np.ndarray
    second: np.ndarray
    targets: Optional[np.ndarray]

    def __len__(self) -> int:
        return len(self.first)


def read_trials(
    path: str | os.PathLike[str],
    people: Mapping[str, int],
    tests: Mapping[str, int] | None = None,
) -> Trials:
    """The trials in a file, as the numbers that `people` and `tests` (None: the same) give its ids.

    UserError with the line for an id that is not there, another form than the first line's, a pair that
    came before, and a recording that is compared with itself.
    """
    tests = people if tests is None else tests
    columns = array("i"), array("i"), array("b")
    numbers = array("i")
    form, target = "", 0
    try:
        with open(path, encoding="utf-8-sig") as file, progress(0, "trials", "lines") as bar:
            for number, line in enumerate(file, 1):
                parts = line.split()
                if not parts:
                    continue
                form = form or _form(parts, f"{path}, line {number}")
                try:
                    if form == "voxceleb":
                        answer, a, b = parts
                        target = _BITS[answer]
                    elif form == "kaldi":
                        a, b, answer = parts
                        target = ANSWERS[answer]
                    else:
                        a, b = parts
                    row = people[a], tests[b]
                except (KeyError, ValueError):
                    raise UserError(
                        f"{path}, line {number}: {_why(parts, form, people, tests)}"
                    ) from None
                columns[0].append(row[0])
                columns[1].append(row[1])
                columns[2].append(target)
                numbers.append(number)
                if number % 100_000 == 0:
                    bar.update(100_000)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give a list of trials") from None
    first, second = (np.frombuffer(column, dtype=np.int32) for column in columns[:2])
    if not len(first):
        raise UserError(f"{path} holds no trials: a line is `1 a b`, `0 a b` or `a b target`")
    targets = np.frombuffer(columns[2], dtype=np.int8).astype(bool)
    _refuse_repeated(path, first, second, np.frombuffer(numbers, dtype=np.int32))
    if people is tests and (first == second).any():
        at = numbers[int(np.argmax(first == second))]
        raise UserError(f"{path}, line {at}: a recording is compared with itself: leave it out")
    return Trials(first, second, None if form == "unlabelled" else targets)


_BITS = {"1": 1, "0": 0}


def _form(parts: Sequence[str], where: str) -> str:
    if len(parts) == 3 and parts[2] in ANSWERS:
        return "kaldi"
    if len(parts) == 3 and parts[0] in _BITS:
        return "voxceleb"
    if len(parts) == 2:
        return "unlabelled"
    raise UserError(
        f"{where}: a trial is `1 a b`, `0 a b`, `a b target` or `a b nontarget`, got"
        f" {' '.join(parts)[:60]!r}"
    )


def _why(
    parts: Sequence[str], form: str, people: Mapping[str, int], tests: Mapping[str, int]
) -> str:
    """What is wrong with a line, and the remedy."""
    shape = len(parts) == (2 if form == "unlabelled" else 3)
    answered = form == "unlabelled" or (
        parts[0] in _BITS if form == "voxceleb" else parts[-1] in ANSWERS
    )
    if not (shape and answered):
        return (
            f"{' '.join(parts)[:60]!r} is not like the first line, which is of the form"
            f" `{FORMS[form]}`: one list has one form"
        )
    a, b = {"voxceleb": parts[1:], "kaldi": parts[:2]}.get(form, parts)
    name, known = (a, people) if a not in people else (b, tests)
    near = did_you_mean(name, list(known)[:20_000]) or ": correct it or leave the line out"
    return f"{name!r} is not among the {len(known)} recordings{near}"


def _refuse_repeated(
    path: str | os.PathLike[str], first: np.ndarray, second: np.ndarray, numbers: np.ndarray
) -> None:
    keys = first.astype(np.int64) * (int(second.max()) + 1) + second
    ordered = np.sort(keys)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        lines = numbers[np.flatnonzero(keys == repeated[0])]
        raise UserError(
            f"{path}, line {lines[1]}: this pair stands in line {lines[0]} already: leave one out"
        )


def make_trials(
    speakers: Sequence[str], recordings: Sequence[str], count: int | None, seed: int
) -> Trials:
    """All pairs of N recordings, or `count` of them drawn with `seed`; a pair of one recording is left out.

    speakers, recordings: N names; cuts of one recording are no fair trial, as the room says it all. Drawn
    are as many targets as others, as far as there are. A pair comes once: first < second.
    """
    _, who = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
    _, cut = np.unique(np.asarray(recordings, dtype=str), return_inverse=True)
    first, second = (side.astype(np.int32) for side in np.triu_indices(len(who), 1))
    fair = cut[first] != cut[second]
    first, second = first[fair], second[fair]
    targets = who[first] == who[second]
    if count is not None and count < len(first):
        rng = np.random.default_rng(seed)
        same, other = np.flatnonzero(targets), np.flatnonzero(~targets)
        wanted = min(len(same), max(count // 2, count - len(other)))
        drawn = [rng.choice(same, wanted, False), rng.choice(other, count - wanted, False)]
        rows = np.sort(np.concatenate(drawn))
        first, second, targets = first[rows], second[rows], targets[rows]
    return Trials(first, second, targets)


def write_trials(path: str | os.PathLike[str], trials: Trials, ids: Sequence[str]) -> None:
    """`1 a b` or `0 a b` a line; UserError for ids with white space, which a list cannot hold."""
    spaced = next((name for name in ids if name.split() != [name]), None)
    if spaced is not None:
        raise UserError(
            f"{spaced!r} has white space, which a list of trials cannot hold: rename it"
        )
    assert trials.targets is not None
    with atomic_write(path) as file:
        for a, b, target in zip(trials.first, trials.second, trials.targets, strict=True):
            file.write(f"{int(target)} {ids[a]} {ids[b]}\n")


def write_scores(
    path: str | os.PathLike[str],
    trials: Trials,
    scores: np.ndarray,
    people: Sequence[str],
    tests: Sequence[str],
) -> None:
    """`a b score label` a line, the label as 1 or 0 where there is one; nine digits: every bit of float32."""
    with atomic_write(path) as file, progress(len(trials), "writing", "trials") as bar:
        for start in range(0, len(trials), 1 << 16):
            part = slice(start, start + (1 << 16))
            rows = [
                [people[i] for i in trials.first[part].tolist()],
                [tests[i] for i in trials.second[part].tolist()],
                [f"{score:.9g}" for score in scores[part].tolist()],
            ]
            if trials.targets is not None:
                rows.append(["1" if target else "0" for target in trials.targets[part].tolist()])
            file.writelines(" ".join(row) + "\n" for row in zip(*rows, strict=True))
            bar.update(len(rows[0]))


def read_enrolment(
    path: str | os.PathLike[str], index: Mapping[str, int]
) -> tuple[list[str], list[np.ndarray]]:
    """People of several recordings, a line each: `name id id …` (Kaldi's spk2utt), as row numbers.

    UserError with the line for an id that is not there and a name that comes twice.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                name, *ids = line.split() or [""]
                if not name:
                    continue
                if name in found or not ids:
                    why = "comes twice" if name in found else "has no recordings"
                    raise UserError(f"{path}, line {number}: {name!r} {why}: mend the line")
                unknown = next((one for one in ids if one not in index), None)
                if unknown is not None:
                    raise UserError(
                        f"{path}, line {number}: {unknown!r} is not among the {len(index)} recordings"
                        f"{did_you_mean(unknown, list(index)[:20_000]) or ': correct it'}"
                    )
                found[name] = np.array([index[one] for one in ids], dtype=np.int64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{path} names nobody: a line is `name id id …`")
    return list(found), list(found.values())
