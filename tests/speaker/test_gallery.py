"""python -m fairseq_ext.speaker.gallery: one file, thresholds that promise a rate, and who speaks when."""

import csv
import os
import threading

import numpy as np
import pytest
import soundfile

from ext_common.cli import UserError
from fairseq_ext.speaker.gallery.__main__ import main
from fairseq_ext.speaker.gallery.open_set import (
    conformal_threshold,
    open_set_curve,
    open_set_rates,
    posteriors,
    strangers_needed,
)
from fairseq_ext.speaker.gallery.store import Gallery, changing
from fairseq_ext.speaker.gallery.stream import rttm, turns
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.verify.backend import Backend, Side
from tests.speaker.conftest import RATE, voice


@pytest.mark.parametrize("rate, count", [(0.05, 30), (0.2, 9)])
def test_strangers_get_a_name_at_the_promised_rate(rate, count):
    # the mean over 1,000 draws of a gallery, n strangers and 20 others, who all differ
    rng = np.random.default_rng(3)
    rates = []
    for _ in range(1000):
        people = rng.normal(size=(5, 3))
        maxima = (rng.normal(size=(count + 20, 3)) @ people.T).max(1).astype(np.float32)
        threshold = conformal_threshold(maxima[:count], rate)
        rates.append(np.mean(maxima[count:] >= threshold))
    expected = np.floor(rate * (count + 1)) / (count + 1)
    error = np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - expected) < 3 * error and error < 0.01


@pytest.mark.parametrize("rate, needed", [(0.01, 99), (0.05, 19), (0.15, 6), (0.5, 1), (0.3, 3)])
def test_fewer_strangers_than_the_rate_takes_are_refused(rate, needed):
    assert strangers_needed(rate) == needed
    maxima = np.arange(needed, dtype=float)
    # with the fewest, no stranger seen so far would have got a name
    assert conformal_threshold(maxima, rate) > maxima.max()
    with pytest.raises(ValueError, match=f"it takes {needed}"):
        conformal_threshold(maxima[:-1], rate)


def test_posteriors_are_bayes_rule():
    llr = np.array([[2.0, -1.0], [0.0, 0.0]])
    found = posteriors(llr, 0.4)
    weights = np.array([[0.2 * np.exp(2), 0.2 * np.exp(-1), 0.6], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(found, weights / weights.sum(1, keepdims=True))
    assert np.isfinite(posteriors(np.array([[1e4, -1e4]]), 0.5)).all()


def test_rates_and_their_curve():
    best = np.array([0.9, 0.8, 0.3, 0.7, 0.2])
    known, right = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 0, 0], bool)
    hits, falses = open_set_rates(best, right, known, np.array([0.0, 0.3, 0.7, 0.95]))
    np.testing.assert_allclose(hits, [2 / 3, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(falses, [1, 0.5, 0.5, 0])
    _, hits, falses = open_set_curve(best, right, known)
    np.testing.assert_allclose(falses, [0, 0.5, 1])
    np.testing.assert_allclose(hits, [1 / 3, 2 / 3, 2 / 3])


def people(seed, *names):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(2, 4)).astype(np.float32) for name in names}


def fresh():
    return Gallery("m" * 64, Backend.unfitted("cosine", 0, "m" * 64))


def test_the_bytes_follow_from_who_is_in_it(tmp_path):
    found = people(1, "a", "b", "c", "d")
    orders = (["a", "b", "c"], ["c", "a", "d", "b"])
    for file, order in zip(("1.npz", "2.npz"), orders, strict=True):
        for name in order:
            with changing(tmp_path / file, fresh()) as gallery:
                for row in found[name][:: 1 if file == "1.npz" else -1]:
                    gallery.enrol(name, row[None])
    with changing(tmp_path / "2.npz") as gallery:
        gallery.remove("d")
        gallery.enrol("a", found["a"])
    one, two = ((tmp_path / name).read_bytes() for name in ("1.npz", "2.npz"))
    assert one == two
    assert sorted(os.listdir(tmp_path)) == ["1.npz", "2.npz"]


