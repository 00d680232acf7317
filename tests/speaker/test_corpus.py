import json
import pickle

import numpy as np
import pytest

from ext_common.cli import UserError
from ext_common.store import StoreWriter
from fairseq_ext.speaker import corpus as corpus_module
from fairseq_ext.speaker.corpus import MIN_STD, Corpus, frame_statistics, write_corpus
from fairseq_ext.speaker.features import FeatureSpec

SPEC = FeatureSpec(n_mels=4)


def make(folder, splits=("train", "train", "valid", "test"), lengths=(7, 5, 6, 3)):
    rng = np.random.default_rng(3)
    arrays = [(rng.standard_normal((n, 4)) * 5 - 2).astype("float32") for n in lengths]
    names = ["b", "a", "b", None]
    with StoreWriter(folder, (4,)) as writer:
        offsets = [writer.append(str(i), array) for i, array in enumerate(arrays)]
        rows = [
            (f"{i}, x.wav", names[i], splits[i], "g" if i == 2 else None, offsets[i], lengths[i])
            for i in range(4)
        ]
        write_corpus(folder, writer.part, rows, ["a", "b"], SPEC)
        writer.finish()
    return arrays


def test_what_was_written_is_read(tmp_path):
    arrays = make(tmp_path)
    corpus = Corpus.open(tmp_path)
    assert corpus.ids == [f"{i}, x.wav" for i in range(4)] and len(corpus) == 4
    assert corpus.labels.tolist() == [1, 0, 1, -1] and corpus.labels.dtype == np.int64
    assert corpus.splits.tolist() == ["train", "train", "valid", "test"]
    assert corpus.groups == ["", "", "g", ""]
    assert corpus.speakers == ["a", "b"] and corpus.spec == SPEC
    assert corpus.lengths.tolist() == [7, 5, 6, 3] and corpus.offsets.dtype == np.int64
    for row, array in enumerate(arrays):
        np.testing.assert_array_equal(corpus.read(row), array)
    np.testing.assert_array_equal(corpus.read(1, 2, 3), arrays[1][2:5])
    assert corpus.read(1, 5).shape == (0, 4)
    header = (tmp_path / "utterances.csv").read_text().splitlines()[0]
    assert header == "id,speaker,split,group,offset,length"


def test_a_crop_is_a_copy(tmp_path):
    arrays = make(tmp_path)
    corpus = Corpus.open(tmp_path)
    crop = corpus.read(0, 1, 2)
    crop += 1
    np.testing.assert_array_equal(corpus.read(0), arrays[0])
    with pytest.raises(ValueError, match="read-only"):
        corpus.features[0, 0] = 1


@pytest.mark.parametrize("start, length", [(-1, 2), (0, 8), (6, 2), (8, None), (0, -1)])
def test_frames_of_a_neighbour_are_never_read(tmp_path, start, length):
    make(tmp_path)
    with pytest.raises(ValueError, match="do not exist"):
        Corpus.open(tmp_path).read(0, start, length)


def test_rows_of_a_split(tmp_path):
    make(tmp_path)
    corpus = Corpus.open(tmp_path)
    assert corpus.rows("train").tolist() == [0, 1] and corpus.rows("train").dtype == np.int64
    with pytest.raises(UserError, match="no split 'dev'; it has: train, valid, test"):
        corpus.rows("dev")


@pytest.mark.parametrize(
    "splits, used",
    [
        (("train", "train", "valid", "test"), [0, 1]),
        (("valid", "test", "valid", "test"), [0, 1, 2]),
    ],
)
def test_mean_and_std_are_those_of_training(tmp_path, splits, used):
    arrays = make(tmp_path, splits=splits)
    frames = np.concatenate([arrays[i] for i in used]).astype(np.float64)
    corpus = Corpus.open(tmp_path)
    assert corpus.mean.dtype == corpus.std.dtype == np.float32
    np.testing.assert_allclose(corpus.mean, frames.mean(0), rtol=1e-6)
    np.testing.assert_allclose(corpus.std, frames.std(0), rtol=1e-6)


def test_statistics_in_pieces_with_overlaps_and_a_large_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_BYTES", 4 * 3 * 8)  # 8 frames at a time
    rng = np.random.default_rng(0)
    data = (rng.standard_normal((100, 3)) + 3000).astype("<f4")
    data[:, 2] = 7
    data.tofile(tmp_path / "f")
    spans = [(10, 30), (50, 1), (25, 40), (99, 1)]
    mean, std, digest, frames = frame_statistics(tmp_path / "f", 3, spans)
    used = np.concatenate([data[a : a + n] for a, n in spans]).astype(np.float64)
    assert frames == 100
    np.testing.assert_allclose(mean, used.mean(0), rtol=1e-7)
    np.testing.assert_allclose(std[:2], used.std(0)[:2], rtol=1e-5)
    assert std[2] == np.float32(MIN_STD)
    assert digest == corpus_module.sha256_file(tmp_path / "f")


def test_folders_that_are_no_corpus_are_named(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        Corpus.open(tmp_path / "absent")
    with pytest.raises(UserError, match="not a prepared folder"):
        Corpus.open(tmp_path)
    with StoreWriter(tmp_path, (4,)) as writer:
        writer.append("0", np.zeros((2, 4), "float32"))
    with pytest.raises(UserError, match="interrupted: run the same prepare command again"):
        Corpus.open(tmp_path)


def test_damage_is_named(tmp_path):
    make(tmp_path)
    data = (tmp_path / "features.bin").read_bytes()
    (tmp_path / "features.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match="features.bin has .* bytes"):
        Corpus.open(tmp_path)
    (tmp_path / "features.bin").write_bytes(data)
    Corpus.open(tmp_path)
    table = (tmp_path / "utterances.csv").read_text()
    (tmp_path / "utterances.csv").write_text(table.replace("train", "valid", 1))
    with pytest.raises(UserError, match="utterances.csv is missing or was changed"):
        Corpus.open(tmp_path)
    (tmp_path / "utterances.csv").write_text(table)
    meta = json.loads((tmp_path / "corpus.json").read_text())
    for change, message in (
        ({"format": 9}, "format 9"),
        ({"frames": 1}, "belongs to other features"),
    ):
        (tmp_path / "corpus.json").write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=message):
            Corpus.open(tmp_path)
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(tmp_path)


def test_pickled_without_its_features(tiny_data):
    """A loading worker of a spawned process opens the store itself: 6.8 GB do not travel."""
    corpus = Corpus.open(tiny_data)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < corpus.features.nbytes / 10
    again = pickle.loads(pickled)
    for row in range(len(corpus)):
        assert np.array_equal(again.read(row), corpus.read(row))
