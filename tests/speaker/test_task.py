"""The task: nothing dropped, new crops every epoch in every worker, names in the checkpoint."""

import fairseq  # noqa: F401
import numpy as np
import pytest
import torch

from ext_common.cli import UserError
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.criterion import SCALED, SpeakerCriterion
from fairseq_ext.speaker.dataset import CropDataset, UtteranceDataset
from fairseq_ext.speaker.features import FeatureSpec
from fairseq_ext.speaker.metrics import SCALES
from fairseq_ext.speaker.task import SpeakerIdConfig, SpeakerIdTask

MELS = 2


def corpus_of(lengths):
    """Frame t of utterance u is (u, t)."""
    lengths = np.array(lengths, dtype=np.int64)
    frames = [np.stack([np.full(n, u), np.arange(n)], 1) for u, n in enumerate(lengths)]
    return Corpus(
        path=None,
        ids=[str(i) for i in range(len(lengths))],
        labels=np.arange(len(lengths)) % 2,
        splits=np.array(["train"] * len(lengths)),
        groups=[""] * len(lengths),
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        speakers=["a", "b"],
        spec=FeatureSpec(n_mels=MELS),
        mean=np.zeros(MELS, dtype=np.float32),
        std=np.ones(MELS, dtype=np.float32),
        features=np.concatenate(frames).astype(np.float32),
    )


def task_of(**changes):
    own = dict(
        data="none", crop_frames=5, epoch_updates=4, seed=1, train_subset="train", update_freq=[1]
    )
    return SpeakerIdTask(SpeakerIdConfig(**{**own, **changes}))


def crops(lengths, task, seed=1):
    corpus = corpus_of(lengths)
    return CropDataset(corpus, np.arange(len(lengths)), task.cfg.crop_frames, seed)


def epoch_of(task, dataset, epoch, **options):
    """{index: (utterance, first frame)} of one epoch, and the size of every batch."""
    iterator = task.get_batch_iterator(dataset, epoch=epoch, seed=1, **options)
    found, sizes = {}, []
    for batch in iterator.next_epoch_itr(shuffle=True):
        sizes.append(len(batch["id"]) if batch else 0)
        for i, index in enumerate(batch["id"].tolist() if batch else []):
            assert index not in found, "an utterance came twice"
            u, t = batch["net_input"]["source"][i, 0].tolist()
            found[index] = (int(u), int(t))
    return found, sizes


@pytest.mark.parametrize("count", range(1, 21))
def test_no_utterance_is_dropped_in_validation(count):
    """fairseq's own iterator rounds batches to a multiple of 8 and skips what is too long."""
    task = task_of(max_valid_frames=60)
    lengths = np.random.default_rng(count).integers(1, 90, count)
    dataset = UtteranceDataset(corpus_of(lengths), np.arange(count))
    for batch_size in (None, 1, 3, 8, 64):
        for shards in (1, 2, 3):
            seen = []
            for shard in range(shards):
                iterator = task.get_batch_iterator(
                    dataset,
                    max_tokens=20,
                    max_sentences=batch_size,
                    max_positions=10,
                    required_batch_size_multiple=8,
                    num_shards=shards,
                    shard_id=shard,
                )
                for batch in iterator.next_epoch_itr(shuffle=False):
                    seen += batch["id"].tolist() if batch else []
                    if batch:
                        padded = batch["net_input"]["source"].shape[:2].numel()
                        assert padded <= 60 or len(batch["id"]) == 1
                        assert not batch_size or len(batch["id"]) <= batch_size
                        for index, x in zip(batch["id"], batch["net_input"]["source"], strict=True):
                            n = int(lengths[index])
                            assert torch.equal(x[:n, 1], torch.arange(n).float()), "whole"
            assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 20])
@pytest.mark.parametrize("batch_size, update_freq, shards", [(4, 1, 1), (8, 1, 2), (3, 2, 2)])
def test_training_epoch(count, batch_size, update_freq, shards):
    """Full batches, epoch_updates at least, every utterance, no crop in two processes."""
    task = task_of(update_freq=[update_freq])
    lengths = np.random.default_rng(count).integers(1, 40, count)
    found, sizes = {}, []
    for shard in range(shards):
        part, more = epoch_of(
            task,
            crops(lengths, task),
            1,
            max_sentences=batch_size,
            num_shards=shards,
            shard_id=shard,
            required_batch_size_multiple=8,
        )
        assert not set(part) & set(found)
        found.update(part)
        sizes += more
    per_update = batch_size * update_freq * shards
    assert set(sizes) == {batch_size}, "no short batch"
    assert len(found) % per_update == 0
    assert len(found) // per_update >= task.cfg.epoch_updates
    assert len(found) * 5 >= lengths.sum(), "as many frames as there are"
    assert {u for u, _ in found.values()} == set(range(count))


