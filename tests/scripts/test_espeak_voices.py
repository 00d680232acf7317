"""scripts/espeak_voices.py: the same bytes, speakers that differ, sentences that do not repeat."""

import csv
import importlib.util
import os
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from tests import processes

pytest.importorskip("espeakng_loader")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "espeak_voices.py"
SPEAKERS = 12


def load_script():
    spec = importlib.util.spec_from_file_location("espeak_voices", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


espeak_voices = load_script()


def speak(*args):
    return processes.run(
        [sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=300
    )


def read_wav(path):
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22050)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64) / 32768


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices") / "recordings"
    done = speak(folder, "--speakers", SPEAKERS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(recordings):
    with open(recordings / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_no_sentence_is_in_two_splits(rows):
    said = {}
    for row in rows:
        said.setdefault(row["split"], set()).add(row["text"])
    assert set(said) == {"train", "valid", "test"}
    assert not said["train"] & said["test"]
    assert not said["train"] & said["valid"]
    assert not said["valid"] & said["test"]
    every = [text for texts in espeak_voices.SENTENCES.values() for text in texts]
    assert len(every) == len(set(every))


@pytest.mark.slow
def test_table_is_what_lies_there(recordings, rows):
    wavs = {name for name in files(recordings) if name.endswith(".wav")}
    assert {row["path"] for row in rows} == wavs and len(rows) == len(wavs)
    assert all(row["path"].startswith(row["speaker"] + "/") for row in rows)
    per_speaker = sum(map(len, espeak_voices.SENTENCES.values()))
    speakers = {row["speaker"] for row in rows}
    assert len(speakers) == SPEAKERS and len(rows) == len(speakers) * per_speaker


@pytest.mark.slow
def test_same_bytes_again_whoever_else_speaks(recordings, tmp_path):
    done = speak(tmp_path / "few", "--speakers", 3, "--workers", 1)
    assert done.returncode == 0, done.stderr
    few, every = files(tmp_path / "few"), files(recordings)
    wavs = [name for name in few if name.endswith(".wav")]
    assert len({name.split("/")[0] for name in wavs}) == 3
    for name in wavs:
        assert few[name] == every[name], name


@pytest.mark.slow
def test_seed_changes_the_recordings(recordings, tmp_path):
    assert speak(tmp_path / "other", "--speakers", 2, "--seed", 2).returncode == 0
    other, every = files(tmp_path / "other"), files(recordings)
    wavs = [name for name in other if name.endswith(".wav")]
    assert not any(other[name] == every[name] for name in wavs)


def long_term_spectrum(x, bands=30):
    """(bands,) mean log power in bands of equal width up to 8 kHz, less its mean over bands."""
    frames = np.lib.stride_tricks.sliding_window_view(x, 512)[::256] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1)[:, 1:186]) ** 2
    edges = np.linspace(0, power.shape[1], bands + 1).astype(int)[:-1]
    spectrum = np.log(np.add.reduceat(power, edges, axis=1) + 1e-9).mean(0)
    return spectrum - spectrum.mean()


@pytest.mark.slow
def test_speakers_differ_and_are_themselves_in_other_sentences(recordings, rows):
    """Nearest mean spectrum, of other sentences: far from guessing (1 in 12), far from trivial."""
    train, test = {}, []
    for row in rows:
        if row["split"] == "valid":
            continue
        spectrum = long_term_spectrum(read_wav(recordings / row["path"]))
        if row["split"] == "train":
            train.setdefault(row["speaker"], []).append(spectrum)
        else:
            test.append((row["speaker"], spectrum))
    names = sorted(train)
    means = np.stack([np.mean(train[name], axis=0) for name in names])
    hits = [names[((means - x) ** 2).sum(1).argmin()] == name for name, x in test]
    assert 0.2 < np.mean(hits) < 0.95, np.mean(hits)


@pytest.mark.slow
def test_loudness_says_nothing_about_the_speaker(recordings, rows):
    """Levels of a speaker are spread over ± 6 dB; their means would lie together but for chance."""
    levels = {}
    for row in rows:
        x = read_wav(recordings / row["path"])
        assert np.abs(x).max() > 0.02
        levels.setdefault(row["speaker"], []).append(10 * np.log10(np.mean(x**2)))
    # 34 draws uniform in ± 6 dB: the mean of a speaker has a deviation of 0.6 dB
    means = [np.mean(values) for values in levels.values()]
    assert np.ptp(means) < 4
    assert min(np.ptp(values) for values in levels.values()) > 6


@pytest.mark.slow
def test_a_second_run_does_nothing_and_another_folder_is_refused(recordings, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in recordings.rglob("*")}
    done = speak(recordings, "--speakers", SPEAKERS)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in recordings.rglob("*")} == before
    done = speak(recordings, "--seed", 5)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    (tmp_path / "mine.txt").write_text("mine")
    done = speak(tmp_path)
    assert done.returncode == 1 and os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    "args", [("--speakers", "1"), ("--speakers", "25"), ("--snr-low", "90"), ("--mood", "80")]
)
def test_options_out_of_range_are_bad_usage(tmp_path, args):
    done = processes.call(espeak_voices.main, tmp_path / "x", *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_long_paths_get_a_short_name(tmp_path):
    """eSpeak NG 1.52 keeps the path of its data in 160 bytes."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "phontab").write_text("x")
    with espeak_voices.short_path(str(deep)) as name:
        assert len(os.fsencode(name)) < 120
        assert (Path(name) / "phontab").read_text() == "x"
    assert not os.path.exists(name) and deep.exists()
    with espeak_voices.short_path(str(tmp_path)[:100]) as name:
        assert name == str(tmp_path)[:100]
