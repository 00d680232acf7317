"""Training-time augmentation of log-mel crops, in the feature domain.

Features are stored once and for all (and the course's data has no audio), so what is done to waveforms
elsewhere is done here to mel powers: gains and filters are additions to the logarithm, noise adds powers
(the cross term has mean 0), reverberation convolves the power of each band with its decay. Every entry of
AUGMENTATIONS is `entry(x, rng, context, **options)`: x float32 (T, n_mels) natural-log mel, to be left as it
is; rng a `numpy.random.Generator` that belongs to this crop alone.

`--augment 'channel:gain_db=10,tilt=0.5;specaugment:freq_width=8'` names the steps in their order.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, List, Sequence

import numpy as np

from ext_common.registry import Registry
from fairseq_ext.speaker.features import FeatureSpec

AUGMENTATIONS = Registry("augmentation")


@dataclass
class Context:
    """What augmentations need to know of the data: statistics, mel centres and collections of audio."""

    mean: np.ndarray  # (n_mels,) mean of the training features: what "nothing" looks like
    frequencies: np.ndarray  # (n_mels,) centre of each band, Hz
    sample_rate: int
    floor: float  # smallest natural-log mel value
    noises: Sequence[np.ndarray] = ()  # log-mel (T, n_mels) each
    # log-mel (T, n_mels) each, less that of a single sample: a wide band is not a loud one
    impulse_responses: Sequence[np.ndarray] = ()
    spec: FeatureSpec = field(default_factory=FeatureSpec)


@dataclass
class SpecAugmentOptions:
    freq_masks: int = field(default=1, metadata={"help": "masks over mel bands"})
    freq_width: int = field(default=5, metadata={"help": "largest width of each, in bands"})
    time_masks: int = field(default=1, metadata={"help": "masks over time"})
    time_fraction: float = field(
        default=0.1, metadata={"help": "largest width of each, as a share of the crop"}
    )

    def __post_init__(self) -> None:
        for name in ("freq_masks", "freq_width", "time_masks"):
            check_between(self, name, 0, float("inf"))
        check_between(self, "time_fraction", 0, 1)


@dataclass
class ChannelOptions:
    gain_db: float = field(default=10.0, metadata={"help": "gain, uniform in ± this, dB"})
    tilt: float = field(
        default=0.5, metadata={"help": "filter 1 − a·z^-1 with a uniform in ± this (below 1)"}
    )
    ripple_db: float = field(
        default=0.0, metadata={"help": "deviation of a smooth random response over frequency, dB"}
    )

    def __post_init__(self) -> None:
        check_between(self, "gain_db", 0, 100)
        check_between(self, "tilt", 0, 0.99)
        check_between(self, "ripple_db", 0, 100)


@dataclass
class NoiseOptions:
    p: float = field(
        default=0.5,
        metadata={
            "help": "share of crops that get noise: of --noise-dir, or what the program makes"
        },
    )
    snr_low: float = field(default=5.0, metadata={"help": "lowest signal-to-noise ratio, dB"})
    snr_high: float = field(default=20.0, metadata={"help": "highest signal-to-noise ratio, dB"})

    def __post_init__(self) -> None:
        check_between(self, "p", 0, 1)
        check_between(self, "snr_low", -100, self.snr_high)


@dataclass
class ReverbOptions:
    p: float = field(
        default=0.5,
        metadata={
            "help": "share of crops that get reverberation: of --rir-dir, or of rooms the program makes"
        },
    )

    def __post_init__(self) -> None:
        check_between(self, "p", 0, 1)


@dataclass
class BandwidthOptions:
    p: float = field(default=0.5, metadata={"help": "share of crops that are narrowed"})
    low: float = field(default=3400.0, metadata={"help": "lowest frequency it may end at, Hz"})
    high: float = field(default=4200.0, metadata={"help": "highest frequency it may end at, Hz"})
    telephone: float = field(
        default=0.3,
        metadata={"help": "share of the narrowed that begin at 300 Hz, as telephones do"},
    )

    def __post_init__(self) -> None:
        check_between(self, "p", 0, 1)
        check_between(self, "telephone", 0, 1)
        check_between(self, "low", 1, self.high)


@AUGMENTATIONS.register("bandwidth", options=BandwidthOptions)
def narrow_band(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """A crop without its high frequencies, as 8 kHz audio stored at 16 is: a filter with a random slope.

    Above it is what a resampler leaves (45 to 90 dB less) or rounding to 16 bits, whichever is louder.
    """
    o = BandwidthOptions(**options)
    if rng.random() >= o.p:
        return x
    end = rng.uniform(o.low, o.high)
    gain = -rng.uniform(45, 90) * ramp(context.frequencies, end, end * rng.uniform(1.02, 1.2))
    if rng.random() < o.telephone:
        start = rng.uniform(200, 300)
        gain -= rng.uniform(10, 40) * (1 - ramp(context.frequencies, start / 2, start))
    rounding = context.floor + rng.uniform(0, 4)
    quiet = np.where(gain < -20, max(context.floor, rounding), context.floor)
    return np.asarray(np.maximum(x + (np.log(10) / 10 * gain), quiet), dtype=np.float32)


@AUGMENTATIONS.register("specaugment", options=SpecAugmentOptions)
def spec_augment(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """SpecAugment (Park et al. 2019) filled with the mean of the training data: 0 is loud in log-mel."""
    o = SpecAugmentOptions(**options)
    T, n_mels = x.shape
    x = x.copy()
    for _ in range(o.freq_masks):
        width = rng.integers(0, min(o.freq_width, n_mels) + 1)
        start = rng.integers(0, n_mels - width + 1)
        x[:, start : start + width] = context.mean[start : start + width]
    for _ in range(o.time_masks):
        width = rng.integers(0, int(o.time_fraction * T) + 1)
        start = rng.integers(0, T - width + 1)
        x[start : start + width] = context.mean
    return x


@AUGMENTATIONS.register("channel", options=ChannelOptions)
def random_channel(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """Another loudness and microphone: gain, first-order tilt, smooth random response; one draw a crop."""
    o = ChannelOptions(**options)
    response = np.full(x.shape[1], rng.uniform(-o.gain_db, o.gain_db))
    a = rng.uniform(-o.tilt, o.tilt)
    response += tilt_response_db(a, context.frequencies, context.sample_rate)
    if o.ripple_db:
        knots = rng.normal(0, o.ripple_db, 5)
        place = np.linspace(0, 4, x.shape[1])
        response += np.interp(place, np.arange(5), knots)
    gain = np.float32(np.log(10) / 10) * response.astype(np.float32)
    return np.asarray(np.maximum(x + gain, context.floor))


@AUGMENTATIONS.register("noise", options=NoiseOptions)
def random_noise(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """A random stretch of noise at a random signal-to-noise ratio.

    Of the recordings under --noise-dir; without it white, pink and brown noise, and babble of the data.
    """
    o = NoiseOptions(**options)
    if rng.random() >= o.p:
        return x
    noise = context.noises[int(rng.integers(len(context.noises)))]
    start = rng.integers(len(noise))
    rows = (start + np.arange(len(x))) % len(noise)
    return add_noise(x, noise[rows], rng.uniform(o.snr_low, o.snr_high))


@AUGMENTATIONS.register("reverb", options=ReverbOptions)
def random_reverb(
    x: np.ndarray, rng: np.random.Generator, context: Context, **options: Any
) -> np.ndarray:
    """A random room: of the impulse responses under --rir-dir, or a made one."""
    o = ReverbOptions(**options)
    if rng.random() >= o.p:
        return x
    rir = context.impulse_responses[int(rng.integers(len(context.impulse_responses)))]
    return np.asarray(np.maximum(reverberate(x, rir), np.float32(context.floor)))


def build_augmentation(pipeline: str) -> List[Callable[..., Any]]:
    """'name:key=value,…;name' → the steps, each called as step(x, rng, context)."""
    parts = (part.strip() for part in (pipeline or "").split(";"))
    return [AUGMENTATIONS.bind(part) for part in parts if part]


def tilt_response_db(a: float, frequencies: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power response of 1 − a·z^-1 at the given frequencies in Hz: 10 log10(1 − 2a cos ω + a²)."""
    w = 2 * np.pi * frequencies / sample_rate
    return np.asarray(10 * np.log10(1 - 2 * a * np.cos(w) + a * a))


