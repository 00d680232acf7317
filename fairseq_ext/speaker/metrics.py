"""Accuracy of closed-set identification, and what its scores are worth: pure functions of arrays."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

# Factors of the scores that validation tries: of log-probabilities about 1, of cosines tens.
STEP = 0.5  # octaves
SCALES = 2.0 ** np.arange(-2, 8, STEP)


def likeliest_scale(losses: np.ndarray) -> float:
    """The a for which softmax(a · scores) is likeliest, of its cross-entropies (20,) at SCALES.

    Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2), a = 1/T;
    between the values that were tried by a parabola in log a, at either end the end.
    """
    best = int(np.argmin(losses))
    if not 0 < best < len(SCALES) - 1:
        return float(SCALES[best])
    before, least, after = losses[best - 1 : best + 2]
    bend = before - 2 * least + after
    shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return float(SCALES[best] * 2.0 ** (STEP * shift))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 (N, C): of each row the shares of e^logit."""
    weights: np.ndarray = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return weights


def in_top(ranked: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """bool (N,): is the label among the first `k` of `ranked` (N, K), class numbers, best first."""
    ranked, labels = np.asarray(ranked), np.asarray(labels)
    hits: np.ndarray = (ranked[:, :k] == labels[:, None]).any(axis=1)
    return hits


def accuracy(hits: np.ndarray) -> dict[str, Any]:
    """Correct, total, their ratio (None of nothing) and its 95 % interval, of bool (N,) `hits`."""
    correct, total = int(np.sum(hits)), len(hits)
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total if total else None,
        "interval95": wilson_interval(correct, total),
    }


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion (Wilson 1927), without continuity correction.

    With p = correct / total, n = total and z the normal quantile:
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). (0, 1) for no observation.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} cannot be correct")
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, square = correct / total, z * z / total
    half = z * math.sqrt(p * (1 - p) / total + square / (4 * total))
    low, high = ((p + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    # The ends are exact where nothing or everything is correct; rounding must not pass them.
    return (low if correct else 0.0), (high if correct < total else 1.0)


def accuracy_by_label(hits: np.ndarray, labels: np.ndarray) -> dict[int, tuple[int, int]]:
    """{label: (correct, utterances)} for the labels that occur, ascending."""
    labels = np.asarray(labels)
    totals = np.bincount(labels)
    correct = np.bincount(labels, weights=np.asarray(hits, dtype=np.float64))
    return {int(c): (int(correct[c]), int(totals[c])) for c in np.flatnonzero(totals)}


def confusion_counts(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes int64 (C,), counts int64 (C, C)): row = label, column = predicted.

    Only classes that occur as one or the other, ascending: of thousands, a test has few.
    """
    classes, where = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    count, n = len(classes), len(labels)
    cells = where[:n] * count + where[n:]
    return classes, np.bincount(cells, minlength=count * count).reshape(count, count)
