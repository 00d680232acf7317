"""The data of the speaker tables, prepared from FAIRSEQ_EXT_DATA (read only) into a work folder."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.recorded import ROOT, data_file
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.inference import SpeakerModel

GAIN_DB, TILT, SHIFT_SEED = 10.0, 0.5, 20261123
FSDD_PATTERN = r"(?P<digit>\d)_(?P<speaker>\w+?)_(?:(?P<test>[0-4])|(?P<index>\d+))\.wav"


def prepare_libri(work: Path) -> Path:
    """libri251 under its protocol: train, valid and test as `protocol.csv` cuts them."""
    source = data_file("libri251")
    return prepared(source, work / "libri251", "--layout", "csv", "--csv", source / "protocol.csv")


def prepare_shifted(work: Path) -> Path:
    """The valid and test segments of libri251 through another loudness and microphone.

    Each segment x[n] becomes g (x[n] − a x[n−1]) with g uniform in ± GAIN_DB dB and a uniform in ± TILT,
    drawn in the order of the protocol from one seed, kept as 32-bit float so that nothing clips.
    """
    wavs = work / "libri251-shifted-wav"
    if not (wavs / "metadata.csv").exists():
        _write_shifted(wavs)
    return prepared(wavs, work / "libri251-shifted", "--layout", "csv")


def prepare_digits(work: Path) -> Path:
    """fsdd with its official split: index 0-4 of each digit and speaker is the test."""
    arguments = ["--layout", "folder", "--pattern", FSDD_PATTERN]
    return prepared(data_file("fsdd"), work / "fsdd", *arguments)


def shifted(x: np.ndarray, gain_db: float, tilt: float) -> np.ndarray:
    """float32 samples (n,) → 10^(gain/20) · (x[n] − tilt · x[n−1]), x[−1] = 0."""
    previous = np.concatenate([np.zeros(1, x.dtype), x[:-1]])
    return (10 ** (gain_db / 20) * (x - tilt * previous)).astype(np.float32)


def _write_shifted(wavs: Path) -> None:
    wavs.mkdir(parents=True, exist_ok=True)
    source = data_file("libri251")
    rng = np.random.default_rng(SHIFT_SEED)
    kept = []
    with open(source / "protocol.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["split"] != "train"]
    for row in rows:
        gain_db, tilt = rng.uniform(-GAIN_DB, GAIN_DB), rng.uniform(-TILT, TILT)
        x, rate = soundfile.read(source / row["path"], dtype="float32")
        x = x[round(float(row["start"]) * rate) : round(float(row["end"]) * rate)]
        name = f"{Path(row['path']).stem}-{row['start']}-{row['end']}.wav"
        soundfile.write(wavs / name, shifted(x, gain_db, tilt), rate, subtype="FLOAT")
        kept.append({"path": name, "speaker": row["speaker"], "split": row["split"]})
    with open(wavs / "metadata.csv.part", "w", newline="") as f:
        writer = csv.DictWriter(f, ["path", "speaker", "split"])
        writer.writeheader()
        writer.writerows(kept)
    os.replace(wavs / "metadata.csv.part", wavs / "metadata.csv")


def named_rightly(checkpoint: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """bool (N,): which utterances of test a model trained on DATA names rightly; int64 (N,): their labels."""
    model, corpus = SpeakerModel.from_checkpoint(checkpoint), Corpus.open(data)
    rows = corpus.rows("test")
    labels = corpus.labels[rows]
    return model.scores([corpus.read(row) for row in rows]).argmax(1) == labels, labels


def prepared(source: Path, dest: Path, *options) -> Path:
    """DATA made by the command; nothing is done where it is there."""
    command = [sys.executable, "-m", "fairseq_ext.speaker.prepare", source, dest, *options]
    subprocess.run([str(c) for c in command], check=True, cwd=ROOT)
    return dest
