"""Samples of a recording: opened, cut, brought to one channel and one rate."""

import functools
import io
import math
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from fairseq_ext.speaker.audio.bandwidth import WINDOW, bandwidth_of_windows, window_starts
from fairseq_ext.speaker.audio.containers import (
    MP3_SLACK,
    UNKNOWN_FRAMES,
    AudioError,
    open_whole,
    reason_of,
)

DECODE_SAMPLES = 1 << 20
RESAMPLE_VALUES = 1 << 21
# Below the rate of the worst telephone and above that of the best converter a header is wrong.
LOWEST_RATE, HIGHEST_RATE = 4_000, 768_000
CHANNELS = ("best", "mean", "left", "right")
# Channels that have nothing in common leave half their power in the mean of two, equal ones all of it.
CANCELLED = 0.2
# A recording on the disk, or open.
Source = str | os.PathLike[str] | BinaryIO


class Survey(NamedTuple):
    """What is known of a recording once it has been read through.

    samples: how many there are; column: the channel that is taken, None for the mean; said: as of
    `Recording`; hertz: as of `bandwidth`; constant: the value of all samples, None where they differ.
    """

    samples: int
    column: int | None
    said: str | None
    hertz: float
    constant: float | None


def load_audio(
    path: Source,
    sample_rate: int,
    start: float | None = None,
    end: float | None = None,
    channel: str = "best",
) -> np.ndarray:
    """Samples of a recording or a cut of it, float32 (n,) mono, nominally in [-1, 1].

    Any format libsndfile reads, by path or as a binary file that can seek; channels are brought to one
    (`to_mono`); other rates are resampled to `sample_rate`, a cut after it has been cut out. Raises
    AudioError with reason "corrupt", "empty", "nan", "rate" or "cut".
    """
    with Recording(path, channel) as recording:
        return resample(recording.read(start, end), recording.rate, sample_rate, recording.name)


