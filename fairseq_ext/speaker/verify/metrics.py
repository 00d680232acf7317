"""Metrics of detection: pure functions of scores, of which one class (targets) should be the higher.

    ladder = Ladder.of(scores, targets)
    equal_error_rate(ladder), min_dcf(ladder, 0.01), min_cllr(ladder)

Everything that does not depend on the scale of the scores is computed from a `Ladder`: how many targets and
non-targets (or how much weight of them) lie on each step between and at the scores of the targets. No other
threshold is a corner of the ROC, so that it is exact, and a million trials are one sort.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import ndtr, ndtri

Statistic = Callable[["Ladder"], float]


@dataclass(frozen=True)
class Ladder:
    """Counts on the steps of ascending scores; K distinct scores of targets make 2 K + 1 steps.

    Step 2 k + 1 is the k-th distinct score of a target, step 2 k what lies below it and above the one before.
    thresholds: (K,), ascending, of the type of the scores; targets, others: float64 (2 K + 1,), counts or
    sums of weights.
    """

    thresholds: np.ndarray
    targets: np.ndarray
    others: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, targets: np.ndarray) -> "Ladder":
        """The ladder of finite scores (N,) with targets bool (N,); ValueError where one class is empty."""
        scores, targets = np.asarray(scores), np.asarray(targets, dtype=bool)
        if scores.shape != targets.shape or scores.ndim != 1:
            raise ValueError(f"{scores.shape} scores for {targets.shape} labels")
        if not np.isfinite(scores).all():
            raise ValueError("a score is not a finite number")
        if targets.all() or not targets.any():
            raise ValueError("targets and non-targets are needed, there is one kind only")
        thresholds, counts = np.unique(scores[targets], return_counts=True)
        others = np.sort(scores[~targets])
        edges = np.stack([np.searchsorted(others, thresholds, side) for side in ("left", "right")])
        below = np.concatenate([[0], edges.T.ravel(), [len(others)]])
        on_steps = np.zeros(2 * len(thresholds) + 1)
        on_steps[1::2] = counts
        return cls(thresholds, on_steps, np.diff(below).astype(np.float64))

    def steps(self, scores: np.ndarray) -> np.ndarray:
        """The step of each score (N,), int32 (N,)."""
        found = np.searchsorted(self.thresholds, scores, side="left").astype(np.int32)
        at = self.thresholds[np.minimum(found, len(self.thresholds) - 1)] == scores
        found *= 2
        found += at
        return found

    def weighted(self, steps: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> "Ladder":
        """The same steps where each trial counts as much as its weight, float64 (N,)."""
        size = 2 * len(self.thresholds) + 1
        per_class = (
            np.bincount(steps, np.where(chosen, weights, 0.0), minlength=size)
            for chosen in (targets, ~targets)
        )
        return Ladder(self.thresholds, *per_class)

    def error_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """(misses, false accepts), float64 (K + 1,): share of targets below each threshold, of others not.

        A trial is accepted where its score is at least the threshold; the last one is above all scores.
        """
        below = np.concatenate([[0.0], np.cumsum(self.targets)])[1::2]
        other_below = np.concatenate([[0.0], np.cumsum(self.others)])[1::2]
        # the last odd step is above all targets: nothing is accepted there
        other_below[-1] = self.others.sum()
        return below / self.targets.sum(), 1 - other_below / self.others.sum()

    def hull(self) -> tuple[np.ndarray, np.ndarray]:
        """(misses, false accepts) at the corners of the ROC's convex hull, misses ascending from 0 to 1.

        The corners are the blocks of the isotonic regression of the share of targets (Brümmer 2010).
        """
        _, targets, others = self._blocks()
        misses = np.concatenate([[0.0], np.cumsum(targets) / targets.sum()])
        accepts = np.concatenate([[1.0], 1 - np.cumsum(others) / others.sum()])
        return misses, np.maximum(accepts, 0.0)

    def _blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(share of targets, targets, others) of the blocks of pooled adjacent violators."""
        total = self.targets + self.others
        used = total > 0
        # each class weighs one half: a share of 1/2 is a likelihood ratio of 1
        targets = self.targets[used] / self.targets.sum()
        others = self.others[used] / self.others.sum()
        fit = isotonic_regression(targets / (targets + others), weights=targets + others)
        first = fit.blocks[:-1]
        targets, others = np.add.reduceat(targets, first), np.add.reduceat(others, first)
        return targets / (targets + others), targets, others


def equal_error_rate(ladder: Ladder) -> float:
    """The rate at which misses equal false accepts, on the ROC's convex hull."""
    misses, accepts = ladder.hull()
    right = int(np.argmax(misses >= accepts))
    gap = accepts - misses
    share = gap[right - 1] / (gap[right - 1] - gap[right])
    return float(misses[right - 1] + share * (misses[right] - misses[right - 1]))


def min_dcf(ladder: Ladder, prior: float) -> float:
    """Smallest detection cost of any threshold, divided by that of the better constant answer.

    (p misses + (1 − p) false accepts) / min(p, 1 − p), p the prior of a target, both costs 1 (NIST SRE).
    """
    return float(np.min(normalised_cost(*ladder.hull(), prior)))


def detection_cost(ladder: Ladder, prior: float, threshold: float) -> float:
    """Detection cost as in `min_dcf` at one threshold; exact at thresholds of the ladder."""
    misses, accepts = ladder.error_rates()
    at = int(np.searchsorted(ladder.thresholds, threshold, side="left"))
    return float(normalised_cost(misses[at], accepts[at], prior))


