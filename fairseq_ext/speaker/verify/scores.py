"""Scores of two embeddings, or of a person's several and one, by name.

An entry is a class made with its options: `fit(embeddings (N, D), labels (N,))` gives arrays, and
`sides(arrays, people, tests)` vectors whose inner products are the scores, so that any number of pairs is a
product of matrices. `people` is a list of embeddings of each person (n, D), as `tests` (T, D) are raw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional, Protocol

import numpy as np

from ext_common.registry import Registry
from fairseq_ext.speaker.verify.plda import Plda, fit_lda, fit_plda, scale_to_sphere

SCORES = Registry("score")
# Scores that are held at a time as a matrix of all rows with all columns, and pairs in one go
MATRIX = 1 << 25
PAIRS = 1 << 16
# A score of a matrix costs so much less than one of two rows that are fetched
CHEAPER = 50

Arrays = dict[str, np.ndarray]
Sides = tuple[np.ndarray, np.ndarray]


class Score(Protocol):
    """What an entry of SCORES is."""

    needs_fit: ClassVar[bool]

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Arrays:
        """From embeddings (N, D) and speakers' numbers (N,); "mean" (D,) is what is taken off first."""

    def sides(self, arrays: Arrays, people: Sequence[np.ndarray], tests: np.ndarray) -> Sides:
        """float64 (M, K) and (T, K), of which the inner products are the scores."""


@SCORES.register("cosine")
class Cosine:
    """Cosine; of several recordings of a person, the mean of directions."""

    needs_fit: ClassVar[bool] = False

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Arrays:
        return {}

    def sides(self, arrays: Arrays, people: Sequence[np.ndarray], tests: np.ndarray) -> Sides:
        mean = arrays.get("mean", np.zeros(1))
        together, counts = _together(people)
        return unit(_means(unit(together - mean), counts)), unit(
            np.asarray(tests, dtype=np.float64) - mean
        )


@SCORES.register("mean_cosine")
class MeanCosine(Cosine):
    """Cosine after the mean embedding of the fitted data is taken off."""

    needs_fit: ClassVar[bool] = True

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Arrays:
        return {"mean": np.asarray(embeddings, dtype=np.float64).mean(0)}


@dataclass
class PldaOptions:
    """Options of `plda`."""

    lda: Optional[int] = field(
        default=None,
        metadata={"help": "dimensions that linear discriminants leave; none: all, without LDA"},
    )
    length: bool = field(
        default=True, metadata={"help": "scale embeddings to one length before the model"}
    )
    iterations: int = field(default=10, metadata={"help": "steps of EM"})


@SCORES.register("plda", options=PldaOptions)
class PldaScore:
    """Log-likelihood ratio of two-covariance PLDA; several recordings of a person by the formula."""

    needs_fit: ClassVar[bool] = True

    def __init__(self, lda: int | None = None, length: bool = True, iterations: int = 10) -> None:
        self.lda, self.length, self.iterations = lda, length, iterations

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> Arrays:
        x = np.asarray(embeddings, dtype=np.float64)
        arrays = {"mean": x.mean(0)}
        if self.lda is not None:
            arrays["lda"] = fit_lda(x, labels, self.lda)
        model = fit_plda(self._prepared(arrays, x), labels, self.iterations)
        named = {"plda_mean": model.mean, "plda_transform": model.transform, "psi": model.psi}
        return {**arrays, **named}

    def sides(self, arrays: Arrays, people: Sequence[np.ndarray], tests: np.ndarray) -> Sides:
        plda = Plda(*(arrays[name] for name in ("plda_mean", "plda_transform", "psi")))
        together, counts = _together(people)
        means = _means(plda.project(self._prepared(arrays, together)), counts)
        return plda.sides(means, counts, plda.project(self._prepared(arrays, tests)))

    def _prepared(self, arrays: Arrays, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float64) - arrays["mean"]
        if "lda" in arrays:
            x = x @ arrays["lda"].T
        return scale_to_sphere(x) if self.length else x


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to length 1; a row of zeros stays."""
    scaled: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return scaled


def _together(people: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All recordings, float64 (sum of n, D), and how many each person has, int64 (M,)."""
    counts = np.array([len(one) for one in people])
    return np.concatenate(list(people)).astype(np.float64), counts


def _means(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    starts = np.cumsum(counts) - counts
    means: np.ndarray = np.add.reduceat(rows, starts, axis=0) / counts[:, None]
    return means


def pair_scores(
    left: np.ndarray, right: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """left[first] · right[second], float32 (N,): scores of pairs by their rows in (M, K) and (T, K).

    Where the pairs are a good part of all there are, from a matrix of all in pieces, else one by one.
    """
    left, right = (np.ascontiguousarray(side, dtype=np.float32) for side in (left, right))
    found = np.empty(len(first), dtype=np.float32)
    if len(left) * len(right) > CHEAPER * len(first):
        for start in range(0, len(first), PAIRS):
            part = slice(start, start + PAIRS)
            np.einsum("nk,nk->n", left[first[part]], right[second[part]], out=found[part])
        return found
    rows = max(1, MATRIX // len(right))
    pieces = -(-len(left) // rows)
    if pieces == 1:
        matrix = left @ right.T
        for start in range(0, len(first), 1 << 20):
            part = slice(start, start + (1 << 20))
            found[part] = matrix[first[part], second[part]]
        return found
    # each piece of rows with its own pairs, in their order
    order = np.argsort(first // rows, kind="stable")
    edges = np.searchsorted(first[order] // rows, np.arange(pieces + 1))
    for piece in range(pieces):
        chosen = order[edges[piece] : edges[piece + 1]]
        matrix = left[piece * rows : (piece + 1) * rows] @ right.T
        found[chosen] = matrix[first[chosen] - piece * rows, second[chosen]]
    return found
