"""Model 1 beside a plain implementation of its formula, and the map that is written of it."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.translation.decode import shortlist
from fairseq_ext.translation.decode.shortlist import lexical_probabilities, map_lines

NULL = -1
ids = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def as_arrays(pairs):
    return [(np.array(source), np.array(target)) for source, target in pairs]


def plain(pairs, passes):
    """Expectation and maximisation, a word at a time."""
    pairs = [([*source, NULL], target) for source, target in pairs]
    likely = defaultdict(lambda: 1.0)
    for _ in range(passes):
        counts, totals = defaultdict(float), defaultdict(float)
        for source, target in pairs:
            for t in target:
                norm = sum(likely[s, t] for s in source)
                for s in source:
                    counts[s, t] += likely[s, t] / norm
                    totals[s] += likely[s, t] / norm
        likely = {(s, t): count / totals[s] for (s, t), count in counts.items()}
    return likely


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.integers(1, 4))
def test_model_1(pairs, passes):
    expected = plain(pairs, passes)
    found = lexical_probabilities(as_arrays(pairs), passes)
    found = {(int(s), int(t)): p for s, t, p in zip(*found, strict=True)}
    assert found == pytest.approx(expected)


def test_what_stands_together_is_found():
    das, haus, buch, ein, the, house, book, a = range(8)
    pairs = [([das, haus], [the, house]), ([das, buch], [the, book]), ([ein, buch], [a, book])]
    found = zip(*lexical_probabilities(as_arrays(pairs), 60), strict=True)
    best = {int(s): int(t) for s, t, p in found if p > 0.95}
    assert {haus: house, das: the, buch: book, ein: a}.items() <= best.items()


def test_map(monkeypatch):
    """For all those that are frequent; for each itself and its best, as names."""
    monkeypatch.setattr(shortlist, "BEST", 1)
    monkeypatch.setattr(shortlist, "FREQUENT", 2)
    pairs = as_arrays([([1], [5, 5]), ([2], [6, 5]), ([2, 1], [6, 5, 5])] * 20)
    assert list(map_lines(pairs, "p{}".format)) == ["\tp5 p6", "p1\tp1 p5", "p2\tp2 p6"]
