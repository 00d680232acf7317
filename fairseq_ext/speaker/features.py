"""From an audio file to log-mel features: the one path that preparation and inference share.

The features are those of the course data (yistLin/dvector): 16 kHz mono, power mel spectrogram with
the HTK scale, natural logarithm of the values clamped at 1e-9. torch and torchaudio are imported
when first used, so that commands that only read features start at once.
"""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Optional, Self

import numpy as np
from numpy.typing import ArrayLike

from ext_common.cli import UserError

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram

# Blocks bound the memory of a long recording: 3000 frames are 30 s, about 10 MB of spectrum.
BLOCK_FRAMES = 3000
DECODE_SAMPLES = 1 << 20
RESAMPLE_VALUES = 1 << 21
# Silence, relative to the loudest 25 ms: 1 % of its RMS.
SILENCE_DB = -40.0


class AudioError(UserError):
    """A recording that cannot be used; `reason` is a word or two to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # pickled on its way out of a worker process, by its arguments
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class FeatureSpec:
    """How features were made from audio; stored with the data and in every checkpoint."""

    sample_rate: int = field(
        default=16000, metadata={"help": "rate audio is resampled to before the spectrum (Hz)"}
    )
    n_fft: int = field(default=400, metadata={"help": "length of the Fourier transform (samples)"})
    win_length: int = field(default=400, metadata={"help": "length of the Hann window (samples)"})
    hop_length: int = field(default=160, metadata={"help": "distance between two frames (samples)"})
    f_min: float = field(default=50.0, metadata={"help": "lowest mel frequency (Hz)"})
    n_mels: int = field(default=40, metadata={"help": "number of mel bands: the feature size"})
    floor: float = field(
        default=1e-9, metadata={"help": "mel energies below this are raised to it before the log"}
    )
    loudness_db: Optional[float] = field(
        default=None,
        metadata={"help": "scale each recording or cut to this RMS (dBFS, e.g. -27)"},
    )
    trim_silence: bool = field(
        default=False,
        metadata={"help": "cut leading and trailing silence (40 dB below the loudest 25 ms)"},
    )

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.win_length > self.n_fft:
            raise ValueError(f"win_length {self.win_length} is longer than n_fft {self.n_fft}")
        if not 0 <= self.f_min < self.sample_rate / 2:
            raise ValueError(f"f_min {self.f_min} must lie in [0, {self.sample_rate / 2}) Hz")
        if self.loudness_db is not None and not -100 <= self.loudness_db <= 0:
            raise ValueError(f"loudness_db {self.loudness_db} must lie in [-100, 0] dBFS")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of to_dict; UserError naming keys that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(
                f"unknown feature options {', '.join(unknown)}: written by a newer version?"
            )
        return cls(**values)

    @property
    def seconds_per_frame(self) -> float:
        return self.hop_length / self.sample_rate

    def features(self, samples: ArrayLike) -> np.ndarray:
        """What a network takes of float (n,) samples: log-mel features, see `log_mel`."""
        return log_mel(samples, self)


def audio_features(
    path: str | os.PathLike[str],
    spec: FeatureSpec,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Log-mel features of a recording, or of the cut from `start` to `end` (seconds) of it.

    Returns float32 (T, n_mels). Raises AudioError (a UserError) where the audio cannot be used.
    """
    samples = load_audio(path, spec.sample_rate, start, end)
    if (samples == samples[0]).all():
        raise AudioError(
            "silent", f"{path}: all samples are {samples[0]:g}: give a recording of speech"
        )
    return spec.features(samples)


