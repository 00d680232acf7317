"""Normalisation of scores by those against a cohort of other people.

How strangers score against a side says what a score with it is worth: a recording that everybody resembles
needs a higher one. Entries take each side's scores against the cohort, (N, C), and give its mean and standard
deviation, which `normalised` applies.
"""

from dataclasses import dataclass, field

import numpy as np

from ext_common.registry import Registry

NORMS = Registry("score normalisation")


@dataclass
class AsNormOptions:
    """Options of `as_norm`."""

    top: int = field(
        default=200, metadata={"help": "people of the cohort that score best with a side and count"}
    )

    def __post_init__(self) -> None:
        if self.top < 2:
            raise ValueError(f"top must be at least 2, got {self.top}")


@NORMS.register("none")
def no_norm(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as they are."""
    return np.zeros(len(scores)), np.ones(len(scores))


@NORMS.register("s_norm")
def s_norm(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over the whole cohort (symmetric, Kenny 2010)."""
    return as_norm(scores, scores.shape[1])


@NORMS.register("as_norm", options=AsNormOptions)
def as_norm(scores: np.ndarray, top: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over the best of the cohort for each side (Matějka et al. 2017, AS-norm 1).

    scores: (N, C) → (mean, population deviation), float64 (N,). A cohort of fewer than `top` counts whole;
    ValueError for fewer than two.
    """
    count = scores.shape[1]
    if count < 2:
        raise ValueError(f"a cohort of {count} people says nothing about scores: two are needed")
    top = min(top, count)
    best = np.partition(scores, count - top, axis=1)[:, count - top :].astype(np.float64)
    return best.mean(1), np.maximum(best.std(1), 1e-9)


def normalised(
    scores: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """½ [(s − μ₁) / σ₁ + (s − μ₂) / σ₂] for scores (N,) and both sides' (mean, deviation), each (N,)."""
    halves = ((scores - mean) / deviation for mean, deviation in (first, second))
    total: np.ndarray = 0.5 * sum(halves)
    return total