def actual_dcf(scores: np.ndarray, targets: np.ndarray, prior: float) -> float:
    """Detection cost where scores are natural log-likelihood ratios and decided by Bayes at `prior`."""
    misses, accepts = rates_at(scores, targets, bayes_threshold(prior))
    return float(normalised_cost(misses, accepts, prior))


def normalised_cost(
    misses: np.ndarray | float, accepts: np.ndarray | float, prior: float
) -> np.ndarray:
    """(p misses + (1 − p) false accepts) / min(p, 1 − p)."""
    cost = prior * np.asarray(misses) + (1 - prior) * np.asarray(accepts)
    normalised: np.ndarray = cost / min(prior, 1 - prior)
    return normalised


def bayes_threshold(prior: float) -> float:
    """The log-likelihood ratio above which a target is the cheaper answer: log((1 − p) / p)."""
    if not 0 < prior < 1:
        raise ValueError(f"a prior lies between 0 and 1, got {prior}")
    return float(np.log((1 - prior) / prior))


def rates_at(scores: np.ndarray, targets: np.ndarray, threshold: float) -> tuple[float, float]:
    """(share of targets below the threshold, share of others that reach it)."""
    accepted = np.asarray(scores) >= threshold
    return 1 - float(accepted[targets].mean()), float(accepted[~targets].mean())


def threshold_at(scores: np.ndarray, targets: np.ndarray, rate: float) -> float:
    """The smallest threshold that at most the share `rate` of the non-targets (N,) reaches."""
    scores = np.asarray(scores)
    others = np.sort(scores[~np.asarray(targets)])[::-1]
    allowed = int(rate * len(others) + 1e-9)
    if allowed >= len(others):
        return float(min(others[-1], np.min(scores)))
    # in their own precision: the next number of float64 would be rounded down beside scores of float32
    return float(np.nextafter(others[allowed], others.dtype.type(np.inf)))


def cllr(scores: np.ndarray, targets: np.ndarray) -> float:
    """Cost of natural log-likelihood ratios, bits: ½ [mean log₂(1 + e^−s) + mean log₂(1 + e^s)].

    The first mean is over the targets, the second over the others (Brümmer & du Preez 2006).
    """
    scores = np.asarray(scores, dtype=np.float64)
    parts = []
    for chosen, sign in ((targets, -1.0), (~targets, 1.0)):
        parts.append(np.logaddexp(0.0, sign * scores[chosen]).mean())
    return float(sum(parts) / (2 * np.log(2)))


def min_cllr(ladder: Ladder) -> float:
    """`cllr` after the best monotone change of the scores (pooled adjacent violators)."""
    share, targets, others = ladder._blocks()
    cost = -targets[targets > 0] @ np.log2(share[targets > 0])
    cost -= others[others > 0] @ np.log2(1 - share[others > 0])
    return float(cost / 2)


# --- intervals -----------------------------------------------------------------------------------


def speaker_weights(
    speakers: np.ndarray, sides: tuple[np.ndarray, np.ndarray], targets: np.ndarray
) -> np.ndarray:
    """Weight of each trial, float64 (N,), where speaker i was drawn `speakers[i]` times.

    w_a · w_b, and w_a for a target: the trials of a person come and go together.
    """
    first = speakers[sides[0]]
    weights: np.ndarray = np.where(targets, first, first * speakers[sides[1]])
    return weights.astype(np.float64)


def bootstrap(
    statistics: Callable[[Ladder, np.ndarray], np.ndarray],
    scores: np.ndarray,
    targets: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
    draws: int,
    seed: int,
) -> np.ndarray:
    """`statistics` of resampled speakers, float64 (draws, number of statistics).

    sides: the speakers' numbers of both sides of each trial, int (N,). Speakers are drawn with replacement,
    as trials of one speaker are not independent. A draw that leaves no target or no other is drawn again.
    statistics(ladder, weights (N,)) → (number,).
    """
    ladder = Ladder.of(scores, targets)
    steps = ladder.steps(scores)
    count = int(max(side.max() for side in sides)) + 1
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for _ in range(20 * draws):
        if len(found) == draws:
            break
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        weights = speaker_weights(drawn, sides, targets)
        resampled = ladder.weighted(steps, targets, weights)
        if resampled.targets.sum() and resampled.others.sum():
            found.append(np.asarray(statistics(resampled, weights), dtype=np.float64))
    if len(found) < draws:
        raise ValueError(f"{count} speakers are too few to be resampled")
    return np.stack(found)


def corrected_interval(
    values: np.ndarray, found: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Bias-corrected percentile interval (Efron 1981) of resampled values (draws,) around what was `found`.

    With z₀ the normal quantile of the share of values below `found` it is their quantiles at Φ(2 z₀ ± z): an
    optimum over thresholds is lower in a sample than in truth, and in a resample lower again. In simulation
    95 % intervals of the EER hold the truth in 89 % of cases with 20 speakers and in 94 % with 40; those of
    the minimum Cllr are too narrow, 80 and 84 %.
    """
    below = (np.mean(values < found) + np.mean(values <= found)) / 2
    least = 0.5 / len(values)
    shift = 2 * ndtri(np.clip(below, least, 1 - least))
    z = ndtri(0.5 + confidence / 2)
    low, high = np.quantile(values, ndtr(shift + np.array([-z, z])))
    return float(low), float(high)
