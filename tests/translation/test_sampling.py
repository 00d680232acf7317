"""Subword sampling: the same text, the stated distribution, the same again from seed, epoch and index."""

import itertools
import math
import pickle
from collections import Counter

import fairseq  # noqa: F401
import numpy as np
import pytest
import torch
from fairseq.data import LanguagePairDataset
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import UserError
from fairseq_ext.translation.sampling import SampledPairs, SubwordSampler
from fairseq_ext.translation.text.normalise import normalise
from fairseq_ext.translation.text.spm import Codec, train_model
from fairseq_ext.translation.text.vocabulary import SpmDictionary

from .conftest import toy_pairs

LINES = [line for pair in toy_pairs(60, seed=5) for line in pair]
TEXT = (
    st.sampled_from(LINES) | st.text(max_size=30) | st.text("aeilosp 我们苹😀龘<BT>", max_size=30)
)


@pytest.fixture(scope="module")
def codecs(toy_data):
    files = [toy_data / "text" / f"train.{lang}" for lang in ("en", "zh")]
    return {
        kind: Codec(train_model(files, size=500, kind=kind), ["<BT>"])
        for kind in ("unigram", "bpe")
    }


def off(kind):
    return {"unigram": math.inf, "bpe": 0.0}[kind]


def on(kind):
    return {"unigram": 0.2, "bpe": 0.3}[kind]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(text=TEXT, seed=st.integers(0, 99))
def test_spells_the_same_text_and_off_is_the_plain_encoding(codecs, kind, text, seed):
    codec = codecs[kind]
    ids = [codec.symbol_id("<BT>"), *codec.encode(normalise(text, "zh"))]
    for strength in (on(kind), {"unigram": 1e-9, "bpe": 1.0}[kind]):
        cut = SubwordSampler(codec, strength).sample(ids, np.random.default_rng(seed))
        assert codec.decode(cut) == codec.decode(ids)
        assert cut[0] == ids[0], "extra symbols stay"
        assert 3 not in cut
    plain = SubwordSampler(codec, off(kind)).sample(ids, np.random.default_rng(seed))
    assert plain == ids


def test_unigram_draws_each_segmentation_with_its_probability(codecs):
    """Closed form: all ways to cut a word, each weighted by its probability to the α."""
    codec, alpha = codecs["unigram"], 0.3
    word = next(
        name for name in codec.pieces(range(280, codec.size)) if len(name) == 4 and name[0] == "▁"
    )
    processor = codec.processor
    expected = {}
    for cuts in itertools.product((0, 1), repeat=len(word) - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(word)]
        ids = [processor.piece_to_id(word[a:b]) for a, b in itertools.pairwise(edges)]
        if 3 not in ids:
            expected[tuple(ids)] = math.exp(alpha * sum(map(processor.get_score, ids)))
    assert len(expected) > 2
    sampler = SubwordSampler(codec, alpha)
    rng = np.random.default_rng(0)
    draws = 20_000
    plain = codec.encode(word[1:])
    found = Counter(tuple(sampler.sample(plain, rng)) for _ in range(draws))
    assert set(found) <= set(expected)
    for ids, weight in expected.items():
        p = weight / sum(expected.values())
        assert abs(found[ids] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9


def test_bpe_dropout_of_one_merge_is_a_coin(codecs):
    """Two characters have one merge, left out with probability p; p = 1 leaves characters."""
    codec, p = codecs["bpe"], 0.3
    word = next(
        name
        for name in codec.pieces(range(262, codec.size))
        if len(name) == 2 and "▁" not in name and len(codec.pieces(codec.encode(name))) <= 2
    )
    whole = [codec.processor.piece_to_id(word)]
    rng = np.random.default_rng(0)
    sampler = SubwordSampler(codec, p)
    found = Counter(tuple(sampler.sample(whole, rng)) for _ in range(20_000))
    apart = tuple(codec.processor.piece_to_id(c) for c in word)
    assert set(found) == {tuple(whole), apart}
    assert found[apart] / 20_000 == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 20_000))
    ids = codec.encode("we like apples")
    letters = SubwordSampler(codec, 1.0).sample(ids, rng)
    assert codec.pieces(letters) == list("▁we▁like▁apples")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sampler_survives_pickling(codecs, kind):
    ids = codecs[kind].encode("we like red apples")
    sampler = SubwordSampler(codecs[kind], on(kind))
    again = pickle.loads(pickle.dumps(sampler))
    draws = [s.sample(ids, np.random.default_rng(3)) for s in (sampler, again)]
    assert draws[0] == draws[1]


def test_strengths_without_meaning_are_refused(codecs):
    with pytest.raises(UserError, match="no probability"):
        SubwordSampler(codecs["bpe"], 1.5)
    with pytest.raises(UserError, match="not above 0"):
        SubwordSampler(codecs["unigram"], 0.0)


# --- the dataset --------------------------------------------------------------------------------------


