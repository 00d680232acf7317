"""Crops and batches over a corpus whose every frame says where it came from."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.speaker.augment import Context, build_augmentation, mel_frequencies
from fairseq_ext.speaker.balance import balanced, is_uneven, power_of
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.dataset import (
    CropDataset,
    UtteranceDataset,
    allocate,
    batches_by_frames,
    collate,
)
from fairseq_ext.speaker.features import FeatureSpec

MELS = 3


def corpus_of(lengths, labels=None):
    """Frame t of utterance u is (u, t, total frame number)."""
    lengths = np.array(lengths, dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    features = np.concatenate(
        [
            np.stack([np.full(n, u), np.arange(n), o + np.arange(n)], 1)
            for u, (n, o) in enumerate(zip(lengths, offsets, strict=True))
        ]
    ).astype(np.float32)
    features.flags.writeable = False
    count = len(lengths)
    return Corpus(
        path=None,
        ids=[f"u{i}" for i in range(count)],
        labels=np.arange(count) % 3 if labels is None else np.array(labels),
        splits=np.array(["train"] * count),
        groups=[""] * count,
        offsets=offsets,
        lengths=lengths,
        speakers=["a", "b", "c"],
        spec=FeatureSpec(n_mels=MELS),
        mean=np.zeros(MELS, dtype=np.float32),
        std=np.ones(MELS, dtype=np.float32),
        features=features,
    )


def crops_of(lengths, crop=10, rows=None, updates=0, **options):
    corpus = corpus_of(lengths)
    rows = np.arange(len(lengths)) if rows is None else np.array(rows)
    dataset = CropDataset(corpus, rows, crop, options.pop("seed", 1), **options)
    dataset.set_epoch_size(updates, 1)
    return dataset


def content(sample):
    return sample["source"].numpy().tobytes()


class TestCrops:
    def test_a_crop_is_consecutive_frames_of_its_utterance(self):
        dataset = crops_of([25, 4, 10, 11], updates=60, rows=[1, 3, 0])
        for index in range(len(dataset)):
            sample = dataset[index]
            u, t, total = sample["source"].numpy().T
            row = int(u[0])
            assert row in (0, 1, 3) and (u == row).all()
            length = min(10, int(dataset.corpus.lengths[row]))
            assert len(t) == length == dataset.size(index) == dataset.num_tokens(index)
            assert np.array_equal(t, t[0] + np.arange(length))
            assert np.array_equal(total, dataset.corpus.offsets[row] + t)
            assert t[0] >= 0 and t[-1] < dataset.corpus.lengths[row]
            assert sample["target"] == dataset.corpus.labels[row]
            assert sample["source"].dtype == torch.float32
            assert sample["id"] == index

    @pytest.mark.parametrize("length", [1, 9, 10, 11, 12, 17])
    def test_every_start_is_reached_and_none_beyond(self, length):
        """T = L and T < L start at 0 only; the last start is T − L, not one before or behind."""
        dataset = crops_of([length], updates=300)
        starts = {int(dataset[i]["source"][0, 1]) for i in range(300)}
        assert starts == set(range(max(0, length - 10) + 1))

    def test_starts_are_uniform(self):
        dataset = crops_of([14], updates=5000)
        starts = np.bincount([int(dataset[i]["source"][0, 1]) for i in range(5000)])
        assert len(starts) == 5 and np.abs(starts - 1000).max() < 6 * np.sqrt(5000 * 0.16)

    def test_same_whatever_the_order_of_access(self):
        one, two = crops_of([40, 30, 7], updates=30), crops_of([40, 30, 7], updates=30)
        forward = [content(one[i]) for i in range(30)]
        np.random.seed(5)
        backward = [content(two[i]) for i in reversed(range(30))]
        assert forward == backward[::-1]
        assert content(one[7]) == forward[7], "asked again"

    @pytest.mark.parametrize("workers", [1, 2])
    def test_same_whatever_the_number_of_workers(self, workers):
        dataset = crops_of([40, 30, 7], updates=20)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=4, collate_fn=collate, num_workers=workers
        )
        found = {}
        for batch in loader:
            mask = batch["net_input"]["padding_mask"]
            for i, index in enumerate(batch["id"].tolist()):
                x = batch["net_input"]["source"][i]
                found[index] = (x if mask is None else x[~mask[i]]).numpy().tobytes()
        assert found == {i: content(dataset[i]) for i in range(20)}

    def test_other_crops_in_another_epoch_and_for_another_seed(self):
        dataset, other = crops_of([500], updates=50), crops_of([500], updates=50, seed=2)
        epochs = []
        for epoch in (1, 2, 3, 1):
            dataset.set_epoch(epoch)
            epochs.append([int(dataset[i]["source"][0, 1]) for i in range(50)])
        assert epochs[0] == epochs[3]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert sum(x == y for x, y in zip(epochs[a], epochs[b], strict=True)) < 5
        seeded = [int(other[i]["source"][0, 1]) for i in range(50)]
        assert sum(x == y for x, y in zip(epochs[0], seeded, strict=True)) < 5
        assert not dataset.can_reuse_epoch_itr_across_epochs

    def test_speeds_are_speakers_of_their_own(self, monkeypatch):
        played = []
        monkeypatch.setattr(
            "fairseq_ext.speaker.dataset.change_speed",
            lambda x, factor, frames, frequencies: played.append(factor) or x[:frames],
        )
        ctx = Context(np.zeros(MELS), np.ones(MELS), 16000, -20.0)
        dataset = crops_of([40] * 3, updates=90, speed=0.1, speed_classes=3, context=ctx)
        labels = dataset.corpus.labels[dataset.rows[dataset.utterance]]
        counts = np.zeros(3, int)
        for i in range(90):
            played.clear()
            turn, label = divmod(dataset[i]["target"], 3)
            assert label == labels[i]
            assert (played or [1.0]) == [pytest.approx((1.0, 0.9, 1.1)[turn])]
            counts[turn] += 1
        assert counts.min() > 15

    def test_crops_of_one_utterance_differ_within_an_epoch(self):
        dataset = crops_of([5000], updates=50)
        assert len({int(dataset[i]["source"][0, 1]) for i in range(50)}) > 45

    def test_order_is_a_permutation_and_new_every_epoch(self):
        dataset = crops_of([300, 200], updates=40)
        first = dataset.ordered_indices()
        assert sorted(first) == list(range(len(dataset)))
        assert np.array_equal(first, dataset.ordered_indices())
        dataset.set_epoch(2)
        assert not np.array_equal(first, dataset.ordered_indices())

    def test_source_is_a_copy(self):
        dataset = crops_of([20])
        before = dataset.corpus.features.copy()
        dataset[0]["source"].fill_(99)
        assert np.array_equal(dataset.corpus.features, before)
        assert int(dataset[0]["source"][0, 0]) == 0

    @pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 11, 12, 13, 60])
    def test_speed(self, length):
        """Times are stretched, never read outside the utterance; a crop keeps its length."""
        ctx = Context(np.zeros(MELS), mel_frequencies(MELS, 50, 8000), 16000, -20.7)
        dataset = crops_of([30, length, 30], updates=200, speed=0.2, context=ctx, rows=[1])
        slopes, lasts = [], []
        for i in range(200):
            x = dataset[i]["source"].numpy()
            assert 1 <= len(x) <= 10 and np.isfinite(x).all()
            assert x.shape == (len(x), MELS)
            # the stretched frequency axis mixes bands 1 and 2, which both count frames
            t = x[:, 2]
            if len(t) > 1:
                slopes.append((t[-1] - t[0]) / (len(t) - 1))
            lasts.append(len(x))
        if length >= 13:
            assert set(lasts) == {10}
            assert 0.7 < min(slopes) < 0.9 and 1.1 < max(slopes) < 1.3

    def test_steps_are_applied_in_order_with_the_crops_own_generator(self):
        calls = []

        def step(x, rng, context):
            calls.append((float(rng.random()), context))
            return x + 1

        dataset = crops_of([40], updates=3, steps=[step, step], context="the context")
        plain = crops_of([40], updates=3)
        x = dataset[0]["source"]
        assert torch.equal(x, plain[0]["source"] + 2)
        assert calls[0][0] != calls[1][0] and calls[0][1] == "the context"
        dataset[0], dataset[1]
        assert calls[2:4] == calls[:2], "the same crop, the same numbers"
        assert calls[4][0] != calls[0][0]

    def test_augmentation_reaches_the_crop(self):
        ctx = Context(np.full(MELS, -7, np.float32), np.array([1e2, 1e3, 4e3]), 16000, -20.7)
        steps = build_augmentation("specaugment:freq_masks=3,freq_width=3")
        dataset = crops_of([40], updates=20, steps=steps, context=ctx)
        assert any((dataset[i]["source"] == -7).any() for i in range(20))


class TestEpoch:
    def test_covers_every_frame_once_by_default(self):
        dataset = crops_of([25, 10, 4, 31])
        assert len(dataset) == 3 + 1 + 1 + 4
        assert len(dataset.sizes) == len(dataset)

    @pytest.mark.parametrize("at_least, multiple", [(0, 1), (100, 1), (100, 8), (7, 64), (3, 5)])
    def test_size(self, at_least, multiple):
        dataset = crops_of([25, 10, 4, 31])
        dataset.set_epoch_size(at_least, multiple)
        wanted = max(9, at_least)
        assert wanted <= len(dataset) < wanted + multiple and len(dataset) % multiple == 0
        assert set(dataset.utterance.tolist()) == {0, 1, 2, 3}, "every utterance is seen"
        assert len(dataset.sizes) == len(dataset)

    def test_in_proportion_to_length(self):
        dataset = crops_of([1000, 100, 10])
        dataset.set_epoch_size(11100, 1)
        counts = np.bincount(dataset.utterance)
        np.testing.assert_allclose(counts, [10000, 1000, 100], rtol=0.02)

    @given(
        lengths=st.lists(st.integers(1, 10000), min_size=1, max_size=40),
        total=st.integers(0, 2000),
    )
    def test_allocate(self, lengths, total):
        counts = allocate(np.array(lengths), total)
        assert counts.sum() == max(total, len(lengths))
        assert (counts >= 1).all()
        share = np.array(lengths) / sum(lengths) * (counts.sum() - len(lengths)) + 1
        assert (np.abs(counts - share) < 1).all()
        order = np.argsort(lengths, kind="stable")
        assert (np.diff(counts[order]) >= -1).all()


class TestBalance:
    # one speaker with 40 utterances, two with one and two
    lengths = np.array([100] * 40 + [50] + [30, 60])
    labels = np.array([0] * 40 + [1] + [2] * 2)

    def crops(self, power, total=1200, turn=0):
        return balanced(self.lengths, self.labels, total, power, turn)

    def test_as_many_of_each_or_in_proportion_to_a_power(self):
        for name, expected in (("speaker", [400, 400, 400]), ("none", [1200 * 40 / 41.4])):
            utterance = self.crops(power_of(name))
            counts = np.bincount(self.labels[utterance], minlength=3)
            np.testing.assert_allclose(counts[: len(expected)], expected, atol=3)
        # √4000 : √50 : √90
        counts = np.bincount(self.labels[self.crops(power_of("0.5"))])
        np.testing.assert_allclose(counts / counts[1], [80**0.5, 1, 1.8**0.5], rtol=0.02)
        # within a speaker by length
        assert np.bincount(self.crops(0.0))[-2:].tolist() == [134, 266]

    def test_with_fewer_crops_than_utterances_they_come_in_turn(self):
        seen = [set(self.crops(0.0, total=30, turn=turn).tolist()) for turn in range(4)]
        assert all(len(each & set(range(40))) == 10 for each in seen)
        assert set.union(*seen) == set(range(43))

    def test_the_epochs_of_a_dataset(self):
        corpus = corpus_of(self.lengths, labels=self.labels)
        dataset = CropDataset(corpus, np.arange(43), 10, 1, balance=0.0)
        dataset.set_epoch_size(0, 8)
        for epoch in (1, 2):
            dataset.set_epoch(epoch)
            targets = [dataset[i]["target"] for i in range(len(dataset))]
            assert np.ptp(np.bincount(targets)) <= 1
            assert [len(dataset[i]["source"]) for i in range(8)] == dataset.sizes[:8].tolist()

    @pytest.mark.parametrize("wrong", ["even", "-1", "1.5", "nan"])
    def test_what_is_no_balance(self, wrong):
        with pytest.raises(ValueError, match="none, speaker, or a number"):
            power_of(wrong)

    def test_uneven_is_eight_times_the_median(self):
        assert is_uneven([100, 100, 800]) and is_uneven([100, 100, 12])
        assert not is_uneven([100, 100, 790]) and not is_uneven([100, 100, 13])
        assert not is_uneven([])


class TestUtterances:
    def test_each_speaker_weighs_as_much(self):
        corpus = corpus_of([5, 5, 5, 5], labels=[0, 0, 0, 2])
        batch = UtteranceDataset(corpus, np.arange(4)).collater(
            [UtteranceDataset(corpus, np.arange(4))[i] for i in range(4)]
        )
        torch.testing.assert_close(batch["weight"], torch.tensor([1 / 3, 1 / 3, 1 / 3, 1]))

    def test_whole_and_the_same_every_time(self):
        corpus = corpus_of([25, 4, 10], labels=[2, 0, 1])
        dataset = UtteranceDataset(corpus, np.array([2, 0]))
        assert len(dataset) == 2
        for index, row in ((0, 2), (1, 0)):
            sample = dataset[index]
            assert np.array_equal(sample["source"].numpy(), corpus.read(row))
            assert sample["target"] == corpus.labels[row] and sample["id"] == index
            assert dataset.size(index) == dataset.num_tokens(index) == corpus.lengths[row]
            assert content(dataset[index]) == content(sample)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(2)
        assert content(dataset[0]) == corpus.read(2).tobytes()
        assert dataset.num_tokens_vec(np.array([1, 0])).tolist() == [25, 10]
        assert sorted(dataset.ordered_indices().tolist()) == [0, 1]


class TestCollate:
    def sample(self, index, frames, target=0):
        return {"id": index, "source": torch.randn(frames, MELS), "target": target}

    def test_nothing(self):
        """What fairseq fills the shard of a process with when batches do not divide evenly."""
        assert collate([]) == {}
        assert UtteranceDataset(corpus_of([3]), np.array([0])).collater([]) == {}
        assert crops_of([3]).collater([]) == {}

    def test_one_length_needs_no_mask(self):
        samples = [self.sample(0, 5), self.sample(1, 5)]
        batch = collate(samples)
        assert batch["net_input"]["padding_mask"] is None
        assert torch.equal(batch["net_input"]["source"][1], samples[1]["source"])

    def test_padded(self):
        samples = [self.sample(4, 2, 1), self.sample(0, 5, 2), self.sample(2, 1, 0)]
        batch = collate(samples)
        source, mask = batch["net_input"]["source"], batch["net_input"]["padding_mask"]
        assert source.shape == (3, 5, MELS) and source.dtype == torch.float32
        assert mask.dtype == torch.bool
        assert mask.tolist() == [
            [False, False, True, True, True],
            [False] * 5,
            [False, True, True, True, True],
        ]
        for i, sample in enumerate(samples):
            assert torch.equal(source[i, ~mask[i]], sample["source"])
        assert batch["target"].tolist() == [1, 2, 0] and batch["id"].tolist() == [4, 0, 2]
        assert batch["nsentences"] == 3 and batch["ntokens"] == 8


class TestBatches:
    @given(
        sizes=st.lists(st.integers(1, 300), min_size=0, max_size=60),
        limit=st.integers(1, 1000),
        count=st.one_of(st.none(), st.integers(1, 9)),
    )
    def test_every_index_once_and_bounded(self, sizes, limit, count):
        sizes = np.array(sizes, dtype=np.int64)
        batches = batches_by_frames(sizes, limit, count)
        assert sorted(i for b in batches for i in b) == list(range(len(sizes)))
        for batch in batches:
            padded = len(batch) * sizes[batch].max()
            assert padded <= limit or len(batch) == 1
            assert count is None or len(batch) <= count
            assert batch

    def test_filled(self):
        assert [len(b) for b in batches_by_frames(np.full(10, 5), 15)] == [3, 3, 3, 1]
        assert [len(b) for b in batches_by_frames(np.full(10, 5), 15, 2)] == [2] * 5

    def test_longer_than_the_limit_is_alone(self):
        """A 7,193-frame utterance is not dropped, and drags nothing along."""
        batches = batches_by_frames(np.array([7193, 91, 541, 7000]), 1100)
        assert sorted(map(sorted, batches)) == [[0], [1, 2], [3]]

    def test_course_lengths_cost_what_was_asked_for(self):
        rng = np.random.default_rng(0)
        sizes = rng.lognormal(np.log(541), 0.6, 3000).clip(91, 7193).astype(int)
        batches = batches_by_frames(sizes, 40000)
        assert max(len(b) * sizes[b].max() for b in batches) <= 40000
        padded = sum(len(b) * sizes[b].max() for b in batches)
        assert padded < 1.1 * sizes.sum(), "neighbours in length share a batch"
