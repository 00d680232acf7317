"""python -m fairseq_ext.speaker.embed: arrays, Kaldi archives and the projection."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.embed import main, project
from fairseq_ext.speaker.inference import SpeakerModel


@pytest.fixture
def embed(tiny_checkpoint, tmp_path, monkeypatch):
    """Run the command in an empty folder with the tiny checkpoint."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args):
        return main([*map(str, args), "--path", str(tiny_checkpoint), "--device", "cpu"])

    return run


def test_npz_has_every_utterance_in_source_order(embed, tiny_data, tiny_checkpoint):
    assert embed(tiny_data) == 0
    corpus, model = Corpus.open(tiny_data), SpeakerModel.from_checkpoint(tiny_checkpoint)
    # without pickle, as numpy reads by default
    found = np.load("embeddings.npz")
    assert found["ids"].tolist() == corpus.ids
    assert found["speakers"].tolist() == [corpus.speakers[label] for label in corpus.labels]
    assert found["embeddings"].dtype == np.float32
    assert found["recordings"].tolist() == corpus.ids
    alone = np.concatenate([model.embed([corpus.read(row)]) for row in range(len(corpus))])
    np.testing.assert_allclose(found["embeddings"], alone, atol=1e-5)
    manifest = json.load(open("embeddings.manifest.json"))
    assert manifest["counts"]["out"] == len(corpus)
    assert sorted(os.listdir()) == ["embeddings.manifest.json", "embeddings.npz"]


def test_a_split_in_other_batches_is_the_same(embed, tiny_data):
    embed(tiny_data, "--subset", "test", "--output", "a.npz")
    embed(tiny_data, "--subset", "test", "--output", "b.npz", "--batch-size", 2)
    a, b = np.load("a.npz"), np.load("b.npz")
    corpus = Corpus.open(tiny_data)
    assert a["ids"].tolist() == [corpus.ids[row] for row in corpus.rows("test")]
    np.testing.assert_allclose(a["embeddings"], b["embeddings"], atol=1e-5)


def test_kaldi_ark_and_scp_hold_the_same(embed, tiny_data, tmp_path, monkeypatch):
    kaldiio = pytest.importorskip("kaldiio")
    embed(tiny_data, "--format", "ark", "--output", "out/x.ark")
    embed(tiny_data, "--output", "x.npz")
    expected = np.load("x.npz")
    order = [key for key, _ in kaldiio.load_ark("out/x.ark")]
    assert order == expected["ids"].tolist()
    # the index works from any folder
    scp = os.path.abspath("out/x.scp")
    monkeypatch.chdir("/")
    indexed = kaldiio.load_scp(scp)
    for key, vector in zip(expected["ids"], expected["embeddings"], strict=True):
        np.testing.assert_array_equal(indexed[key], vector)
    assert indexed[order[0]].dtype == np.float32


def test_ids_that_kaldi_cannot_hold_are_refused(embed, tiny_recordings, tmp_path):
    pytest.importorskip("kaldiio")
    spaced = tmp_path / "two words.wav"
    shutil.copy(tiny_recordings / "ben" / "9.wav", spaced)
    with pytest.raises(UserError, match="two words.wav' does: use --format npz"):
        embed(spaced, "--format", "ark")
    with pytest.raises(UsageError, match="name the .ark file"):
        embed(spaced, "--format", "ark", "--output", "x.scp")


def test_without_kaldiio_a_sentence_says_what_to_install(embed, tiny_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldiio", None)
    with pytest.raises(UserError, match="pip install kaldiio"):
        embed(tiny_data, "--format", "ark")
    assert os.listdir() == []


def test_audio_files_have_no_speaker(embed, tiny_recordings, tmp_path, capsys):
    good, bad = tiny_recordings / "ben" / "9.wav", tmp_path / "bad.wav"
    bad.write_bytes(b"nothing")
    assert embed(good, bad, "--plot", "p.png") == 1
    found = np.load("embeddings.npz")
    assert found["ids"].tolist() == [str(good)] and found["speakers"].tolist() == [""]
    assert found["embeddings"].shape == (1, 8)
    assert str(bad) in capsys.readouterr().err
    assert open("p.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"


def test_projection_keeps_what_lies_in_a_plane():
    # directions in a plane of a space of nine dimensions: distances after scaling to length 1 stay
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.standard_normal((9, 2)))
    angles = rng.uniform(0, 2 * np.pi, 40)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    points = project((circle * rng.uniform(0.5, 3, (40, 1))) @ basis.T)

    def distances(x):
        return np.linalg.norm(x[:, None] - x[None], axis=-1)

    np.testing.assert_allclose(distances(points), distances(circle), atol=1e-12)
    # uncorrelated, the first with more variance, centred
    covariance = np.cov(points.T)
    assert covariance[0, 0] >= covariance[1, 1] and abs(covariance[0, 1]) < 1e-12
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)


def test_projection_of_few_points_has_two_columns():
    assert project(np.ones((1, 8))).tolist() == [[0.0, 0.0]]
    assert project(np.zeros((3, 8))).shape == (3, 2)
    assert project(np.array([[1.0], [-1.0]])).tolist() == [[1.0, 0.0], [-1.0, 0.0]]
