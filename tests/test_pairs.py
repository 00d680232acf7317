"""tests.pairs: fewer cases, and no two values that never meet."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.pairs import all_pairs


def met(cases):
    return {
        frozenset(pair)
        for case in cases
        for pair in itertools.combinations(sorted(case.items()), 2)
    }


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_every_two_values_that_met_still_meet(sizes, data):
    product = [
        dict(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))
    ]
    cases = data.draw(st.lists(st.sampled_from(product), min_size=1, unique_by=str))
    kept = [cases[i] for i in all_pairs(cases)]
    assert met(kept) == met(cases) and len(kept) <= len(met(cases))


def test_a_product_of_four_by_three_is_a_ninth():
    product = [dict(zip("abcd", v, strict=True)) for v in itertools.product(range(3), repeat=4)]
    assert 9 <= len(all_pairs(product)) <= 14
    assert all_pairs([{"a": 1}, {"a": 2}]) == [0, 1]
    nested = [{"x": {"a": a, "b": b}, "y": c} for a, b, c in itertools.product(range(2), repeat=3)]
    assert len(all_pairs(nested)) < 8