class Recording:
    """An open audio file that several cuts are read from. A context.

    `said` has what somebody should know of what was read last, in words, or None.
    """

    def __init__(self, path: Source, channel: str = "best") -> None:
        self.channel = channel
        self.said: str | None = None
        if isinstance(path, str | os.PathLike):
            self.name = str(path)
            self._source: str | BinaryIO = self.name
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                self._source = io.BytesIO(Path(path).read_bytes())
            empty = os.path.isfile(path) and not os.path.getsize(path)
        else:
            self.name = str(getattr(path, "name", "audio"))
            self._source = path if path.seekable() else io.BytesIO(path.read())
            empty = not self._source.seek(0, os.SEEK_END)
            self._source.seek(0)
        if empty:
            raise AudioError("empty", f"{self.name}: the file has no bytes")
        self._open()

    def _open(self) -> None:
        if not isinstance(self._source, str):
            self._source.seek(0)
        self._file = open_whole(self._source, self.name)
        self.rate = self._file.samplerate
        self.frames = self._file.frames
        # of what is decoded in pieces the last two: stretches that are read in order overlap
        self._blocks = [(0, np.zeros((0, self._file.channels), dtype=np.float32))]
        if not LOWEST_RATE <= self.rate <= HIGHEST_RATE:
            self._file.close()
            raise AudioError(
                "rate",
                f"{self.name}: its header says {self.rate} Hz, read is from {LOWEST_RATE} to "
                f"{HIGHEST_RATE}: write the true rate into it",
            )
        # Seeking in an MP3 lands near, not on, what reading through gives, and even reading in
        # other pieces differs in the last bit: so always the same pieces from the start.
        self._in_pieces = self._file.format == "MP3"
        if self.frames > UNKNOWN_FRAMES:
            # a FLAC that was written to a pipe knows no length, and cannot be sought in either
            self._in_pieces = True
            self.frames = self._count()

    def _count(self) -> int:
        """Samples from here to the end; begins anew afterwards."""
        total = 0
        while read := len(self._file.read(DECODE_SAMPLES, dtype="float32", always_2d=True)):
            total += read
        self._file.close()
        if not isinstance(self._source, str):
            self._source.seek(0)
        self._file = open_whole(self._source, self.name)
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """float32 (n,) mono at the file's own rate; `start` and `end` in seconds."""
        first, last = self._bounds(start, end)
        samples = self.decode(first, last)
        self._check_decoded(len(samples), last - first)
        mono, self.said = to_mono(samples, self.channel)
        if not np.isfinite(mono).all():
            raise self._not_finite()
        return np.ascontiguousarray(mono)

    def survey(self) -> Survey:
        """What only the whole recording says, in one pass that holds a piece of it at a time."""
        first, last = self._bounds(None, None)
        starts = window_starts(last) if last >= WINDOW else np.zeros(0, dtype=np.int64)
        total, windows = 0, []
        tallies: list[np.ndarray] = []
        for place in range(first, last, DECODE_SAMPLES):
            # windows may reach into the next piece
            longer = self.decode(place, min(place + DECODE_SAMPLES + WINDOW, last))
            longer = with_mean(longer)
            piece = longer[:DECODE_SAMPLES]
            total += len(piece)
            inside = starts[(starts >= place) & (starts < place + len(piece))] - place
            inside = inside[inside + WINDOW <= len(longer)]
            windows.append(longer[inside[:, None] + np.arange(WINDOW)])
            if len(piece):
                squares = np.square(piece, dtype=np.float64).sum(0)
                tallies.append(np.stack([squares, piece.min(0), piece.max(0)]))
        self._check_decoded(total, last - first)
        squares, lows, highs = np.stack(tallies, 1)
        powers = squares.sum(0) / total
        column, said = channel_of(powers[: self._file.channels], powers[-1], self.channel)
        chosen = -1 if column is None else column
        # NaN and infinities stay in sums of squares
        if not np.isfinite(powers[chosen]):
            raise self._not_finite()
        low, high = lows[:, chosen].min(), highs[:, chosen].max()
        heard = np.concatenate(windows)[:, :, chosen]
        hertz = bandwidth_of_windows(heard, self.rate) if len(heard) else self.rate / 2
        return Survey(total, column, said, hertz, float(low) if low == high else None)

    def stretch(self, first: int, last: int, column: int | None) -> np.ndarray:
        """float32 (n,) samples from `first` to `last` of a channel, None: the mean of all."""
        samples = with_mean(self.decode(first, last))
        return np.ascontiguousarray(samples[:, -1 if column is None else column])

    def _not_finite(self) -> AudioError:
        return AudioError("nan", f"{self.name}: holds NaN or infinite samples")

    def _check_decoded(self, found: int, wanted: int) -> None:
        if found < wanted - (MP3_SLACK if self._file.format == "MP3" else 0):
            raise AudioError(
                "corrupt", f"{self.name}: cut short, {found} of {wanted} samples decoded"
            )

    def decode(self, first: int, last: int) -> np.ndarray:
        """float32 (n, channels): samples from `first` to `last`. AudioError where that fails."""
        import soundfile

        try:
            return self._decode(first, last)
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError("corrupt", f"{self.name}: {reason_of(error)}") from None

    def _decode(self, first: int, last: int) -> np.ndarray:
        if not self._in_pieces:
            self._file.seek(first)
            return np.asarray(self._file.read(last - first, dtype="float32", always_2d=True))
        if first < self._blocks[0][0]:
            self._file.close()
            self._open()
        pieces = [part(place, block, first, last) for place, block in self._blocks]
        while True:
            place, block = self._blocks[-1]
            end = place + len(block)
            if end >= last or (end and len(block) < DECODE_SAMPLES):
                return np.concatenate(pieces)
            block = self._file.read(DECODE_SAMPLES, dtype="float32", always_2d=True)
            self._blocks = [self._blocks[-1], (end, block)]
            pieces.append(part(end, block, first, last))

    def _bounds(self, start: float | None, end: float | None) -> tuple[int, int]:
        if self.frames <= 0:
            raise AudioError("empty", f"{self.name}: holds no samples")
        first = 0 if start is None else round(start * self.rate)
        last = self.frames if end is None else round(end * self.rate)
        # Ends given with two decimals may lie a rounding behind the last sample.
        if last > self.frames and last - self.frames <= 0.02 * self.rate:
            last = self.frames
        if not 0 <= first < last <= self.frames:
            raise AudioError(
                "cut",
                f"{self.name}: the cut {start or 0} to {'its end' if end is None else end} s "
                f"does not lie in the recording of {self.frames / self.rate:.2f} s",
            )
        return first, last


