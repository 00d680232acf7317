"""What a list of trials compares, and the record of how good its scores are."""

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.verify import report
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.metrics import bayes_threshold, rates_at, threshold_at
from fairseq_ext.speaker.verify.trials import Trials, read_enrolment, read_trials
from fairseq_ext.speaker.verify.voices import Runner, Voices, open_voices, row_numbers


class Pair(NamedTuple):
    """Two recordings compared. score: as the backend scores; llr: natural, None where not calibrated."""

    score: float
    llr: float | None


def compared_files(paths: Sequence[str], runner: Runner, backend: Backend) -> Pair:
    """Two audio files."""
    found = open_voices(paths).embed(runner, [0, 1])
    parts = found.embeddings, found.seconds, found.hertz
    one, two = (Side.of_tests(*(part[i : i + 1] for part in parts)) for i in (0, 1))
    sides = one, two, np.zeros(1, np.int32), np.zeros(1, np.int32)
    scores = backend.scores(*sides)
    if backend.calibration is None:
        return Pair(float(scores[0]), None)
    return Pair(float(scores[0]), float(backend.llr(scores, *sides)[0]))


class Compared:
    """Trials with all that their scores are made of: embeddings, speakers, answers.

    enrol: path of a list of people of several recordings, which is then what the first ids of trials are.
    speakers: names of those who are compared, None where one is not known; UserError where the backend was
    fitted on any of them or where an answer contradicts them.
    """

    def __init__(
        self,
        voices: Voices,
        trials_path: str,
        backend: Backend,
        runner: Runner,
        enrol: str | None = None,
    ) -> None:
        self.voices = voices
        index = row_numbers(voices)
        names, members = voices.ids, [np.array([row]) for row in range(len(voices.ids))]
        if enrol:
            names, members = read_enrolment(enrol, index)
            people = {name: i for i, name in enumerate(names)}
            trials = read_trials(trials_path, people, index)
        else:
            trials = read_trials(trials_path, index)
        # only what the trials name is embedded
        used, first = np.unique(trials.first, return_inverse=True)
        tests, second = np.unique(trials.second, return_inverse=True)
        self.trials = Trials(first.astype(np.int32), second.astype(np.int32), trials.targets)
        self.ids = [names[i] for i in used], [voices.ids[i] for i in tests]
        members = [members[i] for i in used]
        needed = np.unique(np.concatenate([*members, tests]))
        places = [np.searchsorted(needed, rows) for rows in members]
        tests = np.searchsorted(needed, tests)
        self.speakers = self._speakers_of(needed, backend, trials_path)
        self.numbers: tuple[np.ndarray, np.ndarray] | None = None
        if self.speakers is not None:
            numbers = np.unique(np.array(self.speakers), return_inverse=True)[1].astype(np.int32)
            self.numbers = numbers[np.array([p[0] for p in places])], numbers[tests]
            self._check_answers(trials_path)
        found = voices.embed(runner, needed.tolist())
        seconds = np.array([found.seconds[p].sum() for p in places])
        hertz = np.array([found.hertz[p].min() for p in places])
        self.first = Side([found.embeddings[p] for p in places], seconds, hertz)
        self.second = Side.of_tests(
            *(x[tests] for x in (found.embeddings, found.seconds, found.hertz))
        )

    @property
    def sides(self) -> tuple[Side, Side, np.ndarray, np.ndarray]:
        """People, tests, and the row of each trial in both."""
        return self.first, self.second, self.trials.first, self.trials.second

    @property
    def trial_speakers(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The speakers' numbers of both sides of each trial, int32 (N,)."""
        if self.numbers is None:
            return None
        return self.numbers[0][self.trials.first], self.numbers[1][self.trials.second]

    def _speakers_of(self, rows: np.ndarray, backend: Backend, where: str) -> list[str] | None:
        names = [self.voices.speakers[row] for row in rows]
        known = [name for name in names if name is not None]
        backend.check_disjoint(known, where)
        if len(known) == len(names):
            return known
        if backend.cohort_speakers:
            print(
                f"{self.voices.name} does not name all speakers: that they are other people than those of"
                " the backend is not checked",
                file=sys.stderr,
            )
        return None

    def _check_answers(self, path: str) -> None:
        sides = self.trial_speakers
        if sides is None or self.trials.targets is None:
            return
        same = sides[0] == sides[1]
        wrong = same != self.trials.targets
        if wrong.any():
            at = int(np.argmax(wrong))
            a, b = self.ids[0][self.trials.first[at]], self.ids[1][self.trials.second[at]]
            raise UserError(
                f"{path}: {a} and {b} are {'one speaker' if same[at] else 'two speakers'} in"
                f" {self.voices.name}, but the answer says otherwise: mend one of them"
            )


def measured(
    compared: Compared,
    scores: np.ndarray,
    backend: Backend,
    asked: str | None,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """The record of metrics.json, of scores (N,) of trials with answers; asked: as of `asked_threshold`."""
    targets = compared.trials.targets
    assert targets is not None
    if targets.all() or not targets.any():
        raise UserError("the trials are of one kind only, which says nothing: add the other kind")
    calibrated = backend.calibration is not None
    began = time.perf_counter()
    record: dict[str, Any] = {
        "trials": len(targets),
        "targets": int(targets.sum()),
        "speakers": None if compared.speakers is None else len(set(compared.speakers)),
        "score": backend.score,
        "norm": backend.norm,
        "calibrated": calibrated,
        "metrics": report.measure(scores, targets, calibrated),
        "interval95": {},
        "draws": draws,
        "seconds": {"measuring": time.perf_counter() - began},
    }
    sides = compared.trial_speakers
    if sides is not None and draws:
        try:
            drawn = report.resampled(scores, targets, sides, calibrated, draws, seed)
            record["interval95"] = report.intervals(record["metrics"], drawn)
        except ValueError as error:
            print(f"no intervals: {error}", file=sys.stderr)
        record["seconds"]["measuring_and_intervals"] = time.perf_counter() - began
    threshold = backend.threshold
    if asked:
        threshold = asked_threshold(asked, calibrated, scores, targets)
    if threshold is not None:
        misses, accepts = rates_at(scores, targets, threshold)
        record["threshold"] = {"value": threshold, "misses": misses, "false_accepts": accepts}
    return record


def asked_threshold(
    text: str,
    calibrated: bool,
    scores: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> float:
    """The threshold that "fa=RATE", "cost=PRIOR" or a number asks for; a rate needs scores with answers."""
    kind, equals, value = text.partition("=")
    try:
        number = float(value if equals else kind)
    except ValueError:
        number = float("nan")
    if (equals and kind not in ("fa", "cost")) or not np.isfinite(number):
        raise UsageError(f"--threshold is fa=RATE, cost=PRIOR or a number, got {text!r}")
    if not equals:
        return number
    if not 0 < number < 1:
        raise UsageError(f"--threshold {text}: a rate or prior lies between 0 and 1")
    if kind == "fa":
        if scores is None or targets is None:
            raise UsageError(
                "--threshold fa=RATE needs trials: keep it in a backend by --calibrate"
            )
        return threshold_at(scores, targets, number)
    if not calibrated:
        raise UsageError(
            f"--threshold {text} is for calibrated scores: --backend after --calibrate"
        )
    return bayes_threshold(number)
