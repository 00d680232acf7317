"""Recordings that scores are made of: prepared data, a folder of audio, or embeddings that `embed` wrote."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Optional, Protocol

import numpy as np

from ext_common.cli import UsageError, UserError, progress
from ext_common.manifest import sha256_file
from fairseq_ext.speaker.audio.bandwidth import mixture
from fairseq_ext.speaker.audio.recording import Recording, resample
from fairseq_ext.speaker.features import FeatureSpec, hear
from fairseq_ext.speaker.inference import MAX_FRAMES, SpeakerModel
from fairseq_ext.speaker.inference.inputs import PreparedSplit
from fairseq_ext.speaker.prepare.tables import audio_files
from fairseq_ext.speaker.verify.backend import read_arrays
from fairseq_ext.speaker.verify.speech import (
    levels_of_features,
    levels_of_samples,
    spoken,
    spoken_stretches,
)


@dataclass(frozen=True)
class Runner:
    """A model with how it is run; None where embeddings are given."""

    model: Optional[SpeakerModel]
    path: str = ""
    batch_size: Optional[int] = None
    max_frames: int = MAX_FRAMES

    @property
    def sha256(self) -> str:
        """Of the model, "" without one."""
        return "" if self.model is None else self.model.sha256

    @property
    def backend(self) -> Optional[IO[bytes]]:
        """The file of a backend that came with the model, or None."""
        return None if self.model is None else self.model.backend

    def needed(self, source: str) -> SpeakerModel:
        """The model; UsageError where there is none."""
        if self.model is None:
            raise UsageError(f"--path is missing: {source} is no file of embeddings")
        return self.model

    def embed(self, utterances: Iterator[np.ndarray], total: int) -> np.ndarray:
        """Embeddings float32 (N, D) of features, in their order, with progress."""
        rows: dict[int, np.ndarray] = {}
        model = self.needed("what is compared")
        with progress(total, "embed", "utterances") as bar:
            for places, found in model.predict(utterances, self.batch_size, self.max_frames):
                rows.update(zip(places, found["embedding"], strict=True))
                bar.update(len(places))
        return np.stack([rows[place] for place in range(len(rows))])


class Embedded(NamedTuple):
    """embeddings float32 (N, D); seconds float64 (N,); rows int64 (N,) of the source; hertz float64 (N,).

    hertz is up to where there is something in the recording. What is not known is NaN.
    """

    embeddings: np.ndarray
    seconds: np.ndarray
    rows: np.ndarray
    hertz: np.ndarray


class Voices(Protocol):
    """Recordings with ids; speakers and recordings (what an id is cut from) are names or None."""

    name: str
    ids: list[str]
    speakers: list[str | None]
    recordings: list[str]

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        """Embeddings of `rows`; with `piece`, of all their whole pieces of so many seconds with speech."""

    def inputs(self) -> dict[str, str]:
        """Files and their SHA-256, for a manifest."""


class PreparedVoices:
    """A split (None: all) of a prepared folder."""

    def __init__(self, folder: str, split: str | None) -> None:
        self._split = PreparedSplit(folder, split)
        self.name = self._split.name
        self.ids: list[str] = list(self._split.ids)
        self.speakers: list[str | None] = self._split.speakers
        groups = [self._split.corpus.groups[row] for row in self._split.rows]
        # a cut is named path#start-end
        cut_from = (one.rpartition("#")[0] or one for one in self.ids)
        self.recordings = [g or c for g, c in zip(groups, cut_from, strict=True)]

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        model, corpus = runner.needed(self.name), self._split.corpus
        self._split.check(model, runner.path)
        frame = corpus.spec.seconds_per_frame
        cuts = []
        for row in rows:
            length = int(corpus.lengths[self._split.rows[row]])
            if piece is None:
                cuts.append((row, 0, length))
                continue
            size = max(1, round(piece / frame))
            mask = spoken(levels_of_features(corpus.read(self._split.rows[row])))
            cuts += [(row, start, size) for start in spoken_stretches(mask, size, size)]
        some(cuts, self.name, piece)
        features = (corpus.read(self._split.rows[row], start, size) for row, start, size in cuts)
        seconds = np.array([size * frame for _, _, size in cuts])
        found = runner.embed(features, len(cuts))
        unknown = np.full(len(cuts), np.nan)
        return Embedded(found, seconds, np.array([row for row, _, _ in cuts]), unknown)

    def inputs(self) -> dict[str, str]:
        return self._split.inputs()


class AudioVoices:
    """Audio files, or all below a folder: SPEAKER/… or flat. Ids are paths, below a folder relative ones."""

    def __init__(self, paths: Sequence[str]) -> None:
        if len(paths) == 1 and os.path.isdir(paths[0]):
            root = Path(paths[0])
            self.ids = audio_files(root)
            if not self.ids:
                raise UserError(f"{root} holds no audio that is read: give another folder")
            files = [root / name for name in self.ids]
            parts = [name.split("/") for name in self.ids]
            self.speakers: list[str | None] = [p[0] if len(p) > 1 else None for p in parts]
            self.name = str(root)
        else:
            files = [Path(path) for path in paths]
            self.ids, self.speakers = list(paths), [None] * len(paths)
            self.name = f"{len(paths)} audio file{'s' if len(paths) > 1 else ''}"
        self.paths, self.recordings = files, self.ids

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        spec = runner.needed(self.name).spec
        seconds: list[float] = []
        owners: list[int] = []
        hertz: list[float] = []

        def utterances() -> Iterator[np.ndarray]:
            for row in rows:
                with Recording(self.paths[row], spec.channel) as opened:
                    heard = hear(opened, spec)
                if heard.said:
                    print(f"{self.ids[row]}: {heard.said}", file=sys.stderr)
                whole = len(heard.samples) / heard.rate
                found = [(whole, heard.features)]
                if piece is not None:
                    samples = resample(heard.samples, heard.rate, spec.sample_rate)
                    cuts = cuts_of(samples, spec, piece, piece)
                    found = [(piece, spec.features(cut)) for _, cut in cuts]
                for length, features in found:
                    seconds.append(length)
                    owners.append(row)
                    hertz.append(heard.hertz)
                    yield features
            some(owners, self.name, piece)

        embeddings = runner.embed(utterances(), len(rows))
        said = mixture(hertz, spec.sample_rate)
        if said:
            print(f"{said}: a model that was trained without such is less sure", file=sys.stderr)
        return Embedded(embeddings, np.array(seconds), np.array(owners), np.array(hertz))

    def inputs(self) -> dict[str, str]:
        return {os.fspath(path): sha256_file(path) for path in self.paths}


class EmbeddedVoices:
    """The .npz of `speaker.embed`: ids (N,), speakers (N,), embeddings (N, D)."""

    def __init__(self, path: str) -> None:
        arrays = read_arrays(path, "embeddings that speaker.embed wrote")
        missing = [name for name in ("ids", "speakers", "embeddings") if name not in arrays]
        if missing:
            raise UserError(f"{path} has no array {missing[0]}: give what speaker.embed wrote")
        self.name, self._path = path, path
        self.ids = arrays["ids"].tolist()
        self.speakers = [name or None for name in arrays["speakers"].tolist()]
        self.recordings = [one.rpartition("#")[0] or one for one in self.ids]
        self._embeddings = arrays["embeddings"]

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        if piece is not None:
            raise UsageError(
                f"{self.name} holds embeddings, which cannot be cut: leave --piece out"
            )
        chosen = np.array(rows, dtype=np.int64)
        found = self._embeddings[chosen].astype(np.float32)
        unknown = np.full(len(chosen), np.nan)
        return Embedded(found, unknown, chosen, unknown)

    def inputs(self) -> dict[str, str]:
        return {self._path: sha256_file(self._path)}


def open_voices(given: Sequence[str], split: str | None = None) -> Voices:
    """Prepared data, a folder of audio, audio files, or an .npz of embeddings."""
    (first, *rest) = given
    if not rest and Path(first).suffix == ".npz":
        return EmbeddedVoices(first)
    if not rest and os.path.isdir(first) and not (Path(first) / "corpus.json").exists():
        if split is not None:
            raise UsageError(f"{first} is no prepared folder, so that it has no --subset {split}")
        return AudioVoices(given)
    if not rest and (os.path.isdir(first) or not Path(first).suffix):
        return PreparedVoices(first, split)
    for path in given:
        if not os.path.isfile(path):
            why = "is a folder among files" if os.path.isdir(path) else "does not exist"
            raise UserError(f"{path} {why}: give audio files, one folder, or one .npz")
    return AudioVoices(given)


def row_numbers(voices: Voices) -> dict[str, int]:
    """Id → row; UserError for an id that is there twice."""
    index = {name: row for row, name in enumerate(voices.ids)}
    if len(index) < len(voices.ids):
        twice = next(name for row, name in enumerate(voices.ids) if index[name] != row)
        raise UserError(
            f"{voices.name} has the id {twice!r} twice: which one is meant is not known"
        )
    return index


def named_rows(voices: Voices) -> tuple[list[int], list[str]]:
    """Rows with a speaker, and these; the others are counted on stderr. UserError where there are none."""
    rows = [row for row, name in enumerate(voices.speakers) if name is not None]
    if not rows:
        raise UserError(
            f"{voices.name} does not name its speakers: give prepared data, or a folder for each speaker"
        )
    left = len(voices.ids) - len(rows)
    if left:
        print(f"left out: {left} recordings of {voices.name} without a speaker", file=sys.stderr)
    return rows, [name for name in voices.speakers if name is not None]


def cuts_of(
    samples: np.ndarray, spec: FeatureSpec, piece: float | None, every: float | None
) -> Iterator[tuple[float, np.ndarray]]:
    """(second it starts at, samples) of stretches of `piece` seconds with speech, or of all samples (n,)."""
    if piece is None or every is None:
        yield 0.0, samples
        return
    hop = spec.hop_length
    size, step = (max(1, round(seconds / spec.seconds_per_frame)) for seconds in (piece, every))
    mask = spoken(levels_of_samples(samples, hop))
    for start in spoken_stretches(mask, size, step):
        yield start * spec.seconds_per_frame, samples[start * hop : (start + size) * hop]


def some(found: Sequence[object], name: str, piece: float | None) -> None:
    """UserError where nothing is left to embed."""
    if not found:
        what = "recordings" if piece is None else f"speech of {piece:g} s on end"
        raise UserError(f"{name} has no {what}: give longer or other recordings")
