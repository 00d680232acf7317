"""How sure a score is: bootstrap intervals and paired tests on sums of per-sentence statistics.

A corpus score is a function of sums over sentences, so a resampled corpus is a weighted sum of rows, and
a thousand of them one matrix product. Statistics are those of sacreBLEU, one row a sentence:
BLEU (N, 10): hypothesis length, reference length, matches of order 1 to 4, hypothesis n-grams of order 1
to 4; chrF (N, 18): hypothesis, reference and matching n-grams of order 1 to 6; TER (N, 2): edits and
reference length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Formula = Callable[[np.ndarray], np.ndarray]
_CELLS = 4_000_000  # of a matrix trials x sentences that is held at once
_ORDERS = 4
_TOLERANCE = 1e-9  # two sums of the same rows in another order are the same score


@dataclass(frozen=True)
class PairedBootstrap:
    """What :func:`paired_bootstrap` finds."""

    wins: float
    interval: tuple[float, float]
    p: float
    sacrebleu_p: float


def bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU in [0, 100] of summed statistics (..., 10), shape (...).

    Papineni et al. 2002 with n up to 4; where an order has no match, the exponential smoothing of
    mteval (Chen & Cherry 2014, method 3), as sacreBLEU does by default.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    length, reference = statistics[..., 0], statistics[..., 1]
    matches, totals = statistics[..., 2 : 2 + _ORDERS], statistics[..., 2 + _ORDERS :]
    missed = matches == 0
    halvings = 2.0 ** np.cumsum(missed, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(missed, 1 / halvings, matches) / totals
        mean = np.exp(np.log(precisions).mean(axis=-1))
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        score = 100 * brevity * mean
    defined = (totals > 0).all(axis=-1) & (matches > 0).any(axis=-1)
    return np.where(defined, score, 0.0)


def chrf(statistics: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """chrF in [0, 100] of summed statistics (..., 3 · orders), shape (...).

    Popović 2015: F-beta of precision and recall, each averaged over the orders that occur in both
    the hypotheses and the references.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    system, reference, matches = (statistics[..., i::3] for i in range(3))
    used = (system > 0) & (reference > 0)
    count = np.maximum(used.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(used, matches / system, 0).sum(axis=-1) / count
        recall = np.where(used, matches / reference, 0).sum(axis=-1) / count
        score = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
    return np.where(precision + recall > 0, 100 * score, 0.0)


def ter(statistics: np.ndarray) -> np.ndarray:
    """TER in percent of summed edits and reference lengths (..., 2), shape (...)."""
    statistics = np.asarray(statistics, dtype=np.float64)
    edits, length = statistics[..., 0], statistics[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(length > 0, edits / length, (edits > 0).astype(np.float64))
    return 100 * rate


def total(formula: Formula, statistics: np.ndarray) -> float:
    """The corpus score of per-sentence statistics (N, K)."""
    return float(formula(np.asarray(statistics, dtype=np.float64).sum(axis=0)))


def bootstrap(formula: Formula, *systems: np.ndarray, trials: int, seed: int) -> list[np.ndarray]:
    """Scores (trials,) of each system on the same resamples of its sentences, with replacement.

    systems: statistics (N, K) over the same N sentences.
    """
    systems = tuple(np.asarray(system, dtype=np.float64) for system in systems)
    scores: list[list[np.ndarray]] = [[] for _ in systems]
    for weights in _resamples(len(systems[0]), trials, np.random.default_rng(seed)):
        for system, found in zip(systems, scores, strict=True):
            found.append(formula(weights @ system))
    return [np.concatenate(found) for found in scores]


def interval(scores: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """The percentiles between which `share` of the scores lie."""
    low, high = np.quantile(scores, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def paired_bootstrap(
    formula: Formula,
    system: np.ndarray,
    baseline: np.ndarray,
    trials: int = 1000,
    seed: int = 12345,
    higher_is_better: bool = True,
) -> PairedBootstrap:
    """Both systems scored on the same resampled corpora.

    wins: share of the resamples on which the system is better (Koehn 2004). interval: 95 % of the
    difference system − baseline. p: two-sided, with the differences shifted to the null
    hypothesis, a mean of 0 (Riezler & Maxwell 2005, figure 2; Efron & Tibshirani 1993, §16.4).
    sacrebleu_p: what sacreBLEU calls p, which shifts the absolute differences by their mean, and is
    too small: of two equal systems it is ≤ 0.05 in 10 % of the tests, and 0.19 in the mean.
    """
    ours, theirs = bootstrap(formula, system, baseline, trials=trials, seed=seed)
    sign = 1 if higher_is_better else -1
    differences = ours - theirs
    distance = np.abs(differences)
    observed = abs(total(formula, system) - total(formula, baseline))
    return PairedBootstrap(
        wins=float(np.mean(sign * differences > _TOLERANCE)),
        interval=interval(differences),
        p=_p_value(np.abs(differences - differences.mean()), observed),
        sacrebleu_p=_p_value(distance - distance.mean(), observed),
    )


def randomisation(
    formula: Formula,
    system: np.ndarray,
    baseline: np.ndarray,
    trials: int = 10_000,
    seed: int = 12345,
) -> float:
    """Two-sided p of paired approximate randomisation (Riezler & Maxwell 2005, figure 1).

    In each trial the two outputs of every sentence change places with probability 1/2; p is the
    share of trials whose difference is at least the observed one, the observed one counted too.
    """
    system, baseline = (np.asarray(one, dtype=np.float64) for one in (system, baseline))
    both, change = (system + baseline).sum(axis=0), baseline - system
    differences = []
    random = np.random.default_rng(seed)
    for size in _chunks(len(system), trials):
        swapped = random.integers(2, size=(size, len(system)), dtype=bool)
        first = swapped.astype(np.float64) @ change + system.sum(axis=0)
        differences.append(np.abs(formula(first) - formula(both - first)))
    observed = abs(total(formula, system) - total(formula, baseline))
    return _p_value(np.concatenate(differences), observed)


def _p_value(statistics: np.ndarray, observed: float) -> float:
    # At least, not more than: of two equal systems nothing is ever more than their difference of 0.
    extreme = int(np.sum(statistics >= observed - _TOLERANCE))
    return (extreme + 1) / (len(statistics) + 1)


def _resamples(rows: int, trials: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each row is drawn, (chunk, rows) at a time, `trials` in all."""
    for size in _chunks(rows, trials):
        drawn = random.choice(rows, size=(size, rows), replace=True)
        drawn += np.arange(size)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(float)


def _chunks(rows: int, trials: int) -> Iterator[int]:
    # A multiple of 32 draws of one bit leaves no half-used random word between two chunks.
    size = max(1, _CELLS // max(rows, 1))
    size -= size % 32 if size > 32 else 0
    for start in range(0, trials, size):
        yield min(size, trials - start)