def test_batches_are_those_of_one_process():
    """Two processes, or two accumulated batches, train an update on the same utterances."""
    lengths = [30, 50, 20, 40]

    def updates(shards, update_freq):
        task = task_of(update_freq=[update_freq])
        lists = []
        for shard in range(shards):
            iterator = task.get_batch_iterator(
                crops(lengths, task), max_sentences=4, num_shards=shards, shard_id=shard
            )
            lists.append([b["id"].tolist() for b in iterator.next_epoch_itr(shuffle=True)])
        rows = zip(*lists, strict=True) if shards > 1 else zip(*[iter(lists[0])] * 2, strict=True)
        return [sorted(sum(row, [])) for row in rows]

    assert updates(2, 1) == updates(1, 2)


def test_workers_see_the_epoch_they_work_for():
    """Two epochs, two crops; the same in 0 and 2 workers, and when started at the second."""
    lengths = [200, 300, 100]
    runs = {}
    for workers in (0, 2):
        task = task_of()
        dataset = crops(lengths, task)
        for epoch in (1, 2):
            runs[workers, epoch] = epoch_of(
                task, dataset, epoch, max_sentences=8, num_workers=workers
            )[0]
    assert runs[0, 1] == runs[2, 1] and runs[0, 2] == runs[2, 2]
    same = sum(runs[0, 1][i] == runs[0, 2][i] for i in runs[0, 1])
    assert same < len(runs[0, 1]) / 10
    task = task_of()
    late, _ = epoch_of(task, crops(lengths, task), 2, max_sentences=8)
    assert late == runs[0, 2]


def test_resumed_within_an_epoch():
    """The batches that were left, with the crops they would have had."""
    lengths = [200, 300, 100]

    def fresh(workers=0):
        task = task_of()
        return task.get_batch_iterator(
            crops(lengths, task), max_sentences=8, epoch=3, num_workers=workers
        )

    def take(batches, n):
        return [next(batches)["net_input"]["source"].numpy().tobytes() for _ in range(n)]

    iterator = fresh()
    batches = iterator.next_epoch_itr(shuffle=True)
    take(batches, 5)
    state = iterator.state_dict()
    rest = take(batches, 4)
    for workers in (0, 2):
        again = fresh(workers)
        again.load_state_dict(state)
        assert take(again.next_epoch_itr(shuffle=True), 4) == rest


def test_batch_size_by_frames():
    task = task_of()
    _, sizes = epoch_of(task, crops([100, 50], task), 1, max_tokens=31)
    assert set(sizes) == {6}
    _, sizes = epoch_of(task, crops([100, 50], task), 1, max_tokens=31, max_sentences=2)
    assert set(sizes) == {2}
    _, sizes = epoch_of(task, crops([100, 50], task), 1, max_tokens=2)
    assert set(sizes) == {1}


def test_update_freq_by_epoch():
    task = task_of(update_freq=[1, 3])
    dataset = crops([100], task)
    for epoch, factor in ((1, 1), (2, 3), (9, 3)):
        found, _ = epoch_of(task, dataset, epoch, max_sentences=7)
        assert len(found) == 7 * factor * 4


