"""What `identify` and `embed` read and share: a split of a prepared folder, or audio files."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from ext_common.cli import UsageError, UserError, progress
from ext_common.manifest import check_writable, known_sha256, sha256_file, versions
from ext_common.store import parts_of
from fairseq_ext.speaker.audio.bandwidth import mixture
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.features import (
    CHANNELS,
    AudioError,
    FeatureSpec,
    Heard,
    Recording,
    listen,
)
from fairseq_ext.speaker.inference import MAX_FRAMES, SpeakerModel
from fairseq_ext.speaker.prepare.tables import audio_files

STDIN = "-"
LIST_ENDINGS = (".txt", ".lst", ".list", ".scp")
DATA_FILES = ("features.bin", "features.json", "utterances.csv", "corpus.json", "manifest.json")


@dataclass
class RunOptions:
    """What every command that runs a model has."""

    path: str = field(metadata={"help": "checkpoint that fairseq-train wrote"})
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

    def __post_init__(self) -> None:
        check_positive(self, "max_frames")


@dataclass
class BatchOptions(RunOptions):
    """What a command has that may hold utterances together in a batch."""

    batch_size: Optional[int] = field(
        default=None,
        metadata={"help": "utterances in a batch; none: as many as --max-frames allows"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "batch_size")


@dataclass
class PredictOptions(BatchOptions):
    """What `identify` and `embed` have."""

    channel: Optional[str] = field(
        default=None,
        metadata={
            "help": "of stereo audio files: mean, left, right, or best (see prepare); none: the model's",
            "choices": CHANNELS,
        },
    )


def check_positive(options: object, name: str) -> None:
    """ValueError where an option that counts something is below 1; None is none."""
    value = getattr(options, name)
    if value is not None and value < 1:
        raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


class PreparedSplit:
    """Rows of a prepared folder, in source order.

    ids: strings; speakers: names, None without; recordings: what each is cut from.
    """

    def __init__(self, folder: str, split: Optional[str]):
        self.corpus = Corpus.open(folder)
        self.rows = np.arange(len(self.corpus)) if split is None else self.corpus.rows(split)
        names = [*self.corpus.speakers, None]
        self.ids = [self.corpus.ids[row] for row in self.rows]
        self.speakers: list[Optional[str]] = [names[self.corpus.labels[row]] for row in self.rows]
        groups = [self.corpus.groups[row] for row in self.rows]
        self.recordings = [g or cut_from(one) for g, one in zip(groups, self.ids, strict=True)]
        self.name = " ".join(filter(None, (Path(folder).resolve().name, split)))
        self.bad: list[str] = []

    def __len__(self):
        return len(self.rows)

    def check(self, model: SpeakerModel, checkpoint: str) -> None:
        """UserError where the features are not those that the model was trained on."""
        ours, theirs = self.corpus.spec.to_dict(), model.spec.to_dict()
        other = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if other:
            have, need = (
                ", ".join(f"{key} {getattr(spec, key)}" for key in other)
                for spec in (self.corpus.spec, model.spec)
            )
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
    """Audio files, or standard input (`STDIN`).

    ids: by default their paths; speakers: of each, or None; recordings: what each is; channel: in place of
    the model's (`FeatureSpec.channel`). What cannot be read is told and goes to `bad` by `features`, after
    which `ids`, `speakers` and `recordings` are those of the others.
    """

    def __init__(
        self,
        paths: Sequence[str],
        ids: Optional[Sequence[str]] = None,
        speakers: Optional[Sequence[Optional[str]]] = None,
        name: Optional[str] = None,
        channel: Optional[str] = None,
    ):
        for path in paths:
            if os.path.isdir(path):
                raise UsageError(f"{path} is a folder: give one folder, or audio files")
            if path != STDIN and not os.path.exists(path):
                raise UserError(f"{path} does not exist: give an audio file or a prepared folder")
        self.paths, self.channel = list(paths), channel
        self._recordings = self.recordings = list(paths)
        self._ids = self.ids = list(ids or paths)
        self._speakers = self.speakers = list(speakers or [None] * len(paths))
        self.name = name or f"{len(paths)} audio file{'s' if len(paths) > 1 else ''}"
        self.bad: list[str] = []

    def __len__(self):
        return len(self.paths)

    def check(self, model: SpeakerModel, checkpoint: str) -> None:
        """Nothing: the features are made with the model's own specification."""

    def open(self, row: int, spec: FeatureSpec) -> Recording:
        """The recording of a row, in the channel asked for."""
        path = self.paths[row]
        return Recording(stdin() if path == STDIN else path, self.channel or spec.channel)

    def heard(
        self, spec: FeatureSpec, rows: Sequence[int], strict: bool = True
    ) -> Iterator[tuple[int, Heard]]:
        """Rows with what is heard in them; said on stderr is what somebody should know.

        strict: AudioError for one that cannot be read; otherwise it is told and goes to `bad`.
        """
        hertz = []
        for row in rows:
            try:
                found = listen(self.open(row, spec), spec)
            except AudioError as error:
                if strict:
                    raise
                print(f"error: {error}: left out", file=sys.stderr)
                self.bad.append(self._ids[row])
                continue
            if found.said:
                print(f"{self._ids[row]}: {found.said}", file=sys.stderr)
            hertz.append(found.hertz)
            yield row, found
        text = mixture(hertz, spec.sample_rate)
        if text:
            print(f"{text}: a model that was trained without such is less sure", file=sys.stderr)

    def features(self, spec: FeatureSpec) -> Iterator[np.ndarray]:
        """float32 (T, n_mels) for each file that can be read."""
        self.bad, kept = [], []
        for row, found in self.heard(spec, range(len(self)), strict=False):
            kept.append(row)
            yield found.features
        of_all = self._ids, self._speakers, self._recordings
        self.ids, self.speakers, self.recordings = ([of[i] for i in kept] for of in of_all)

    def inputs(self) -> dict[str, str]:
        """Files and their SHA-256."""
        return {path: sha256_file(path) for path in self.paths if path != STDIN}