def dataset_of(codec, sides=("source",), limit=1024, seed=1, strength=0.1):
    rows = [
        [torch.tensor([*codec.encode(pair[side]), 2]) for pair in toy_pairs(60, seed=5)]
        for side in (0, 1)
    ]
    sizes = [[len(row) for row in side] for side in rows]
    d = SpmDictionary(codec, "zh")
    pairs = LanguagePairDataset(rows[0], sizes[0], d, rows[1], sizes[1], d)
    samplers = {side: SubwordSampler(codec, strength) for side in sides}
    return pairs, SampledPairs(pairs, samplers, dict.fromkeys(("source", "target"), limit), seed)


def cuts(dataset, epoch, indices=range(60)):
    dataset.set_epoch(epoch)
    return {i: [dataset[i][side].tolist() for side in ("source", "target")] for i in indices}


@pytest.mark.parametrize("sides", [("source",), ("target",), ("source", "target")])
def test_another_cut_every_epoch_the_same_from_seed_epoch_and_index(codecs, sides):
    codec = codecs["unigram"]
    plain, dataset = dataset_of(codec, sides)
    first, second = cuts(dataset, 1), cuts(dataset, 2)
    assert first != second
    assert cuts(dataset, 1, reversed(range(60))) == first, "whatever was drawn before"
    assert cuts(dataset_of(codec, sides)[1], 2) == second, "in another process"
    assert cuts(dataset_of(codec, sides, seed=2)[1], 1) != first
    for i, pair in first.items():
        for side, ids in zip(("source", "target"), pair, strict=True):
            assert codec.decode(ids) == codec.decode(plain[i][side]) and ids[-1] == 2
            if side not in sides:
                assert ids == plain[i][side].tolist()
    changed = sum(first[i][0] != plain[i]["source"].tolist() for i in range(60))
    assert changed > 30 or "source" not in sides


def test_workers_draw_the_same(codecs, toy_data):
    """Through the task's iterator, with worker processes and resumed in the middle of epoch 2."""
    from .test_task import task_on

    task = task_on(toy_data)
    _, dataset = dataset_of(codecs["unigram"])

    def epoch(number, workers, skip=0):
        iterator = task.get_batch_iterator(
            dataset, max_tokens=300, num_workers=workers, epoch=number, seed=1
        )
        if skip:
            state = {"version": 2, "epoch": number, "iterations_in_epoch": skip, "shuffle": True}
            iterator.load_state_dict(state)
        batches = list(iterator.next_epoch_itr(shuffle=True))
        return [batch["net_input"]["src_tokens"].tolist() for batch in batches]

    first, second = epoch(1, 0), epoch(2, 0)
    assert first != second
    assert epoch(2, 2) == second
    assert epoch(2, 1, skip=3) == second[3:]


def test_batches_keep_to_the_budget_and_are_still_sampled(codecs):
    from fairseq.data.data_utils import batch_by_size

    plain, dataset = dataset_of(codecs["unigram"], ("source", "target"))
    assert dataset.growth > 1.1
    indices = np.arange(60)
    assert (dataset.num_tokens_vec(indices) >= plain.num_tokens_vec(indices)).all()
    dataset.budget = 400
    tokens = dataset.num_tokens_vec(indices)
    changed = 0
    for batch in batch_by_size(indices, None, tokens, max_tokens=400):
        collated = dataset.collater([dataset[i] for i in batch])
        for tokens in (collated["net_input"]["src_tokens"], collated["target"]):
            assert tokens.numel() <= 400
        again = plain.collater([plain[i] for i in batch])
        changed += collated["ntokens"] != again["ntokens"]
    assert changed, "the guard does not take all of it back"


def test_a_cut_that_the_model_has_no_positions_for_stays_plain(codecs):
    plain, _ = dataset_of(codecs["unigram"])
    limit = int(np.max(plain.src_sizes))
    _, dataset = dataset_of(codecs["unigram"], limit=limit, strength=1e-9)
    found = cuts(dataset, 1)
    assert all(len(source) <= limit for source, _ in found.values())
    longest = int(np.argmax(plain.src_sizes))
    assert found[longest][0] == plain[longest]["source"].tolist()


def test_the_task_samples_training_only(toy_data):
    from .test_task import task_on

    task = task_on(toy_data, subword_sampling=0.2, subword_sampling_sides="both")
    for split in ("train", "valid"):
        task.load_dataset(split)
    assert isinstance(task.dataset("train"), SampledPairs)
    assert set(task.dataset("train").samplers) == {"source", "target"}
    assert not isinstance(task.dataset("valid"), SampledPairs)
    task.load_dataset("train", task_cfg=task.cfg)
    assert not isinstance(task.dataset("train"), SampledPairs), "to generate from it"
    with pytest.raises(UserError, match="at least 0"):
        task_on(toy_data, subword_sampling=-0.1)