class TestOnPreparedData:
    def test_splits(self, tiny_data):
        """Augmented crops for training, whole utterances as they are for the rest."""
        task = task_of(data=str(tiny_data), augment="channel;specaugment", crop_frames=20)
        for split in ("train", "valid", "test"):
            task.load_dataset(split)
        corpus = Corpus.open(tiny_data)
        train = task.dataset("train")
        assert isinstance(train, CropDataset) and len(train.steps) == 2 and train.seed == 1
        assert train[0]["source"].shape == (20, 40)
        for split in ("valid", "test"):
            dataset, rows = task.dataset(split), corpus.rows(split)
            assert isinstance(dataset, UtteranceDataset) and len(dataset) == len(rows)
            for index, row in enumerate(rows):
                assert np.array_equal(dataset[index]["source"].numpy(), corpus.read(row))
                assert dataset[index]["target"] == corpus.labels[row]

    def test_unknown_split(self, tiny_data):
        with pytest.raises(UserError, match="no split 'dev'.*train"):
            task_of(data=str(tiny_data)).load_dataset("dev")

    def test_one_speaker_is_refused(self, tiny_data, monkeypatch):
        task = task_of(data=str(tiny_data))
        monkeypatch.setattr(task.corpus, "labels", np.zeros_like(task.corpus.labels))
        with pytest.raises(UserError, match="one speaker only"):
            task.load_dataset("train")

    def test_mistyped_augmentation(self, tiny_data):
        with pytest.raises(UserError, match="did you mean 'channel'"):
            task_of(data=str(tiny_data), augment="chanel").load_dataset("train")

    def test_noise_from_audio_and_prepared_folders(self, tiny_data, tiny_recordings, tmp_path):
        from fairseq_ext.speaker.task import read_collection

        spec = Corpus.open(tiny_data).spec
        files = sorted((tiny_recordings / "anna").glob("*.wav"))
        found = read_collection(str(tiny_recordings / "anna"), spec)
        assert len(found) == len(files) and all(x.shape[1] == 40 for x in found)
        prepared = read_collection(str(tiny_data), spec)
        assert len(prepared) == 40
        corpus = Corpus.open(tiny_data)
        row = corpus.ids.index("anna/0.wav")
        np.testing.assert_allclose(prepared[row], found[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match="no audio files"):
            read_collection(str(tmp_path), spec)
        with pytest.raises(UserError, match="other features"):
            read_collection(str(tiny_data), FeatureSpec(n_mels=80))

    def test_noises_and_rooms_are_made_where_no_folder_is_given(self, tiny_data):
        def context(augment):
            task = task_of(data=str(tiny_data), augment=augment)
            return task._context(task.corpus.rows("train"))

        found, again = context("noise;reverb"), context("noise:p=1;reverb")
        assert (len(found.noises), len(found.impulse_responses)) == (24, 32)
        for one, other in zip(found.noises, again.noises, strict=True):
            assert one.shape == (1001, 40)
            np.testing.assert_array_equal(one, other)
        assert not context("channel").noises and not context("noise").impulse_responses

    def test_names_and_features_travel_in_the_checkpoint(self, tiny_data):
        """The labels are the corpus's, in its order; no data is needed to have them again."""
        state = task_of(data=str(tiny_data)).state_dict()
        corpus = Corpus.open(tiny_data)
        assert state == {"speakers": corpus.speakers, "spec": corpus.spec.to_dict()}
        assert type(state["speakers"]) is list and type(state["spec"]) is dict
        without = task_of(data="gone/away")
        without.load_state_dict(state)
        assert without.speakers == corpus.speakers and without.spec == corpus.spec.to_dict()
        assert without.state_dict() == state

    def test_the_scale_of_the_last_validation_travels_in_the_checkpoint(self, tiny_data):
        task, criterion = task_of(data=str(tiny_data)), SpeakerCriterion.__new__(SpeakerCriterion)
        log = {key: 1 for key in ("loss", "correct", "correct5", "sample_size", "ntokens")}
        log["nsentences"] = 1
        assert "scale" not in task.state_dict()
        for least in (4, 5):
            task.begin_valid_epoch(1, None)
            # of two batches, whose sum has its least there
            for batch in range(2):
                losses = np.abs(np.arange(len(SCALED)) - least) + float(batch)
                task.reduce_metrics([log | dict(zip(SCALED, losses, strict=True))], criterion)
            # training logs nothing of it
            task.reduce_metrics([log], criterion)
            assert task.state_dict()["scale"] == SCALES[least]
        again = task_of(data=str(tiny_data))
        again.check_resume({"task_state": task.state_dict()}, True)
        assert again.state_dict() == task.state_dict()

    def test_other_speakers_or_features_than_the_checkpoint(self, tiny_data):
        state = task_of(data=str(tiny_data)).state_dict()
        for change, message in (
            ({"speakers": ["x", *state["speakers"][1:]]}, "--init-from"),
            ({"speakers": state["speakers"][::-1]}, "--init-from"),
            ({"spec": {**state["spec"], "f_min": 20.0}}, "prepare the data again"),
        ):
            task = task_of(data=str(tiny_data))
            assert len(task.corpus) == 40
            with pytest.raises(UserError, match=message):
                task.load_state_dict({**state, **change})
            with pytest.raises(UserError, match=message):
                task.check_resume({"task_state": {**state, **change}}, same_run=True)
            # of another task altogether: its weights do not fit, which says so
            task.check_resume({"task_state": {"spec": {"height": 8}}}, same_run=True)
            task.check_resume({"task_state": state}, same_run=True)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(crop_frames=0), "--crop-frames"),
        (dict(speed_perturb=1.5), "--speed-perturb 1.5"),
        (dict(speed_classes=True), "--speed-classes needs --speed-perturb"),
        (dict(augment="chanel"), "did you mean 'channel'"),
        (dict(noise_dir="/no/such/folder"), "--noise-dir /no/such/folder does not exist"),
        (dict(augment="channel;codec:kinds=mp4"), "unknown codec 'mp4': known are mp3, ogg, ulaw"),
        (dict(rir_dir="/no/such/folder"), "--rir-dir /no/such/folder does not exist"),
    ],
)
def test_options_are_checked_before_anything_is_built(options, words):
    with pytest.raises(UserError, match=words):
        task_of(**options)
