"""What `identify` and `embed` read and share: a split of a prepared folder, or audio files."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from ext_common.cli import UsageError, UserError, progress
from ext_common.manifest import check_writable, known_sha256, sha256_file, versions
from ext_common.store import parts_of
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.features import AudioError, FeatureSpec, audio_features
from fairseq_ext.speaker.inference import MAX_FRAMES, SpeakerModel

DATA_FILES = ("features.bin", "features.json", "utterances.csv", "corpus.json", "manifest.json")


@dataclass
class PredictOptions:
    """What every command that runs a model has."""

    path: str = field(metadata={"help": "checkpoint that fairseq-train wrote"})
    batch_size: Optional[int] = field(
        default=None,
        metadata={"help": "utterances in a batch; none: as many as --max-frames allows"},
    )
    max_frames: int = field(
        default=MAX_FRAMES,
        metadata={"help": "padded frames (of 10 ms) in a batch: less memory where smaller"},
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, cuda:1; auto: CUDA where there is one"}
    )
    user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "plugin with the model's parts; none: the one it was trained with"},
    )

    def __post_init__(self):
        for name in ("batch_size", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


class PreparedSplit:
    """Rows of a prepared folder, in source order. ids: strings; speakers: names, None without."""

    def __init__(self, folder: str, split: Optional[str]):
        self.corpus = Corpus.open(folder)
        self.rows = np.arange(len(self.corpus)) if split is None else self.corpus.rows(split)
        names = [*self.corpus.speakers, None]
        self.ids = [self.corpus.ids[row] for row in self.rows]
        self.speakers = [names[self.corpus.labels[row]] for row in self.rows]
        self.name = " ".join(filter(None, (Path(folder).resolve().name, split)))
        self.bad: list[str] = []

    def __len__(self):
        return len(self.rows)

    def check(self, model: SpeakerModel, checkpoint: str) -> None:
        """UserError where the features are not those that the model was trained on."""
        ours, theirs = self.corpus.spec.to_dict(), model.spec.to_dict()
        other = [key for key in theirs if ours[key] != theirs[key]]
        if other:
            have = ", ".join(f"{key} {ours[key]}" for key in other)
            need = ", ".join(f"{key} {theirs[key]}" for key in other)
            raise UserError(
                f"{self.corpus.path} was prepared with {have}, but {checkpoint} was trained on"
                f" {need}: prepare the recordings again with that"
            )

    def features(self, spec: FeatureSpec) -> Iterator[np.ndarray]:
        """float32 (T, n_mels) for each of `ids`."""
        return (self.corpus.read(row) for row in self.rows)

    def inputs(self) -> dict[str, str]:
        """Files and their SHA-256."""
        paths = [Path(part) / "corpus.json" for part in parts_of(self.corpus.path)]
        return {str(path): sha256_file(path) for path in paths}


class AudioFiles:
    """Audio files as typed. One that cannot be read is told, goes to `bad`, and has no id."""

    def __init__(self, paths: list[str]):
        for path in paths:
            if os.path.isdir(path):
                raise UsageError(f"{path} is a folder: give one prepared folder, or audio files")
            if not os.path.exists(path):
                raise UserError(f"{path} does not exist: give an audio file or a prepared folder")
        self.paths = paths
        self.ids: list[str] = []
        self.speakers: list[None] = []
        self.name = f"{len(paths)} audio file{'s' if len(paths) > 1 else ''}"
        self.bad: list[str] = []

    def __len__(self):
        return len(self.paths)

    def check(self, model: SpeakerModel, checkpoint: str) -> None:
        """Nothing: the features are made with the model's own specification."""

    def features(self, spec: FeatureSpec) -> Iterator[np.ndarray]:
        """float32 (T, n_mels) for each file that can be read; `ids` grows along."""
        self.ids, self.speakers, self.bad = [], [], []
        for path in self.paths:
            try:
                found = audio_features(path, spec)
            except AudioError as error:
                print(f"error: {error}: left out", file=sys.stderr)
                self.bad.append(path)
                continue
            self.ids.append(path)
            self.speakers.append(None)
            yield found

    def inputs(self) -> dict[str, str]:
        """Files and their SHA-256."""
        return {path: sha256_file(path) for path in self.paths}


def open_inputs(given: list[str], split: Optional[str]) -> PreparedSplit | AudioFiles:
    """A split (None: all) of a prepared folder where one folder is given, else audio files."""
    # A mistyped folder should be told as a folder; audio files have an ending.
    missing_folder = not os.path.exists(given[0]) and not Path(given[0]).suffix
    if len(given) == 1 and (os.path.isdir(given[0]) or missing_folder):
        return PreparedSplit(given[0], split)
    return AudioFiles(given)


def load_model(source, options: PredictOptions) -> SpeakerModel:
    """The model of `--path`, fit for the source."""
    model = SpeakerModel.from_checkpoint(options.path, options.device, options.user_dir)
    source.check(model, options.path)
    return model


def predictions(model: SpeakerModel, source, options: PredictOptions, desc: str):
    """`SpeakerModel.predict` over a source, with progress."""
    with progress(len(source), desc, "utterances") as bar:
        utterances = source.features(model.spec)
        for positions, found in model.predict(utterances, options.batch_size, options.max_frames):
            yield positions, found
            bar.update(len(positions))
    if not source.ids:
        raise UserError("none of the audio files can be read")


def check_output(output: str, given: list[str]) -> None:
    """UsageError where an output would replace a folder, an input, the model or a part of DATA."""
    if os.path.isdir(output):
        raise UsageError(f"--output {output} is a folder: give the file to write")
    check_writable(output)
    target = Path(output).resolve()
    for path in map(Path, given):
        if target == path.resolve() or target in [path.resolve() / name for name in DATA_FILES]:
            raise UsageError(f"--output {output} would replace an input: give another file")


def provenance(source, options: PredictOptions, counts: dict) -> dict:
    """The content of a manifest: what went in, how, and what came out. Nothing is random here."""
    return {
        "inputs": {options.path: known_sha256(options.path), **source.inputs()},
        "counts": {"in": len(source), "out": len(source.ids), "bad": len(source.bad), **counts},
        "bad": source.bad,
        "options": options,
        "seed": None,
        "versions": versions(),
    }
