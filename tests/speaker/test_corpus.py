import json
import pickle

import numpy as np
import pytest
import torch

from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from ext_common.store import StoreWriter
from fairseq_ext.speaker import corpus as corpus_module
from fairseq_ext.speaker.augment import Context, build_augmentation, mel_frequencies
from fairseq_ext.speaker.corpus import Corpus, frame_statistics, write_corpus
from fairseq_ext.speaker.dataset import CropDataset
from fairseq_ext.speaker.features import FeatureSpec
from fairseq_ext.speaker.network import normalise
from fairseq_ext.speaker.task import SpeakerIdConfig

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
    assert std[2] == 1
    assert digest == corpus_module.sha256_file(tmp_path / "f")


@pytest.mark.parametrize("std, expected", [(0, 1), (1e-5, 1), (0.0999, 1), (0.1, 0.1), (4, 4)])
def test_a_band_that_hardly_changes_has_std_1(tmp_path, std, expected):
    """Also in folders prepared before there was a threshold, which have 1e-5 on disk."""
    make(tmp_path)
    meta = json.loads((tmp_path / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(meta | {"std": [std, 2, 2, 2]}))
    assert Corpus.open(tmp_path).std.tolist() == [np.float32(expected), 2, 2, 2]


@pytest.mark.parametrize("wobble", [0.0, 1e-3])
def test_augmentation_of_a_constant_band_stays_small(tmp_path, wobble):
    """What the network sees of --augment's default: 228,040 where std was 1e-5."""
    mels = 40
    spec, rng = FeatureSpec(), np.random.default_rng(0)
    frames = rng.normal(-6, 4, (400, mels)).astype("float32")
    frames[:, -3:] = np.log(spec.floor) + wobble * rng.random((400, 3))
    frames.tofile(tmp_path / "f")
    mean, std, _, _ = frame_statistics(tmp_path / "f", mels, [(0, 400)])
    context = Context(mean, mel_frequencies(mels, 50, 8000), 16000, float(np.log(spec.floor)))
    largest = 0.0
    for seed in range(50):
        x, draw = frames, np.random.default_rng(seed)
        for step in build_augmentation(SpeakerIdConfig.augment):
            x = step(x, draw, context)
        seen = normalise(
            torch.from_numpy(x)[None], None, "global", *map(torch.from_numpy, (mean, std))
        )
        largest = max(largest, float(seen[..., -3:].abs().max()))
    # at most 10 dB of gain and 20 log10(1.5) of tilt
    assert 1 < largest < (10 + 20 * np.log10(1.5)) * np.log(10) / 10 + 0.01


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


# --- more than one store, and more than memory ---------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_places_read_together_are_those_read_alone(tmp_path, parts):
    """Also where a place begins within a page, and in folders read as one."""
    folders = [tmp_path / str(part) for part in range(parts)]
    for folder in folders:
        make(folder, lengths=(700, 5, 1600, 3))
    corpus = Corpus.open(":".join(map(str, folders)))
    rng = np.random.default_rng(1)
    rows = rng.integers(len(corpus), size=50)
    starts = rng.integers(corpus.lengths[rows])
    lengths = rng.integers(corpus.lengths[rows] - starts + 1)
    found = corpus.read_together(rows, starts, lengths)
    for x, row, start, length in zip(found, rows, starts, lengths, strict=True):
        np.testing.assert_array_equal(x, corpus.read(row, start, length))
        assert x.flags.writeable and x.base is None
    with pytest.raises(ValueError, match="1, x.wav: frames 3 to 6 of 5 do not exist"):
        corpus.read_together(np.array([0, 1]), np.array([1, 3]), np.array([3, 3]))


class TestSeveral:
    def test_are_one(self, tmp_path):
        """Utterances one behind the other; statistics as of one store with the frames of both."""
        make(tmp_path / "a")
        make(tmp_path / "b", ("train", "valid", "train", "test"))
        a, b = Corpus.open(tmp_path / "a"), Corpus.open(tmp_path / "b")
        text = f"{tmp_path / 'a'}:{tmp_path / 'b'}"
        both = Corpus.open(text)
        arrays = [a.read(row) for row in range(4)] + [b.read(row) for row in range(4)]
        for one in (both, pickle.loads(pickle.dumps(both))):
            assert all(np.array_equal(one.read(row), array) for row, array in enumerate(arrays))
            assert np.array_equal(one.read(6, 2, 3), arrays[6][2:5])
        assert both.rows("train").tolist() == [0, 1, 4, 6]
        assert both.labels.tolist() == [*a.labels, *b.labels] and both.speakers == ["a", "b"]
        trained = np.concatenate([arrays[row] for row in (0, 1, 4, 6)]).astype(np.float64)
        np.testing.assert_allclose(both.mean, trained.mean(0), rtol=1e-5)
        np.testing.assert_allclose(both.std, trained.std(0), rtol=1e-5)

    def test_speakers_of_one_name_are_one(self, tmp_path):
        make(tmp_path / "a")
        make(tmp_path / "b")
        other = Corpus.open(tmp_path / "b")
        meta = json.loads((other.path / "corpus.json").read_text())
        rows = (other.path / "utterances.csv").read_text().replace(",a,", ",z,")
        (other.path / "utterances.csv").write_text(rows)
        meta.update(
            speakers=["b", "z"], utterances_sha256=sha256_file(other.path / "utterances.csv")
        )
        (other.path / "corpus.json").write_text(json.dumps(meta))
        both = Corpus.open(f"{tmp_path / 'a'}:{tmp_path / 'b'}")
        assert both.speakers == ["a", "b", "z"]
        assert both.labels.tolist() == [1, 0, 1, -1, 1, 2, 1, -1]

    def test_of_other_features_are_refused(self, tmp_path):
        make(tmp_path / "a")
        make(tmp_path / "b")
        other = Corpus.open(tmp_path / "b")
        meta = json.loads((other.path / "corpus.json").read_text())
        meta["spec"]["f_min"] = 20.0
        (other.path / "corpus.json").write_text(json.dumps(meta))
        with pytest.raises(UserError, match="prepare them with the same options"):
            Corpus.open(f"{tmp_path / 'a'}:{tmp_path / 'b'}")


def anonymous_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def test_a_store_of_50_gb_needs_no_memory(tmp_path):
    """Sparse: its holes are read as zeros. Crops from all over it, of an epoch of a million."""
    frames, length = 312_500_000, 100_000
    offsets = range(0, frames, length)
    with open(tmp_path / "features.bin", "wb") as file:
        file.truncate(frames * 160)
    index = {"format": 1, "dtype": "<f4", "row_shape": [40], "rows": frames}
    index["lengths"] = [length] * len(offsets)
    (tmp_path / "features.json").write_text(json.dumps(index))
    lines = [f"{k},{'ab'[k % 2]},train,,{offset},{length}" for k, offset in enumerate(offsets)]
    table = "\n".join(["id,speaker,split,group,offset,length", *lines, ""])
    (tmp_path / "utterances.csv").write_text(table)
    meta = {"format": 1, "utterances": len(offsets), "frames": frames, "speakers": ["a", "b"]}
    meta |= {"spec": FeatureSpec(n_mels=40).to_dict(), "mean": [0.0] * 40, "std": [1.0] * 40}
    meta |= {"utterances_sha256": sha256_file(tmp_path / "utterances.csv")}
    (tmp_path / "corpus.json").write_text(json.dumps(meta))
    before = anonymous_mb()
    corpus = Corpus.open(tmp_path)
    dataset = CropDataset(corpus, corpus.rows("train"), 300, seed=1)
    assert len(dataset) > 10**6
    built = anonymous_mb()
    for index in range(0, len(dataset), len(dataset) // 200):
        assert len(dataset[index]["source"]) == 300
    # tables of an epoch's crops; nothing more for what is read
    assert built - before < 300 and anonymous_mb() - built < 20
