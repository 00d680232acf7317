"""fairseq_ext.speaker.metrics against closed forms and counts by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from fairseq_ext.speaker.metrics import (
    SCALES,
    accuracy,
    accuracy_by_label,
    confusion_counts,
    in_top,
    likeliest_scale,
    wilson_interval,
)

Z = 1.959963984540054


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_wilsons_interval_are_z_deviations_away(case):
    # its definition: the proportions q with |p - q| = z √(q (1 - q) / n)
    correct, total = case
    p = correct / total
    for end in wilson_interval(correct, total):
        assert 0 <= end <= 1
        assert abs(p - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / total), abs=1e-9)
    low, high = wilson_interval(correct, total)
    assert low <= p <= high and low < high


def test_wilsons_interval_at_the_edges():
    # none of n: (0, z² / (n + z²))
    assert wilson_interval(0, 10) == (0.0, pytest.approx(Z * Z / (10 + Z * Z)))
    assert wilson_interval(10, 10) == (pytest.approx(10 / (10 + Z * Z)), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_wilsons_interval_is_narrower_with_less_confidence():
    wide, narrow = wilson_interval(40, 50), wilson_interval(40, 50, confidence=0.5)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


def test_in_top_by_hand():
    ranked = np.array([[3, 1, 2], [0, 2, 1], [1, 0, 3]])
    labels = np.array([1, 0, 2])
    assert in_top(ranked, labels, 1).tolist() == [False, True, False]
    assert in_top(ranked, labels, 2).tolist() == [True, True, False]
    # more than there are columns
    assert in_top(ranked, labels, 5).tolist() == [True, True, False]


def test_accuracy_of_nothing_is_not_a_number_but_none():
    assert accuracy(np.zeros(0, dtype=bool)) == {
        "correct": 0,
        "total": 0,
        "accuracy": None,
        "interval95": (0.0, 1.0),
    }
    assert accuracy(np.array([True, False, True, True]))["accuracy"] == 0.75


def test_accuracy_by_label_names_only_labels_that_occur():
    hits = np.array([True, False, True, True, False])
    labels = np.array([4, 4, 0, 4, 2])
    assert accuracy_by_label(hits, labels) == {0: (1, 1), 2: (0, 1), 4: (2, 3)}
    assert accuracy_by_label(hits[:0], labels[:0]) == {}


def test_confusion_counts_by_hand():
    classes, counts = confusion_counts(np.array([7, 7, 7, 2]), np.array([7, 9, 9, 2]))
    assert classes.tolist() == [2, 7, 9]
    assert counts.tolist() == [[1, 0, 0], [0, 1, 2], [0, 0, 0]]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_confusion_counts_agree_with_counting_one_by_one(pairs):
    labels, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    classes, counts = confusion_counts(labels, predicted)
    for i, true in enumerate(classes):
        for j, other in enumerate(classes):
            assert counts[i, j] == pairs.count((true, other))
    assert counts.sum() == len(pairs)


@pytest.mark.parametrize("scale", [0.7, 3.0, 13.0, 50.0])
def test_the_likeliest_scale_is_the_one_that_labels_were_drawn_with(scale):
    draw = np.random.default_rng(round(10 * scale))
    scores = draw.uniform(-1, 1, (20_000, 12))
    # the largest of scores with Gumbel noise is drawn from their softmax
    labels = (scale * scores + draw.gumbel(size=scores.shape)).argmax(1)

    def loss(a):
        own = a * scores[np.arange(len(labels)), labels]
        return float((np.log(np.exp(a * scores).sum(1)) - own).sum())

    found = likeliest_scale(np.array([loss(a) for a in SCALES]))
    least = minimize_scalar(loss, bounds=(0.1, 200), method="bounded").x
    assert found == pytest.approx(least, rel=0.06) and found == pytest.approx(scale, rel=0.12)
    assert loss(found) < loss(least) * 1.001


def test_a_scale_beyond_those_that_are_tried_is_the_last_of_them():
    falling = -np.arange(float(len(SCALES)))
    assert likeliest_scale(falling) == SCALES[-1] and likeliest_scale(-falling) == SCALES[0]
