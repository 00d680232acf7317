"""Identification among known people and strangers: thresholds, posteriors and rates. Pure functions."""

import math

import numpy as np

from fairseq_ext.speaker.metrics import softmax


def conformal_threshold(maxima: np.ndarray, rate: float) -> float:
    """The threshold that a new stranger reaches with a probability of at most `rate`.

    maxima: (n,), the largest score of each of n strangers over this very gallery. A stranger is identified
    where his is at least the threshold, the number just above the ⌈(n+1)(1−rate)⌉-th smallest (split
    conformal prediction, Vovk et al. 2005): where strangers are exchangeable and scores have no ties the rate
    is ⌊rate · (n+1)⌋ / (n+1) in the mean over them. ValueError where n < 1/rate − 1.
    """
    # in their own precision: the next number of float64 would be rounded down beside scores of float32
    maxima = np.sort(np.asarray(maxima))
    count = len(maxima)
    # the rate is a decimal fraction: 0.01 · 100 is one
    passed = math.floor(rate * (count + 1) + 1e-9)
    if passed < 1:
        raise ValueError(
            f"{count} strangers are too few for a rate of {100 * rate:g} %: it takes"
            f" {strangers_needed(rate)}, one recording each; the least that {count} can promise is"
            f" {100 / (count + 1):.2g} %"
        )
    return float(np.nextafter(maxima[count - passed], maxima.dtype.type(np.inf)))


def strangers_needed(rate: float) -> int:
    """The fewest strangers that a rate of false identification can be promised on: ⌈1/rate − 1⌉."""
    if not 0 < rate < 1:
        raise ValueError(f"a rate lies between 0 and 1, got {rate}")
    return math.ceil(1 / rate - 1 - 1e-9)


def posteriors(llr: np.ndarray, prior_known: float) -> np.ndarray:
    """float64 (T, N + 1): probabilities of each of N people and, last, of nobody of them.

    llr: natural log-likelihood ratios (T, N) of each person against any other; `prior_known` is spread
    evenly over the people. p_i ∝ prior_known / N · e^llr_i, nobody's ∝ 1 − prior_known.
    """
    llr = np.asarray(llr, dtype=np.float64)
    known = llr + np.log(prior_known / llr.shape[1])
    nobody = np.full((len(llr), 1), np.log1p(-prior_known))
    return softmax(np.concatenate([known, nobody], axis=1))


def open_set_rates(
    best: np.ndarray, right: np.ndarray, known: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(DIR, FPIR) at thresholds (K,), float64 (K,); NaN without known people or strangers.

    best: (T,), the largest score over the gallery; right: bool (T,), is it that person's; known: bool (T,),
    is the speaker enrolled. DIR is the share of the known who are named rightly and reach the threshold, FPIR
    that of the strangers who reach it (ISO/IEC 19795-1).
    """
    hits = np.sort(np.where(right, best, -np.inf)[known])
    others = np.sort(best[~known])

    def reached(scores: np.ndarray) -> np.ndarray:
        below = np.searchsorted(scores, thresholds, side="left")
        return 1 - below / len(scores) if len(scores) else np.full(len(thresholds), np.nan)

    return reached(hits), reached(others)


def open_set_curve(
    best: np.ndarray, right: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(thresholds, DIR, FPIR) at all thresholds that change the FPIR, from the strictest on."""
    strangers = np.unique(best[~known])[::-1]
    above = np.nextafter(strangers, strangers.dtype.type(np.inf))
    thresholds = np.concatenate([above, strangers[-1:]])
    return (thresholds, *open_set_rates(best, right, known, thresholds))
