"""From an audio file to log-mel features: the one path that preparation and inference share.

The features are those of the course data (yistLin/dvector): 16 kHz mono, power mel spectrogram with
the HTK scale, natural logarithm of the values clamped at 1e-9. torch and torchaudio are imported
when first used, so that commands that only read features start at once.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Self

import numpy as np
from numpy.typing import ArrayLike

from ext_common.cli import UserError
from fairseq_ext.speaker.audio.bandwidth import bandwidth
from fairseq_ext.speaker.audio.containers import AudioError as AudioError
from fairseq_ext.speaker.audio.recording import CHANNELS as CHANNELS
from fairseq_ext.speaker.audio.recording import Recording as Recording
from fairseq_ext.speaker.audio.recording import Source, resample
from fairseq_ext.speaker.audio.recording import load_audio as load_audio
from fairseq_ext.speaker.audio.waveform import Waveform
from fairseq_ext.speaker.batching import CHUNK_FRAMES

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram

# Blocks bound the memory of a long recording: 3000 frames are 30 s, about 10 MB of spectrum.
BLOCK_FRAMES = 3000
# Nobody is known by less: one rule for prepare, identify and embed.
MIN_SECONDS = 0.1
# Silence, relative to the loudest 25 ms: 1 % of its RMS.
SILENCE_DB = -40.0


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
    channel: str = field(
        default="best",
        metadata={
            "help": "of stereo: the mean, left (the first) or right; best: the mean, where the channels"
            " do not cancel in it (one inverted), else the louder",
            "choices": CHANNELS,
        },
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
        values = asdict(self)
        # as it was before there was a choice, so that neither older folders nor older versions differ
        if self.channel == FeatureSpec.channel:
            del values["channel"]
        return values

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
    def plain(self) -> "FeatureSpec":
        """The same of a recording that nothing is done to before: no loudness is set, no silence is cut."""
        return replace(self, loudness_db=None, trim_silence=False)

    @property
    def seconds_per_frame(self) -> float:
        return self.hop_length / self.sample_rate

    def features(self, samples: ArrayLike) -> np.ndarray:
        """What a network takes of float (n,) samples: log-mel features, see `log_mel`."""
        return log_mel(samples, self)

    def of_padded(self, padded: np.ndarray, frames: int) -> np.ndarray:
        """Log-mel float32 (frames, n_mels) of samples that begin half a window before the first frame."""
        return mel_frames(padded, frames, self)

    def stretches(self, samples: Waveform) -> "Waveform | LongFeatures":
        """As `features`, of a long recording, made when a stretch of them is asked for."""
        return LongFeatures(samples, self)


class LongFeatures:
    """Log-mel features of a long recording, made when a stretch is asked for: `len`, `[a:b]`.

    A stretch is float32 (b - a, n_mels), what `log_mel` of the whole gives there, to rounding.
    """

    def __init__(self, samples: Waveform, spec: FeatureSpec) -> None:
        self.samples, self.spec = samples, spec

    def __len__(self) -> int:
        return 1 + len(self.samples) // self.spec.hop_length

    def __getitem__(self, stretch: slice) -> np.ndarray:
        first, last, _ = stretch.indices(len(self))
        spec, n = self.spec, len(self.samples)
        start = first * spec.hop_length - spec.n_fft // 2
        end = start + (last - first - 1) * spec.hop_length + spec.n_fft
        # one sample more on either side: the reflection at an end leaves out the end itself
        low = max(start - 1, 0)
        samples = self.samples[low : min(end + 1, n)]
        padded = np.pad(samples, (max(-start, 0), max(end - n, 0)), mode="reflect")
        return spec.of_padded(padded[max(start - low, 0) :], last - first)


def audio_features(
    path: Source,
    spec: FeatureSpec,
    start: float | None = None,
    end: float | None = None,
    min_seconds: float = MIN_SECONDS,
) -> np.ndarray:
    """Log-mel features of a recording, or of the cut from `start` to `end` (seconds) of it.

    Returns float32 (T, n_mels). Raises AudioError (a UserError) where the audio cannot be used, be it
    shorter than `min_seconds`.
    """
    with Recording(path, spec.channel) as recording:
        samples = recording.read(start, end)
        return samples_features(samples, recording.rate, spec, recording.name, min_seconds)


class Heard(NamedTuple):
    """A recording or a cut of it.

    features: as of `audio_features`; samples: float32 (n,) mono at `rate` Hz; hertz: up to where there is
    something (`bandwidth`); said: what somebody should know of it, or None. Of a long recording (`listen`)
    both are what gives stretches of them.
    """

    features: Any
    samples: Any
    rate: int
    hertz: float
    said: str | None

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def hear(
    recording: Recording,
    spec: FeatureSpec,
    start: float | None = None,
    end: float | None = None,
    min_seconds: float = MIN_SECONDS,
) -> Heard:
    """As `audio_features`, of an open recording, with what was noticed on the way."""
    samples = recording.read(start, end)
    features = samples_features(samples, recording.rate, spec, recording.name, min_seconds)
    hertz = min(bandwidth(samples, recording.rate), spec.sample_rate / 2)
    return Heard(features, samples, recording.rate, hertz, recording.said)


def listen(recording: Recording, spec: FeatureSpec) -> Heard:
    """As `hear` of the whole; what is longer than a chunk stays on the disk and is read in stretches.

    Only then the recording stays open. Loudness and silence (`condition`) are of all samples, which are held.
    """
    chunk = CHUNK_FRAMES * spec.seconds_per_frame
    whole = spec.trim_silence or spec.loudness_db is not None
    if whole or recording.frames < chunk * recording.rate:
        with recording:
            return hear(recording, spec)
    samples = Waveform(recording, spec.sample_rate)
    found = samples.survey
    if found.constant is not None:
        raise silent(recording.name, found.constant)
    hertz = min(found.hertz, spec.sample_rate / 2)
    return Heard(spec.stretches(samples), samples, spec.sample_rate, hertz, found.said)


def silent(name: str, value: float) -> AudioError:
    """What is said of a recording of one value."""
    return AudioError("silent", f"{name}: all samples are {value:g}: give a recording of speech")


def samples_features(
    samples: np.ndarray,
    rate: int,
    spec: FeatureSpec,
    name: str = "audio",
    min_seconds: float = MIN_SECONDS,
) -> np.ndarray:
    """As `audio_features`, of float32 (n,) mono samples at `rate`; `name` is for messages."""
    found = len(samples) / rate
    if found < min_seconds:
        raise AudioError(
            "too short", f"{name}: {found:.3f} s, at least {min_seconds:g} s are needed"
        )
    if (samples == samples[0]).all():
        raise silent(name, samples[0])
    return spec.features(resample(samples, rate, spec.sample_rate, name))


def log_mel(waveform: ArrayLike, spec: FeatureSpec) -> np.ndarray:
    """Natural logarithm of the mel power spectrum of float (n,) samples at `spec.sample_rate`.

    Returns float32 (T, n_mels), T = 1 + n // hop_length: frames are centred on multiples of the hop
    and the signal is reflected at its ends (one shorter than half a window is first extended with
    zeros). Loudness and silence are dealt with first where the specification asks for it. Raises
    ValueError for no samples.
    """
    waveform = condition(np.ascontiguousarray(waveform, dtype=np.float32), spec)
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"log_mel needs samples of shape (n,), got {waveform.shape}")
    frames = 1 + len(waveform) // spec.hop_length
    half = spec.n_fft // 2
    if len(waveform) <= half:
        waveform = np.pad(waveform, (0, half + 1 - len(waveform)))
    return mel_frames(np.pad(waveform, half, mode="reflect"), frames, spec)


def mel_frames(padded: np.ndarray, frames: int, spec: FeatureSpec) -> np.ndarray:
    """As `FeatureSpec.of_padded`."""
    import torch

    with torch.inference_mode():
        source = torch.from_numpy(padded)
        transform = mel_transform(spec)
        blocks = []
        for first in range(0, frames, BLOCK_FRAMES):
            last = min(first + BLOCK_FRAMES, frames)
            block = source[first * spec.hop_length : (last - 1) * spec.hop_length + spec.n_fft]
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