def cut_from(name: str) -> str:
    """The path in the id of an utterance, which for a cut is path#start-end."""
    return name.rpartition("#")[0] or name


def stdin() -> io.BytesIO:
    """The audio that is written to standard input."""
    found = io.BytesIO(sys.stdin.buffer.read())
    found.name = "standard input"
    return found


def open_inputs(
    given: Sequence[str], split: Optional[str], channel: Optional[str] = None
) -> PreparedSplit | AudioFiles:
    """A split (None: all) of a prepared folder; or audio files, a folder or a list of them."""
    one = Path(given[0])
    # A mistyped folder should be told as a folder; audio files have an ending.
    missing_folder = not one.exists() and not one.suffix and given[0] != STDIN
    if len(given) == 1 and one.is_dir():
        files = [] if (one / "corpus.json").exists() else audio_files(one)
        if files:
            paths = [str(one / name) for name in files]
            people = [name.split("/")[0] if "/" in name else None for name in files]
            return AudioFiles(paths, files, people, one.resolve().name, channel)
    if len(given) == 1 and (one.is_dir() or missing_folder):
        return PreparedSplit(given[0], split)
    if len(given) == 1 and one.suffix in LIST_ENDINGS:
        names, paths = read_list(one)
        return AudioFiles(paths, names, name=given[0], channel=channel)
    return AudioFiles(given, channel=channel)


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """(ids, paths) of a list of audio files: a path a line, or in a Kaldi .scp an id and a path.

    Relative paths begin at the folder of the list.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of audio files ({error})") from None
    names, paths = [], []
    for number, line in enumerate(lines, 1):
        name, _, place = line.partition(" ") if path.suffix == ".scp" else (line, "", line)
        if not line:
            continue
        if not place.strip() or place.strip().endswith("|"):
            raise UserError(f"{path} line {number}: no path of an audio file: {line!r}")
        names.append(name)
        paths.append(str(path.parent / place.strip()))
        if not os.path.exists(paths[-1]):
            raise UserError(f"{path} line {number}: {paths[-1]} does not exist")
    if not paths:
        raise UserError(f"{path} is empty: expected the path of an audio file a line")
    return names, paths


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