def ramp(frequencies: np.ndarray, first: float, last: float) -> np.ndarray:
    """0 up to `first` Hz, 1 from `last` on, straight in between."""
    return np.clip((frequencies - first) / (last - first), 0, 1)


def add_noise(x: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Sum of mel powers at the given ratio of mean powers: log(e^x + g e^noise), both (T, n_mels)."""
    level = np.log(np.exp(x).mean() / np.exp(noise).mean()) - snr_db * np.log(10) / 10
    return np.asarray(np.logaddexp(x, noise + np.float32(level)))


def reverberate(x: np.ndarray, impulse_response: np.ndarray) -> np.ndarray:
    """Power of each band convolved over time with the decay of the impulse response in that band.

    Both are natural-log mel (T, n_mels), the response relative to that of a single sample (`Context`). The
    decay starts at its loudest frame and is scaled to a total
    power of 1 a band on average, so that the colour of the room stays and the loudness does not change.
    """
    # in float64: the rounding of the transform is relative to the loudest frame, 130 dB above the floor
    impulse_response, x = impulse_response.astype(np.float64), x.astype(np.float64)
    decay = np.exp(impulse_response[np.argmax(np.exp(impulse_response).sum(1)) :][: len(x)])
    decay = decay / decay.sum(0).mean()
    power = np.exp(x)
    n = len(x) + len(decay) - 1
    wet = np.fft.irfft(np.fft.rfft(power, n, axis=0) * np.fft.rfft(decay, n, axis=0), n, axis=0)
    loud = np.maximum(wet[: len(x)], power * decay[0])
    return np.asarray(np.log(loud), dtype=np.float32)


def change_speed(x: np.ndarray, factor: float, frames: int, frequencies: np.ndarray) -> np.ndarray:
    """`frames` frames of x played `factor` times as fast: time and frequency axes are stretched alike.

    x is (T, n_mels) with T ≥ (frames − 1) · factor + 1 or shorter (its end is repeated); frequencies
    (n_mels,) are the centres of the bands, in Hz.
    """
    if factor == 1:
        return x[:frames]
    place = np.minimum(np.arange(frames) * factor, len(x) - 1)
    low = place.astype(np.int64)
    part = (place - low)[:, None]
    x = x[low] * (1 - part) + x[np.minimum(low + 1, len(x) - 1)] * part
    # what is heard at f was at f / factor
    band = np.interp(frequencies / factor, frequencies, np.arange(len(frequencies)))
    low = np.minimum(band.astype(np.int64), len(frequencies) - 2)
    part = band - low
    return (x[:, low] * (1 - part) + x[:, low + 1] * part).astype(np.float32)


def mel_frequencies(n_mels: int, f_min: float, f_max: float) -> np.ndarray:
    """Centres in Hz of n_mels triangular bands on the HTK mel scale, m = 2595 log10(1 + f / 700)."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (f_min, f_max))
    mels = np.linspace(low, high, n_mels + 2)[1:-1]
    return 700 * (10 ** (mels / 2595) - 1)


def check_between(options: object, name: str, low: float, high: float) -> None:
    """ValueError for an option that does not lie in [low, high]."""
    value = getattr(options, name)
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is not between {low} and {high}")
