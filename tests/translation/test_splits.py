"""Held-out sentences do not occur in training, the same ones whatever the order of the lines."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common.cli import UsageError
from fairseq_ext.translation.prepare.hashes import key_hash
from fairseq_ext.translation.prepare.splits import (
    SPLITS,
    components,
    shared_rows,
    split,
    split_sha256,
    wanted_pairs,
)
from fairseq_ext.translation.text.normalise import read_pairs

KEYS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30)


def columns(pairs):
    source, target = zip(*pairs, strict=True)
    return np.array(source, dtype=np.uint64), np.array(target, dtype=np.uint64)


def random_keys(count, different, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(1, different, count, dtype=np.uint64) * 7919 for _ in range(2))


@given(KEYS)
def test_components_against_a_search(pairs):
    found = components(*columns(pairs))
    for start in range(len(pairs)):
        reached, grown = {start}, True
        while grown:
            ends = {("s", pairs[i][0]) for i in reached} | {("t", pairs[i][1]) for i in reached}
            near = {i for i, (s, t) in enumerate(pairs) if {("s", s), ("t", t)} & ends}
            grown = near != reached
            reached = near
        assert {i for i in range(len(pairs)) if found[i] == found[start]} == reached


@given(KEYS, st.integers(0, 5), st.floats(0, 0.45), st.floats(0, 0.45))
def test_no_key_is_in_two_splits(pairs, seed, valid, test):
    source, target = columns(pairs)
    codes = split(source, target, seed, valid, test)
    assert codes.dtype == np.int8 and set(codes) <= {0, 1, 2}
    for keys in (source, target):
        for key in set(keys):
            assert len(set(codes[keys == key])) == 1


def test_a_row_shares_its_source_with_one_and_its_target_with_another():
    source, target = columns([(1, 1), (1, 2), (3, 2), (4, 4)])
    assert len(set(components(source, target)[:3])) == 1
    assert components(source, target)[3] != components(source, target)[0]
    # A source and a target of equal hash are different sentences.
    assert len(set(components(*columns([(1, 2), (2, 1)])))) == 2


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_order_of_lines_does_not_matter(rng):
    source, target = random_keys(600, 900)
    order = np.array(rng.sample(range(600), 600))
    codes = split(source, target, 3, minimum=20)
    shuffled = split(source[order], target[order], 3, minimum=20)
    assert (codes[order] == shuffled).all()
    assert set(codes) == {0, 1, 2}
    assert split_sha256(codes, source, target) == split_sha256(
        shuffled, source[order], target[order]
    )


def test_seed_decides():
    keys = random_keys(5000, 50_000)
    first, again, other = (split(*keys, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert len({split_sha256(codes, *keys) for codes in (first, again, other)}) == 2
    # Two draws of 2 % share 2 % of their pairs, 2 of 100, when independent.
    assert ((first == 1) & (other == 1)).sum() < 15


@pytest.mark.parametrize("pairs", [1000, 5000, 40_000])
def test_sizes(pairs):
    codes = split(*random_keys(pairs, 10 * pairs))
    wanted = max(100, pairs // 50)
    for code in (1, 2):
        assert wanted <= (codes == code).sum() <= 1.1 * wanted
    assert SPLITS == ("train", "valid", "test")


@pytest.mark.parametrize(
    ("pairs", "fraction", "minimum", "expected"),
    [
        (29_155, 0.02, 100, 583),
        (1000, 0.02, 100, 100),
        (999, 0.02, 100, 20),
        (10, 0.02, 100, 1),
        (2, 0.02, 100, 0),
        (1000, 0.0, 100, 0),
        (1000, 0.9, 100, 333),
        (5000, 0.02, 0, 100),
    ],
)
def test_wanted_pairs(pairs, fraction, minimum, expected):
    assert wanted_pairs(pairs, fraction, minimum) == expected


def test_a_giant_component_stays_in_train():
    alone = 3000
    source = np.arange(1, alone + 2001, dtype=np.uint64)
    target = source.copy()
    target[alone:] = 9  # 2,000 sources of one translation
    for seed in range(20):
        codes = split(source, target, seed)
        assert not codes[alone:].any()
        assert (np.bincount(codes)[1:] == 100).all()


def test_components_up_to_a_tenth_of_the_split_are_drawn():
    count = 2200
    source = np.arange(count, dtype=np.uint64) // 10 + 1  # components of 10 pairs, 100 wanted
    codes = split(source, np.arange(count, dtype=np.uint64))
    assert np.bincount(codes).tolist() == [2000, 100, 100]
    source = np.arange(count, dtype=np.uint64) // 11 + 1
    assert not split(source, np.arange(count, dtype=np.uint64)).any()


def test_small_and_empty_corpora():
    none = np.zeros(0, dtype=np.uint64)
    assert split(none, none).shape == (0,)
    assert split(*columns([(1, 1)])).tolist() == [0]
    assert sorted(split(*columns([(1, 1), (2, 2), (3, 3)]))) == [0, 1, 2]
    assert not split(*columns([(1, 1), (2, 2), (3, 3)]), valid=0, test=0).any()


@pytest.mark.parametrize(("valid", "test"), [(-0.1, 0.1), (0.5, 0.5), (1.2, 0), (float("nan"), 0)])
def test_bad_fractions_are_bad_usage(valid, test):
    with pytest.raises(UsageError, match="less than 1 together"):
        split(*columns([(1, 1)]), valid=valid, test=test)


def test_sha256_is_of_the_sorted_rows():
    source, target = columns([(5, 6), (3, 4), (3, 2)])
    codes = np.array([1, 0, 0], dtype=np.int8)
    rows = b"".join(struct.pack("<BQQ", *row) for row in [(0, 3, 2), (0, 3, 4), (1, 5, 6)])
    assert split_sha256(codes, source, target) == hashlib.sha256(rows).hexdigest()


def test_golden_split():
    """A changed split makes published scores incomparable: change it knowingly or not at all."""
    source, target = columns(
        [(key_hash(f"source {i * i % 2003}"), key_hash(f"target {i}")) for i in range(3000)]
    )
    assert split_sha256(split(source, target), source, target) == (
        "0a3bf0c5662c8fd81c7759700878287b7201e1cb0476c91aaf015c247aece501"
    )


def test_shared_rows_of_the_issue(shared_data):
    """6,248 of 29,155 rows share their Chinese side; as match keys some more do."""
    path = shared_data / "cmn-eng" / "cmn.txt"
    if not path.is_file():
        pytest.skip(f"no bitext at {path}")
    pairs = list(read_pairs([path]))
    assert len(pairs) == 29_155
    ids = {text: number for number, text in enumerate(dict.fromkeys(t for _, _, t in pairs))}
    assert shared_rows(np.array([ids[t] for _, _, t in pairs])) == 6248
    source, target = columns([(key_hash(s), key_hash(t)) for _, s, t in pairs])
    assert shared_rows(target) == 6325
    codes = split(source, target)
    assert [583 <= (codes == code).sum() <= 641 for code in (1, 2)] == [True, True]
    for keys in (source, target):
        assert not np.intersect1d(keys[codes == 0], keys[codes > 0]).size
        assert not np.intersect1d(keys[codes == 1], keys[codes == 2]).size