def load_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Samples of a recording or a cut of it, float32 (n,) mono, nominally in [-1, 1].

    Any format libsndfile reads; channels are averaged; other rates are resampled to
    `sample_rate`, a cut after it has been cut out. Raises AudioError with reason "corrupt",
    "empty", "nan" or "cut".
    """
    with Recording(path) as recording:
        return resample(recording.read(start, end), recording.rate, sample_rate, path)


class Recording:
    """An open audio file that several cuts are read from. A context."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        if os.path.isfile(self.path) and not os.path.getsize(self.path):
            raise AudioError("empty", f"{path}: the file has no bytes")
        self._open()

    def _open(self) -> None:
        import soundfile

        try:
            self._file = soundfile.SoundFile(self.path)
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError(
                "corrupt", f"{self.path}: not readable as audio ({reason_of(error)})"
            ) from None
        self.rate = self._file.samplerate
        self.frames = self._file.frames
        self._block_start = 0
        self._block = np.zeros((0, self._file.channels), dtype=np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """float32 (n,) mono at the file's own rate; `start` and `end` in seconds."""
        import soundfile

        first, last = self._bounds(start, end)
        try:
            samples = self._decode(first, last)
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError("corrupt", f"{self.path}: {reason_of(error)}") from None
        # A compressed stream may promise a few samples more than it holds (encoder delay).
        if len(samples) < 0.98 * (last - first):
            raise AudioError(
                "corrupt",
                f"{self.path}: cut short, {len(samples)} of {last - first} samples decoded",
            )
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError("nan", f"{self.path}: holds NaN or infinite samples")
        return np.ascontiguousarray(mono)

    def _decode(self, first: int, last: int) -> np.ndarray:
        """(n, channels) samples from `first` to `last`."""
        if self._file.format != "MP3":
            self._file.seek(first)
            return np.asarray(self._file.read(last - first, dtype="float32", always_2d=True))
        # Seeking in an MP3 lands near, not on, what reading through gives, and even reading in
        # other pieces differs in the last bit: so always the same pieces from the start.
        if first < self._block_start:
            self._file.close()
            self._open()
        pieces = []
        while True:
            end = self._block_start + len(self._block)
            if end > first:
                start = self._block_start
                pieces.append(self._block[max(first - start, 0) : last - start])
            if end >= last or (end and len(self._block) < DECODE_SAMPLES):
                return np.concatenate(pieces or [self._block[:0]])
            self._block_start = end
            self._block = self._file.read(DECODE_SAMPLES, dtype="float32", always_2d=True)

    def _bounds(self, start: float | None, end: float | None) -> tuple[int, int]:
        if self.frames <= 0:
            raise AudioError("empty", f"{self.path}: holds no samples")
        first = 0 if start is None else round(start * self.rate)
        last = self.frames if end is None else round(end * self.rate)
        # Ends given with two decimals may lie a rounding behind the last sample.
        if last > self.frames and last - self.frames <= 0.02 * self.rate:
            last = self.frames
        if not 0 <= first < last <= self.frames:
            raise AudioError(
                "cut",
                f"{self.path}: the cut {start or 0} to {'its end' if end is None else end} s "
                f"does not lie in the recording of {self.frames / self.rate:.2f} s",
            )
        return first, last


def resample(
    samples: np.ndarray, rate: int, target: int, path: str | os.PathLike[str] = "audio"
) -> np.ndarray:
    """float32 (n,) at `rate` -> float32 (ceil(n * target / rate),), band-limited.

    torchaudio's default filter: a sinc under a Hann window of 6 zeros a side, rolled off at 0.99 of the lower
    rate. Computed here because torch is not to be needed for reading audio.
    """
    if rate == target:
        return samples
    common = math.gcd(rate, target)
    if (rate // common) * (target // common) > 20_000_000:
        raise AudioError("corrupt", f"{path}: {rate} Hz cannot be resampled to {target} Hz")
    down, up = rate // common, target // common
    filters, reach = resampling_filters(down, up)
    wanted = -(-len(samples) * up // down)
    padded = np.pad(samples, (reach, reach + down))
    windows = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1])[::down]
    size = max(1, RESAMPLE_VALUES // filters.shape[1])
    pieces = [windows[i : i + size] @ filters.T for i in range(0, -(-wanted // up), size)]
    return np.concatenate(pieces).reshape(-1)[:wanted]


@functools.lru_cache(maxsize=4)
def resampling_filters(down: int, up: int) -> tuple[np.ndarray, int]:
    """float32 (up, width): a filter for each output of a period of `down` samples; samples before it."""
    zeros, cutoff = 6, 0.99 * min(down, up)
    reach = math.ceil(zeros * down / cutoff)
    places = np.arange(-reach, reach + down) / down - np.arange(up)[:, None] / up
    places = np.clip(cutoff * places, -zeros, zeros)
    window = np.cos(np.pi * places / zeros / 2) ** 2
    return (np.sinc(places) * window * cutoff / down).astype(np.float32), reach


def log_mel(waveform: ArrayLike, spec: FeatureSpec) -> np.ndarray:
    """Natural logarithm of the mel power spectrum of float (n,) samples at `spec.sample_rate`.

    Returns float32 (T, n_mels), T = 1 + n // hop_length: frames are centred on multiples of the hop
    and the signal is reflected at its ends (one shorter than half a window is first extended with
    zeros). Loudness and silence are dealt with first where the specification asks for it. Raises
    ValueError for no samples.
    """
    import torch

    waveform = condition(np.ascontiguousarray(waveform, dtype=np.float32), spec)
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"log_mel needs samples of shape (n,), got {waveform.shape}")
    frames = 1 + len(waveform) // spec.hop_length
    half = spec.n_fft // 2
    if len(waveform) <= half:
        waveform = np.pad(waveform, (0, half + 1 - len(waveform)))
    with torch.inference_mode():
        padded = torch.from_numpy(np.pad(waveform, half, mode="reflect"))
        transform = mel_transform(spec)
        blocks = []
        for first in range(0, frames, BLOCK_FRAMES):
            last = min(first + BLOCK_FRAMES, frames)
            block = padded[first * spec.hop_length : (last - 1) * spec.hop_length + spec.n_fft]
            blocks.append(transform(block).clamp_(min=spec.floor).log_().T)
        return torch.cat(blocks).contiguous().numpy()


@functools.lru_cache(maxsize=4)
def mel_transform(spec: FeatureSpec) -> "MelSpectrogram":
    """torchaudio's mel spectrogram for frames that are already padded; UserError for empty mel
    bands.
    """
    import torch
    from torchaudio.functional import melscale_fbanks
    from torchaudio.transforms import MelSpectrogram

    # A tensor made in inference mode could not be used outside of it later.
    with torch.inference_mode(False):
        half = spec.sample_rate / 2
        bins = spec.n_fft // 2 + 1
        import warnings

        with warnings.catch_warnings():
            # torchaudio warns of empty bands; here they are an error with a remedy.
            warnings.simplefilter("ignore", UserWarning)
            bands = melscale_fbanks(bins, spec.f_min, half, spec.n_mels, spec.sample_rate)
            empty = int((bands.amax(0) == 0).sum())
            if empty:
                raise UserError(
                    f"{empty} of {spec.n_mels} mel bands are empty with n_fft {spec.n_fft}: "
                    "use a larger --n-fft (512, 1024) or fewer --n-mels"
                )
            return MelSpectrogram(
                sample_rate=spec.sample_rate,
                n_fft=spec.n_fft,
                win_length=spec.win_length,
                hop_length=spec.hop_length,
                f_min=spec.f_min,
                n_mels=spec.n_mels,
                power=2.0,
                center=False,
                norm=None,
                mel_scale="htk",
            )


def condition(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """float32 (n,) samples with silence trimmed and loudness set where `spec` asks for it."""
    if spec.trim_silence:
        samples = trim_silence(samples, spec.sample_rate)
    if spec.loudness_db is not None:
        samples = set_loudness(samples, spec.loudness_db)
    return samples


def set_loudness(samples: np.ndarray, loudness_db: float) -> np.ndarray:
    """Samples scaled to an RMS of `loudness_db` dBFS: 20 log10(sqrt(mean(x^2))); silence stays
    silence.
    """
    rms = math.sqrt(float(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    if rms == 0.0:
        return samples
    scaled: np.ndarray = samples * (10.0 ** (loudness_db / 20.0) / rms)
    return scaled.astype(np.float32)


def trim_silence(
    samples: np.ndarray,
    sample_rate: int,
    threshold_db: float = SILENCE_DB,
    window: float = 0.025,
    hop: float = 0.010,
) -> np.ndarray:
    """Samples without leading and trailing windows whose RMS is `threshold_db` below the loudest
    one's.

    window, hop: seconds. Silence inside is kept; of all-zero samples everything is kept.
    """
    size, step = max(1, round(window * sample_rate)), max(1, round(hop * sample_rate))
    if len(samples) <= size:
        return samples
    total = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    starts = np.arange(0, len(samples) - size + step, step)
    ends = np.minimum(starts + size, len(samples))
    energy = (total[ends] - total[starts]) / (ends - starts)
    loud = np.flatnonzero(energy > energy.max() * 10.0 ** (threshold_db / 10.0))
    if not len(loud):
        return samples
    return samples[starts[loud[0]] : ends[loud[-1]]]


def reason_of(error: BaseException) -> str:
    """The last line of an exception's message, without the path that soundfile puts before it."""
    text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return text.split(": ", 1)[-1].rstrip(".")
