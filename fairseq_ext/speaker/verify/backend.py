"""What is fitted for scores, in one file: mean, LDA, PLDA, cohort, calibration, threshold.

backend = Backend.fit("plda:lda=64", "as_norm:top=100", embeddings, speakers, model.sha256)
backend.save("backend.npz")
Backend.load("backend.npz").scores(people, tests, first, second)
"""

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, Optional, Self

import numpy as np

from ext_common.cli import UserError
from ext_common.manifest import atomic_write
from ext_common.registry import Registry
from fairseq_ext.speaker.verify.calibration import (
    Calibration,
    fit_calibration,
    quality_features,
)
from fairseq_ext.speaker.verify.norms import NORMS, normalised
from fairseq_ext.speaker.verify.scores import SCORES, Arrays, Score, Sides, pair_scores

FORMAT = 1
# Sides whose scores against the cohort are held at a time
ROWS = 4096

Moments = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Side:
    """The recordings of one side of trials.

    recordings: float (n, D) of each of N people or tests; seconds: float (N,), of all recordings of one
    together; hertz: float (N,), up to where there is something in the narrowest. NaN is not known.
    """

    recordings: Sequence[np.ndarray]
    seconds: np.ndarray
    hertz: np.ndarray

    @classmethod
    def of_tests(
        cls, embeddings: np.ndarray, seconds: np.ndarray, hertz: np.ndarray | None = None
    ) -> "Side":
        """One recording each: embeddings (N, D), seconds and hertz (N,)."""
        unknown = np.full(len(embeddings), np.nan)
        rows = [row[None] for row in np.asarray(embeddings)]
        return cls(rows, np.asarray(seconds), unknown if hertz is None else hertz)


QUALITIES = Registry("quality measure")


@QUALITIES.register("duration")
def log_duration(side: Side, cohort: Moments) -> np.ndarray:
    """Logarithm of the seconds of speech."""
    if np.isnan(side.seconds).any():
        raise UserError(
            "the quality measure duration needs durations, which embeddings alone do not have: give prepared"
            " data or audio"
        )
    seconds: np.ndarray = np.log(side.seconds)
    return seconds


@QUALITIES.register("bandwidth")
def log_bandwidth(side: Side, cohort: Moments) -> np.ndarray:
    """Logarithm of the highest frequency that there is something at."""
    if np.isnan(side.hertz).any():
        raise UserError(
            "the quality measure bandwidth needs audio: prepared data and embeddings do not say it"
        )
    hertz: np.ndarray = np.log(side.hertz)
    return hertz


@QUALITIES.register("norm")
def log_norm(side: Side, cohort: Moments) -> np.ndarray:
    """Logarithm of the length of the embeddings, in the mean."""
    return np.array([np.log(np.linalg.norm(one, axis=1)).mean() for one in side.recordings])


@QUALITIES.register("cohort")
def cohort_mean(side: Side, cohort: Moments) -> np.ndarray:
    """Mean score against the cohort, over those that the normalisation counts."""
    return cohort[0]