def to_mono(samples: np.ndarray, channel: str = "best") -> tuple[np.ndarray, str | None]:
    """(float32 (n,), what to say of it or None) of samples (n, channels).

    channel: "left" and "right" are the first two, "mean" is that of all; "best" is the mean too, but for
    channels that cancel one another in it (one of them is inverted): then the loudest of them.
    """
    if channel not in CHANNELS:
        raise ValueError(f"unknown channel {channel!r}: known are {', '.join(CHANNELS)}")
    count = samples.shape[1]
    if count == 1:
        return samples[:, 0], None
    if channel in ("left", "right"):
        return samples[:, int(channel == "right")], None
    mean = samples.mean(axis=1, dtype=np.float32)
    powers = np.square(samples, dtype=np.float64).mean(axis=0)
    column, said = channel_of(powers, float(np.square(mean, dtype=np.float64).mean()), channel)
    return mean if column is None else samples[:, column], said


def channel_of(powers: np.ndarray, left: float, channel: str) -> tuple[int | None, str | None]:
    """(the channel to take or None for the mean, what to say or None), see `to_mono`.

    powers: mean squares of the channels; left: that of their mean.
    """
    count = len(powers)
    if channel in ("left", "right"):
        return min(int(channel == "right"), count - 1), None
    # not "<" turned round: NaN is told by the caller
    if not left < CANCELLED / count * powers.mean():
        return None, None
    # the first of those within half a decibel: rounding must not choose
    loudest = int((powers > 0.9 * powers.max()).argmax())
    name = ("the left", "the right")[loudest] if count == 2 else f"channel {loudest + 1}"
    if channel == "mean":
        said = "its channels cancel in their mean (one is inverted): --channel best mends it"
        return None, said
    return loudest, f"its channels cancel (one is inverted): {name} was taken"


def with_mean(samples: np.ndarray) -> np.ndarray:
    """float32 (n, channels) with the mean of the channels behind them, where there are several."""
    if samples.shape[1] == 1:
        return samples
    return np.concatenate([samples, samples.mean(axis=1, dtype=np.float32)[:, None]], axis=1)


def part(place: int, block: np.ndarray, first: int, last: int) -> np.ndarray:
    """What lies from `first` to `last` of a block that begins at `place`."""
    return block[max(first - place, 0) : max(last - place, 0)]


def resample(samples: np.ndarray, rate: int, target: int, path: str | Path = "audio") -> np.ndarray:
    """float32 (n,) at `rate` -> float32 (ceil(n * target / rate),), band-limited.

    torchaudio's default filter: a sinc under a Hann window of 6 zeros a side, rolled off at 0.99 of the lower
    rate. Computed here because torch is not to be needed for reading audio.
    """
    if rate == target:
        return samples
    down, up = ratio_of(rate, target, path)
    _, reach = resampling_filters(down, up)
    wanted = -(-len(samples) * up // down)
    padded = np.pad(samples, (reach, reach + down))
    return filtered(padded, down, up, -(-wanted // up))[:wanted]


def ratio_of(rate: int, target: int, path: str | Path = "audio") -> tuple[int, int]:
    """(down, up): `down` samples at `rate` last as long as `up` at `target`. AudioError for absurd ones."""
    common = math.gcd(rate, target)
    if (rate // common) * (target // common) > 20_000_000:
        raise AudioError("rate", f"{path}: {rate} Hz cannot be resampled to {target} Hz")
    return rate // common, target // common


def filtered(padded: np.ndarray, down: int, up: int, periods: int) -> np.ndarray:
    """float32 (periods · up,); `padded` begins `reach` samples before the first (`resampling_filters`)."""
    filters, _ = resampling_filters(down, up)
    windows = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1])[::down]
    size = max(1, RESAMPLE_VALUES // filters.shape[1])
    pieces = [windows[i : i + size] @ filters.T for i in range(0, periods, size)]
    return np.concatenate(pieces).reshape(-1)[: periods * up]


@functools.lru_cache(maxsize=4)
def resampling_filters(down: int, up: int) -> tuple[np.ndarray, int]:
    """float32 (up, width): a filter for each output of a period of `down` samples; samples before it."""
    zeros, cutoff = 6, 0.99 * min(down, up)
    reach = math.ceil(zeros * down / cutoff)
    places = np.arange(-reach, reach + down) / down - np.arange(up)[:, None] / up
    places = np.clip(cutoff * places, -zeros, zeros)
    window = np.cos(np.pi * places / zeros / 2) ** 2
    return (np.sinc(places) * window * cutoff / down).astype(np.float32), reach
