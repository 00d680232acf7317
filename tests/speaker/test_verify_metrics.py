"""Metrics of detection against closed forms, lir and a brute-force implementation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lir.data.models import LLRData
from lir.metrics import cllr as lir_cllr
from lir.metrics import cllr_min as lir_min_cllr
from scipy.special import ndtr

from fairseq_ext.speaker.verify.metrics import (
    Ladder,
    actual_dcf,
    bootstrap,
    cllr,
    corrected_interval,
    detection_cost,
    equal_error_rate,
    min_cllr,
    min_dcf,
    rates_at,
    threshold_at,
)
from fairseq_ext.speaker.verify.report import measure


def gaussian(d, targets, others, seed=1):
    """Log-likelihood ratios N(± d² / 2, d²) and which are targets."""
    rng = np.random.default_rng(seed)
    wanted = np.repeat([True, False], [targets, others])
    return rng.normal(np.where(wanted, d * d / 2, -d * d / 2), d), wanted


def all_corners(scores, targets):
    """(misses, false accepts) of every threshold there is, one at a time."""
    cuts = [*np.unique(scores), np.inf]
    return [(np.mean(scores[targets] < c), np.mean(scores[~targets] >= c)) for c in cuts]


def brute_eer(scores, targets):
    """The least equal error of any mixture of two thresholds: where the hull meets misses = accepts."""
    corners = all_corners(scores, targets)
    best = 1.0
    for m, a in corners:
        for n, b in corners:
            if m <= a and n >= b:
                gap = (a - m) - (b - n)
                share = (a - m) / gap if gap else 0.0
                best = min(best, m + share * (n - m))
    return best


few = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0]), st.booleans()),
    min_size=2,
    max_size=12,
).filter(lambda rows: len({target for _, target in rows}) == 2)


@settings(max_examples=40)
@given(few)
def test_ties_and_few_trials_are_as_by_brute_force(rows):
    scores, targets = np.array([s for s, _ in rows]), np.array([t for _, t in rows])
    ladder = Ladder.of(scores, targets)
    assert equal_error_rate(ladder) == pytest.approx(brute_eer(scores, targets), abs=1e-12)
    corners = all_corners(scores, targets)
    for prior in (0.01, 0.3, 0.9):
        costs = [(prior * m + (1 - prior) * a) / min(prior, 1 - prior) for m, a in corners]
        assert min_dcf(ladder, prior) == pytest.approx(min(costs), abs=1e-9)
        by_threshold = [detection_cost(ladder, prior, t) for t in [*ladder.thresholds, np.inf]]
        assert min(by_threshold) == pytest.approx(min(costs), abs=1e-9)
    # lir takes logarithms to the base of 10
    data = LLRData(features=scores.reshape(-1, 1) / np.log(10), labels=targets.astype(int))
    assert min_cllr(ladder) == pytest.approx(lir_min_cllr(data), abs=1e-9)
    assert cllr(scores, targets) == pytest.approx(lir_cllr(data), abs=1e-12)


@pytest.mark.parametrize("d", [1.0, 2.0])
def test_gaussian_ratios_have_the_error_rate_of_the_closed_form(d):
    # the misses of N(d²/2, d²) below 0 are Φ(−d/2), and so are the false accepts
    scores, targets = gaussian(d, 200_000, 200_000)
    found = measure(scores, targets, True)
    assert found["eer"] == pytest.approx(ndtr(-d / 2), abs=0.002)
    # such scores are log-likelihood ratios: no monotone change of them is better
    assert found["cllr"] == pytest.approx(found["min_cllr"], abs=0.002)
    assert found["act_dcf_0.05"] == pytest.approx(found["min_dcf_0.05"], abs=0.01)
    prior, cut = 0.05, np.log(19)
    expected = ndtr((cut - d * d / 2) / d) + 19 * ndtr((-cut - d * d / 2) / d)
    assert actual_dcf(scores, targets, prior) == pytest.approx(expected, abs=0.01)


def test_scores_that_say_nothing_and_everything():
    targets = np.array([True, False, False])
    equal = Ladder.of(np.zeros(3), targets)
    assert [equal_error_rate(equal), min_dcf(equal, 0.01), min_cllr(equal)] == [0.5, 1.0, 1.0]
    perfect = Ladder.of(np.array([1.0, 0.0, -1.0]), targets)
    assert [equal_error_rate(perfect), min_dcf(perfect, 0.01), min_cllr(perfect)] == [0, 0, 0]
    inverted = Ladder.of(np.array([-1.0, 0.0, 1.0]), targets)
    assert equal_error_rate(inverted) == 0.5 and min_cllr(inverted) == 1.0
    assert set(measure(np.array([1.0, 0.0, 0.5]), targets, False)) == {
        *("eer", "min_dcf_0.01", "min_dcf_0.05", "min_cllr")
    }


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="one kind"):
        Ladder.of(np.zeros(2), np.ones(2, bool))
    with pytest.raises(ValueError, match="not a finite"):
        Ladder.of(np.array([0.0, np.nan]), np.array([True, False]))


@given(few, st.sampled_from([0.0, 0.2, 0.5, 0.99]))
def test_a_threshold_keeps_the_rate_and_no_smaller_one_does(rows, rate):
    scores, targets = np.array([s for s, _ in rows]), np.array([t for _, t in rows])
    threshold = threshold_at(scores, targets, rate)
    assert rates_at(scores, targets, threshold)[1] <= rate + 1e-12
    lower = scores[scores < threshold]
    if len(lower):
        assert rates_at(scores, targets, lower.max())[1] > rate


def test_intervals_that_resample_speakers_cover_and_those_of_trials_do_not():
    # each person has a way of speaking that moves all his scores
    def sample(rng, people=40, each=6):
        way = rng.normal(0, 1.0, people)
        who = np.repeat(np.arange(people), each)
        same = np.concatenate([np.ones(len(who), bool), np.zeros(len(who), bool)])
        other = (who + rng.integers(1, people, len(who))) % people
        sides = np.concatenate([who, who]), np.concatenate([who, other])
        noise = rng.normal(0, 0.5, 2 * len(who))
        return (
            np.where(same, 1.0, -1.0) + way[sides[0]] * np.where(same, 1, 0.3) + noise,
            same,
            sides,
        )

    rng = np.random.default_rng(3)
    whole = measure(*sample(rng, 20_000)[:2], False)["eer"]
    covered = {"speakers": 0, "trials": 0}
    for seed in range(60):
        scores, targets, sides = sample(rng)
        alone = np.arange(len(scores)), np.arange(len(scores))
        for kind, who in (("speakers", sides), ("trials", alone)):
            if kind == "trials" and seed >= 30:
                continue
            drawn = bootstrap(
                lambda ladder, _: np.array([equal_error_rate(ladder)]),
                scores,
                targets,
                who,
                100,
                seed,
            )
            found = equal_error_rate(Ladder.of(scores, targets))
            low, high = corrected_interval(drawn[:, 0], found)
            covered[kind] += low <= whole <= high
    assert covered["speakers"] / 60 >= 0.85
    assert covered["trials"] / 30 < 0.85


def test_a_speaker_drawn_twice_counts_twice_and_pairs_by_both():
    # three people, all pairs: with weights (2, 1, 0) the metrics are those of the trials repeated
    a, b = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 2, 1, 2, 2])
    scores = np.array([2.0, 0.0, 5.0, 1.0, -1.0, -2.0])
    targets = a == b
    seen = []

    def keep(ladder, weights):
        seen.append((equal_error_rate(ladder), weights))
        return np.zeros(1)

    bootstrap(keep, scores, targets, (a, b), 200, 1)
    wanted = [eer for eer, w in seen if w.tolist() == [2, 1, 0, 2, 0, 0]]
    repeated = np.repeat(np.arange(6), [2, 1, 0, 2, 0, 0])
    expected = equal_error_rate(Ladder.of(scores[repeated], targets[repeated]))
    assert wanted and wanted == [pytest.approx(expected)] * len(wanted)