@dataclass(frozen=True)
class Backend:
    """A score with its normalisation and, once calibrated, its scale.

    score, norm: as in the registries, "name:option=value"; parameters: what the score gave; cohort: float
    (C, D), one mean embedding a person, whose names are `cohort_speakers`; model: SHA-256 of the model, ""
    where not known; threshold: on log-likelihood ratios.
    """

    score: str
    norm: str
    parameters: Arrays
    cohort: np.ndarray
    cohort_speakers: tuple[str, ...]
    model: str
    calibration: Optional[Calibration] = None
    qualities: tuple[str, ...] = ()
    calibration_speakers: tuple[str, ...] = ()
    threshold: Optional[float] = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        score: str,
        norm: str,
        embeddings: np.ndarray,
        speakers: Sequence[str],
        model: str = "",
        notes: dict[str, Any] | None = None,
    ) -> Self:
        """From embeddings (N, D) of `speakers` (N names); the cohort are their means."""
        NORMS.bind(norm)
        entry: Score = SCORES.bind(score)()
        x = np.asarray(embeddings, dtype=np.float64)
        _, labels = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
        try:
            parameters = entry.fit(x, labels)
        except ValueError as error:
            raise UserError(f"--score {score}: {error}") from None
        backend = cls(score, norm, parameters, x[:0], (), model, notes=notes or {})
        return backend.with_cohort(x, speakers)

    def with_cohort(self, embeddings: np.ndarray, speakers: Sequence[str]) -> Self:
        """With the mean embeddings of other people: embeddings (N, D) of `speakers` (N names)."""
        names, labels, counts = np.unique(
            np.asarray(speakers, dtype=str), return_inverse=True, return_counts=True
        )
        sums = np.zeros((len(names), np.shape(embeddings)[1]))
        np.add.at(sums, labels, np.asarray(embeddings, dtype=np.float64))
        cohort = sums / counts[:, None]
        return replace(self, cohort=cohort, cohort_speakers=tuple(names.tolist()))

    def recentred(self, mean: np.ndarray) -> "Backend":
        """With another mean of embeddings (D,): that of recordings like those to be compared.

        The cohort moves along: it stays where it was to what it was fitted with. UserError for a score
        that takes no mean off.
        """
        if "mean" not in self.parameters:
            raise UserError(f"--score {self.score} takes no mean off: leave --mean out")
        parameters = {**self.parameters, "mean": np.asarray(mean, dtype=np.float64)}
        cohort = self.cohort - self.parameters["mean"] + mean
        return replace(self, parameters=parameters, cohort=cohort)

    @classmethod
    def unfitted(cls, score: str, dimensions: int, model: str = "") -> Self:
        """A score that needs nothing fitted, without normalisation; UserError for one that does."""
        if SCORES.bind(score)().needs_fit:
            raise UserError(
                f"--score {score} is fitted first: verify --fit DATA --score {score} --output B.npz, then"
                " --backend B.npz"
            )
        return cls(score, "none", {}, np.zeros((0, dimensions)), (), model)

    def scores(
        self, people: Side, tests: Side, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """Scores float32 (N,) of people[first] against tests[second], normalised, before calibration."""
        embeddings = np.concatenate(list(tests.recordings))
        left, right = self._sides(people.recordings, embeddings)
        found = pair_scores(left, right, first, second)
        if self.norm == "none":
            return found
        sides = self.moments(people), self.moments(tests)
        for start in range(0, len(found), 1 << 20):
            part = slice(start, start + (1 << 20))
            picked = [
                (mean[rows[part]], deviation[rows[part]])
                for (mean, deviation), rows in zip(sides, (first, second), strict=True)
            ]
            found[part] = normalised(found[part], *picked)
        return found

    def _sides(self, people: Sequence[np.ndarray], tests: np.ndarray) -> Sides:
        entry: Score = SCORES.bind(self.score)()
        return entry.sides(self.parameters, people, tests)

    def moments(self, side: Side) -> Moments:
        """Mean and deviation of each of a side against the cohort, float64 (N,), by the normalisation."""
        entry = NORMS.bind(self.norm)
        if not len(self.cohort):
            raise UserError(f"--norm {self.norm} needs a cohort: --backend B.npz made with --fit")
        pieces = []
        for start in range(0, len(side.recordings), ROWS):
            left, right = self._sides(side.recordings[start : start + ROWS], self.cohort)
            try:
                pieces.append(entry((left @ right.T).astype(np.float32)))
            except ValueError as error:
                raise UserError(f"--norm {self.norm}: {error}") from None
        means, deviations = zip(*pieces, strict=True)
        return np.concatenate(means), np.concatenate(deviations)

    def features(
        self,
        scores: np.ndarray,
        people: Side,
        tests: Side,
        first: np.ndarray,
        second: np.ndarray,
        qualities: Sequence[str],
    ) -> np.ndarray:
        """What is calibrated: the score and, of each quality, the smaller one and the difference, (N, F)."""
        columns = [np.asarray(scores, dtype=np.float64)[:, None]]
        if qualities:
            needs = "cohort" in qualities
            if needs and self.norm == "none":
                raise UserError(
                    "the quality measure cohort is what a score normalisation compares with: fit the backend"
                    " with --norm as_norm, or leave the measure out"
                )
            values = []
            for side in (people, tests):
                cohort = self.moments(side) if needs else (np.zeros(0), np.zeros(0))
                values.append(np.stack([QUALITIES.get(q)(side, cohort) for q in qualities], 1))
            columns.append(quality_features(values[0][first], values[1][second]))
        return np.concatenate(columns, axis=1)

    def llr(
        self,
        scores: np.ndarray,
        people: Side,
        tests: Side,
        first: np.ndarray,
        second: np.ndarray,
    ) -> np.ndarray:
        """Calibrated natural log-likelihood ratios float32 (N,) of scores that `scores` gave."""
        if self.calibration is None:
            raise ValueError("this backend is not calibrated")
        found = np.empty(len(scores), dtype=np.float32)
        for start in range(0, len(found), 1 << 20):
            part = slice(start, start + (1 << 20))
            sides = (people, tests, first[part], second[part])
            features = self.features(scores[part], *sides, self.qualities)
            found[part] = self.calibration.llr(features)
        return found

    def calibrated(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        qualities: Sequence[str] = (),
        speakers: Sequence[str] = (),
    ) -> "Backend":
        """This backend with a calibration fitted on what `features` gave (N, F), of trials of `speakers`."""
        try:
            fitted = fit_calibration(features, targets)
        except ValueError as error:
            raise UserError(f"the trials cannot calibrate: {error}") from None
        return replace(
            self,
            calibration=fitted,
            qualities=tuple(qualities),
            calibration_speakers=tuple(speakers),
            threshold=None,
        )

    def check_disjoint(self, speakers: Iterable[str], of: str) -> None:
        """UserError where people of the cohort or of the calibration are among `speakers`."""
        tested = set(speakers)
        cohort = () if self.norm == "none" else self.cohort_speakers
        for what, names in (("calibration", self.calibration_speakers), ("cohort", cohort)):
            both = sorted(tested & set(names))
            if both:
                few = ", ".join(both[:3]) + (", …" if len(both) > 3 else "")
                raise UserError(
                    f"{len(both)} of the speakers of {of} are those of the backend's {what} ({few}): figures"
                    f" on people it was fitted on say nothing; use another {what} or other trials"
                )

    def check_model(self, model: str, where: str) -> None:
        """UserError where embeddings are of another model than what was fitted."""
        if self.model and model and self.model != model:
            raise UserError(
                f"{where} was fitted on embeddings of another model ({self.model[:12]}…, not"
                f" {model[:12]}…): fit it again with this checkpoint"
            )

    # --- the file --------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays that numpy reads without pickle; the same backend gives the same ones."""
        meta = {
            "format": FORMAT,
            "score": self.score,
            "norm": self.norm,
            "model": self.model,
            "cohort_speakers": self.cohort_speakers,
            "qualities": self.qualities,
            "calibration_speakers": self.calibration_speakers,
            "threshold": self.threshold,
            "notes": self.notes,
        }
        found = {"meta": np.array(json.dumps(meta, ensure_ascii=False)), "cohort": self.cohort}
        found |= {f"score_{name}": value for name, value in self.parameters.items()}
        if self.calibration is not None:
            calibration = [self.calibration.offset, *self.calibration.weights]
            found["calibration"] = np.array(calibration, dtype=np.float64)
        return found

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """What `arrays` gave; KeyError or ValueError for anything else."""
        meta = json.loads(str(arrays["meta"]))
        if meta["format"] != FORMAT:
            raise ValueError(f"it has format {meta['format']}, this version reads {FORMAT}")
        parameters = {
            name.removeprefix("score_"): value
            for name, value in arrays.items()
            if name.startswith("score_")
        }
        calibration = None
        if "calibration" in arrays:
            values = arrays["calibration"]
            calibration = Calibration(values[1:], float(values[0]))
        return cls(
            meta["score"],
            meta["norm"],
            parameters,
            arrays["cohort"],
            tuple(meta["cohort_speakers"]),
            meta["model"],
            calibration,
            tuple(meta["qualities"]),
            tuple(meta["calibration_speakers"]),
            meta["threshold"],
            meta["notes"],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str] | IO[bytes]) -> Self:
        """The backend in a file, by its path or open; UserError where it is none."""
        arrays = read_arrays(path, "a backend: verify --fit makes one")
        try:
            return cls.from_arrays(arrays)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is not a backend of verify ({error}): make it again") from None


def write_arrays(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """An .npz whose bytes depend on the arrays alone."""
    with atomic_write(path, "wb") as file:
        np.savez(file, **dict(sorted(arrays.items())))  # type: ignore[arg-type]


def read_arrays(path: str | os.PathLike[str] | IO[bytes], what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz; UserError, which asks for `what`, where it is none."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give {what}") from None
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): give {what}") from None