def test_writers_at_once_lose_nothing(tmp_path):
    found = people(2, *(f"p{i}" for i in range(12)))

    def add(name):
        with changing(tmp_path / "g.npz", fresh()) as gallery:
            gallery.enrol(name, found[name])

    threads = [threading.Thread(target=add, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gallery = Gallery.load(tmp_path / "g.npz")
    assert gallery.names == sorted(found)


def test_scores_are_those_of_each_person(tmp_path):
    gallery, found = fresh(), people(3, "x", "y", "z")
    for name, rows in found.items():
        gallery.enrol(name, rows)
    tests = people(4, "t")["t"]
    scores = gallery.scores(Side.of_tests(tests, np.ones(2)))
    for column, name in enumerate("xyz"):
        mean = sum(row / np.linalg.norm(row) for row in found[name])
        expected = tests @ mean / np.linalg.norm(tests, axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(scores[:, column], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["", "two words", "unknown"])
def test_names_that_could_not_be_told(name):
    with pytest.raises(UserError, match="needs a name without white space"):
        fresh().enrol(name, np.ones((1, 4)))


def test_turns_join_and_silence_ends_them():
    found = turns([0.0, 0.5, 1.0, 2.5, 3.0], ["a", "a", "b", "b", "b"], 1.0, 0.5)
    assert found == [(0.25, 1.0, "a"), (1.25, 0.5, "b"), (2.75, 1.0, "b")]
    assert rttm("my call", found[:1]) == "SPEAKER my_call 1 0.250 1.000 <NA> <NA> a <NA> <NA>\n"


@pytest.fixture
def gallery(tiny_checkpoint, tmp_path, monkeypatch):
    """Run the command in an empty folder with the tiny checkpoint."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(verb, *args, path=tiny_checkpoint):
        model = [] if verb in ("remove", "show") else ["--path", str(path), "--device", "cpu"]
        return main([verb, "g.npz", *map(str, args), *model])

    return run


def test_enrolled_named_calibrated_stale_and_restored(gallery, tiny_recordings, tmp_path, capsys):
    new, alone = tmp_path / "new", tmp_path / "strangers"
    for i in range(9):
        (alone / f"s{i}").mkdir(parents=True)
        rng = np.random.default_rng(i)
        soundfile.write(alone / f"s{i}" / "1.wav", rng.normal(0, 0.1, RATE), RATE, subtype="FLOAT")
    new.mkdir()
    for name in ("anna", "ben", "dora"):
        soundfile.write(new / f"{name}.wav", voice(name, 1.0, 77), RATE, subtype="FLOAT")
    assert gallery("enrol", tiny_recordings, "--speakers", "anna,ben") == 0
    assert gallery("enrol", *sorted((tiny_recordings / "dora").glob("*")), "--name", "dora") == 0
    before = open("g.npz", "rb").read()
    capsys.readouterr()
    assert gallery("identify", *sorted(new.glob("*"))) == 0
    shown = capsys.readouterr()
    rows = list(csv.reader(shown.out.splitlines()))
    assert [row[1] for row in rows] == ["Name", "anna", "ben", "dora"]
    assert "no threshold" in shown.err
    with pytest.raises(UserError, match="9 strangers are too few for a rate of 1 %: it takes 99"):
        gallery("calibrate", alone)
    with pytest.raises(UserError, match="anna, ben, dora of .* are enrolled and no strangers"):
        gallery("calibrate", tiny_recordings, "--fpir", 0.5)
    assert gallery("calibrate", alone, "--fpir", 0.1) == 0
    calibrated = open("g.npz", "rb").read()
    threshold = Gallery.load("g.npz").threshold(None)["threshold"]
    capsys.readouterr()
    # of those it was found on none gets a name, with the fewest strangers there may be
    assert gallery("identify", alone, "--output", "who.csv") == 0
    assert {row[1] for row in csv.reader(open("who.csv"))} == {"Name", "unknown"}
    assert gallery("remove", "dora") == 0
    assert "stale" in capsys.readouterr().out
    gallery("show")
    assert "STALE" in capsys.readouterr().out
    gallery("identify", new / "anna.wav")
    assert "no longer holds" in capsys.readouterr().err
    assert gallery("enrol", *sorted((tiny_recordings / "dora").glob("*")), "--name", "dora") == 0
    # who left and came back changed nothing
    assert open("g.npz", "rb").read() == calibrated != before
    assert Gallery.load("g.npz").threshold(None)["threshold"] == threshold
    gallery("identify", new / "anna.wav")
    assert capsys.readouterr().err == ""


def test_known_and_strangers_are_measured(gallery, tiny_recordings, capsys):
    gallery("enrol", tiny_recordings, "--speakers", "anna,ben")
    assert gallery("identify", tiny_recordings, "--output", "who.csv", "--threshold", 2) == 0
    shown = capsys.readouterr().out
    assert "20 recordings of people enrolled, 20 of others" in shown
    assert "at the threshold 2.0000: DIR 0.0 %, FPIR 0.0 %" in shown and "at FPIR 1 %" in shown
    assert open("who.open-set.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"


def test_who_speaks_when(gallery, tiny_recordings, tmp_path, capsys):
    gallery("enrol", tiny_recordings, "--speakers", "anna,ben")
    silence = np.zeros(2 * RATE, np.float32)
    parts = [voice("anna", 3.0, 90), silence, voice("ben", 4.0, 91)]
    soundfile.write(tmp_path / "call.wav", np.concatenate(parts), RATE, subtype="FLOAT")
    capsys.readouterr()
    assert gallery("identify", tmp_path / "call.wav", "--every", 1) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[7], row[3], row[4]) for row in found] == [
        ("anna", "0.000", "3.000"),
        ("ben", "5.000", "4.000"),
    ]


def test_another_models_gallery_is_refused(gallery, tiny_recordings, save_checkpoint):
    def turned(state):
        state["model"]["network.embedding.bias"] += 1

    other = save_checkpoint(turned)
    gallery("enrol", tiny_recordings, "--speakers", "anna")
    for verb in ("identify", "enrol"):
        with pytest.raises(UserError, match="enrolled with another model"):
            gallery(verb, tiny_recordings, path=other)
    assert SpeakerModel.from_checkpoint(other).sha256 != Gallery.load("g.npz").model
    with pytest.raises(UserError, match="did you mean 'anna'"):
        gallery("remove", "ana")
    with pytest.raises(UserError, match="is not a gallery"):
        np.savez("g.npz", x=np.zeros(1))
        gallery("show")
