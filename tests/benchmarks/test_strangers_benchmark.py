"""The protocols of verification and open sets: who meets whom, and that promised rates are kept."""

import numpy as np
import pytest

from benchmarks.speaker import open_set, strangers

WORDS = [f"w{i:02d}" for i in range(10)]


@pytest.fixture
def clips(monkeypatch):
    """Two people to fit on, two to test, ten words in three rounds."""
    rows = [
        {"speaker": speaker, "word": word, "round": number, "path": f"{speaker}/{word}_{number}"}
        for speaker in ("01", "02", "09", "10")
        for word in WORDS
        for number in ("1", "5", "9")
    ]
    monkeypatch.setattr(strangers, "clips", lambda: rows)
    return rows


@pytest.mark.parametrize("words, people", [(1, 20), (5, 4)])
def test_trials_are_of_other_words_and_rounds(clips, words, people):
    trials = strangers.Trials(("01", "02"), words)
    assert len(trials.people) == people and {len(rows) for rows in trials.people} == {words}
    assert len(trials.first) == people * 40 * (10 - words) // 10
    for i, j in zip(trials.first[::7], trials.second[::7], strict=True):
        enrolled, test = [clips[row] for row in trials.people[i]], clips[trials.tests[j]]
        assert {row["round"] for row in enrolled} == {"1"} and test["round"] in ("5", "9")
        assert test["word"] not in {row["word"] for row in enrolled}
    same = [
        clips[trials.people[i][0]]["speaker"] == clips[trials.tests[j]]["speaker"]
        for i, j in zip(trials.first, trials.second, strict=True)
    ]
    np.testing.assert_array_equal(trials.targets, same)


def test_draws_of_exchangeable_people_keep_the_rate(monkeypatch):
    monkeypatch.setattr(open_set, "DRAWS", 300)
    rng = np.random.default_rng(1)
    people = rng.normal(size=(149, 8))
    owner = np.repeat(np.arange(149), 2)
    tests = people[owner] + 0.7 * rng.normal(size=(298, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (tests, people)]
    nobody = np.full(298, -np.inf)
    found = open_set.draws_of(unit[0] @ unit[1].T, owner, nobody)
    for rate, one in ((0.01, found["0.01"]), (0.05, found["0.05"])):
        # draws share people, so that the error of their mean is larger than of independent ones
        assert one["fpir"] == pytest.approx(rate, abs=0.012)
        assert 0.1 < one["dir"] < 1
    assert found["0.05"]["dir"] > found["0.01"]["dir"]
    # somebody else in the gallery who resembles everybody more takes every name
    other = open_set.draws_of(unit[0] @ unit[1].T, owner, np.ones(298))
    assert other["0.05"]["dir"] == 0
