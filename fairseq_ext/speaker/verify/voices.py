"""Recordings that scores are made of: prepared data, a folder of audio, or embeddings that `embed` wrote."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Optional, Protocol

import numpy as np

from ext_common.cli import UsageError, UserError, progress
from ext_common.manifest import sha256_file
from fairseq_ext.speaker.audio.recording import resample
from fairseq_ext.speaker.features import FeatureSpec, Heard
from fairseq_ext.speaker.inference import MAX_FRAMES, SpeakerModel
from fairseq_ext.speaker.inference.inputs import (
    AudioFiles,
    PreparedSplit,
    cut_from,
    open_inputs,
)
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
        return np.stack([rows[place] for place in range(len(rows))]) if rows else np.zeros((0, 0))


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
    """Rows of a prepared folder."""

    def __init__(self, source: PreparedSplit) -> None:
        self.source, self.name = source, source.name
        self.ids, self.speakers, self.recordings = source.ids, source.speakers, source.recordings

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        model, corpus = runner.needed(self.name), self.source.corpus
        self.source.check(model, runner.path)
        frame = corpus.spec.seconds_per_frame
        cuts = []
        for row in rows:
            length = int(corpus.lengths[self.source.rows[row]])
            if piece is None:
                cuts.append((row, 0, length))
                continue
            size = max(1, round(piece / frame))
            mask = spoken(levels_of_features(corpus.read(self.source.rows[row])))
            cuts += [(row, start, size) for start in spoken_stretches(mask, size, size)]
        some(cuts, self.name, piece)
        features = (corpus.read(self.source.rows[row], start, size) for row, start, size in cuts)
        seconds = np.array([size * frame for _, _, size in cuts])
        found = runner.embed(features, len(cuts))
        unknown = np.full(len(cuts), np.nan)
        return Embedded(found, seconds, np.array([row for row, _, _ in cuts]), unknown)

    def inputs(self) -> dict[str, str]:
        return self.source.inputs()


class AudioVoices:
    """Audio files. All of them can be read, or it is an error: what is compared may not be left out."""

    def __init__(self, source: AudioFiles) -> None:
        self.source, self.name = source, source.name
        self.ids, self.speakers, self.recordings = source.ids, source.speakers, source.recordings

    def embed(self, runner: Runner, rows: Sequence[int], piece: float | None = None) -> Embedded:
        spec = runner.needed(self.name).spec
        seconds: list[float] = []
        owners: list[int] = []
        hertz: list[float] = []

        def utterances() -> Iterator[np.ndarray]:
            for row, heard in self.source.heard(spec, rows):
                found: Iterable[Any] = [heard.features]
                if piece is not None:
                    found = (spec.features(cut) for _, cut in cuts_of(spec, heard, piece, piece))
                for features in found:
                    seconds.append(piece or heard.seconds)
                    owners.append(row)
                    hertz.append(heard.hertz)
                    yield features
            some(owners, self.name, piece)

        embeddings = runner.embed(utterances(), len(rows))
        return Embedded(embeddings, np.array(seconds), np.array(owners), np.array(hertz))

    def inputs(self) -> dict[str, str]:
        return self.source.inputs()


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
        # files of older versions do not say them
        recordings = arrays.get("recordings")
        self.recordings = (
            [cut_from(one) for one in self.ids] if recordings is None else recordings.tolist()
        )
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
    """What `open_inputs` opens, or an .npz of embeddings."""
    if len(given) == 1 and Path(given[0]).suffix == ".npz":
        return EmbeddedVoices(given[0])
    source = open_inputs(given, split)
    if isinstance(source, PreparedSplit):
        return PreparedVoices(source)
    if split is not None:
        raise UsageError(f"{source.name} is no prepared folder, so that it has no --subset {split}")
    return AudioVoices(source)


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
    spec: FeatureSpec, heard: Heard, piece: float, every: float
) -> Iterator[tuple[float, np.ndarray]]:
    """(second it starts at, samples at `spec.sample_rate`) of stretches of `piece` seconds with speech."""
    samples, hop = heard.samples, spec.hop_length
    if heard.rate != spec.sample_rate:
        samples = resample(samples, heard.rate, spec.sample_rate)
    size, step = (max(1, round(seconds / spec.seconds_per_frame)) for seconds in (piece, every))
    mask = spoken(levels_of_samples(samples, hop))
    for start in spoken_stretches(mask, size, step):
        yield start * spec.seconds_per_frame, samples[start * hop : (start + size) * hop]


def some(found: Sequence[object], name: str, piece: float | None) -> None:
    """UserError where nothing is left to embed."""
    if not found:
        what = "recordings" if piece is None else f"speech of {piece:g} s on end"
        raise UserError(f"{name} has no {what}: give longer or other recordings")
