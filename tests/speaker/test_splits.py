from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.speaker.prepare.splits import (
    assign_splits,
    check_fractions,
    overlapping_groups,
    shared_between_splits,
    split_overlaps,
)

fractions = st.sampled_from(
    [
        {"valid": 0.1, "test": 0.1},
        {"valid": 0.3},
        {"valid": 0.2, "test": 0.5},
        {"valid": 0, "test": 0},
    ]
)
labels = st.lists(st.integers(0, 5).map("spk{}".format), min_size=1, max_size=80)


@given(labels, fractions, st.integers(0, 5))
def test_stratified_by_speaker(speakers, parts, seed):
    nothing = [None] * len(speakers)
    splits = assign_splits(speakers, range(len(speakers)), nothing, parts, seed)
    active = [name for name, part in parts.items() if part > 0]
    assert set(splits) <= {"train", *active}
    for speaker, total in Counter(speakers).items():
        got = Counter(split for s, split in zip(speakers, splits, strict=True) if s == speaker)
        assert got["train"] >= 1
        for place, name in enumerate(active):
            assert (got[name] >= 1) == (total >= place + 2)
            assert got[name] <= max(1, round(parts[name] * total))
            if got["train"] > 1 and sum(parts.values()) < 1:
                assert got[name] == max(1, round(parts[name] * total))


@given(labels, fractions, st.integers(0, 5), st.data())
def test_a_group_stays_on_one_side(speakers, parts, seed, data):
    groups = data.draw(st.lists(st.integers(0, 9), min_size=len(speakers), max_size=len(speakers)))
    nothing = [None] * len(speakers)
    splits = assign_splits(speakers, groups, nothing, parts, seed)
    sides = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        sides[group].add(split)
    assert all(len(side) == 1 for side in sides.values())
    trained = {s for s, split in zip(speakers, splits, strict=True) if split == "train"}
    assert trained == set(speakers)


@given(labels, fractions, st.data())
def test_given_splits_are_kept_and_followed(speakers, parts, data):
    size = len(speakers)
    given_splits = data.draw(
        st.lists(st.sampled_from([None, "train", "valid", "test"]), min_size=size, max_size=size)
    )
    groups = data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
    splits = assign_splits(speakers, groups, given_splits, parts)
    fixed = defaultdict(set)
    for group, split in zip(groups, given_splits, strict=True):
        fixed[group].add(split)
    for group, before, after in zip(groups, given_splits, splits, strict=True):
        known = fixed[group] - {None}
        if before is not None:
            assert after == before
        elif len(known) == 1:
            assert {after} == known


@given(labels, st.integers(0, 3))
def test_the_seed_decides_and_nothing_else(speakers, seed):
    def run(seed):
        nothing = [None] * len(speakers)
        return assign_splits(speakers, range(len(speakers)), nothing, {"valid": 0.2}, seed)

    assert run(seed) == run(seed)


def test_another_seed_draws_another_split():
    speakers = ["a"] * 100
    drawn = {
        tuple(assign_splits(speakers, range(100), [None] * 100, {"valid": 0.1}, seed))
        for seed in range(5)
    }
    assert len(drawn) == 5


def test_sessions_of_unequal_size():
    speakers = ["a"] * 14
    groups = [0] * 10 + [1] * 3 + [2]
    splits = assign_splits(speakers, groups, [None] * 14, {"valid": 0.1, "test": 0.1})
    sizes = Counter(splits)
    assert sizes["train"] == 10
    assert sorted((sizes["valid"], sizes["test"])) == [1, 3]


def test_unlabelled_rows_keep_their_split():
    splits = assign_splits(["a", "a", "a", None], range(4), [None] * 3 + ["test"], {"valid": 0.1})
    assert splits[3] == "test" and Counter(splits[:3]) == {"train": 2, "valid": 1}


@pytest.mark.parametrize("parts", [{"valid": -0.1}, {"valid": 1.0}, {"valid": 0.5, "test": 0.5}])
def test_impossible_fractions(parts):
    with pytest.raises(ValueError, match="fraction"):
        check_fractions(parts)


times = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 4)), max_size=15)


def overlap(a, b):
    return a[0] == b[0] and a[1] < b[1] + b[2] and b[1] < a[1] + a[2]


@given(times, st.data())
def test_overlaps_between_splits_are_found(cuts, data):
    size = len(cuts)
    splits = data.draw(st.lists(st.sampled_from(["train", "test"]), min_size=size, max_size=size))
    recordings = [c[0] for c in cuts]
    starts, ends = [float(c[1]) for c in cuts], [float(c[1] + c[2]) for c in cuts]
    found = split_overlaps(recordings, starts, ends, splits)
    true = {
        (i, j)
        for i in range(size)
        for j in range(i + 1, size)
        if overlap(cuts[i], cuts[j]) and splits[i] != splits[j]
    }
    assert set(found) <= true
    assert {recordings[i] for i, _ in found} == {recordings[i] for i, _ in true}


@given(times)
def test_overlapping_cuts_are_one_group(cuts):
    recordings = [c[0] for c in cuts]
    starts, ends = [float(c[1]) for c in cuts], [float(c[1] + c[2]) for c in cuts]
    groups = overlapping_groups(recordings, starts, ends, [None] * len(cuts))
    reach = {i: {i} for i in range(len(cuts))}
    for _ in cuts:
        for i in reach:
            reach[i] |= {j for k in list(reach[i]) for j in reach if overlap(cuts[k], cuts[j])}
    for i in reach:
        assert {j for j in reach if groups[j] == groups[i]} == reach[i]


def test_groups_join_across_recordings_and_whole_recordings_overlap_with_cuts():
    groups = overlapping_groups(
        ["a", "a", "b", "c"],
        [None, 3.0, None, None],
        [None, 4.0, None, None],
        [None, "x", "x", None],
    )
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert split_overlaps(["a", "a"], [None, 3.0], [None, 4.0], ["train", "test"]) == [(0, 1)]


def test_touching_cuts_do_not_overlap():
    assert split_overlaps(["a", "a"], [0.0, 1.1], [1.1, 2.0], ["train", "test"]) == []


def test_shared_between_splits():
    assert shared_between_splits(["a", "b", "a", "b"], ["train", "test", "test", "test"]) == ["a"]
