"""Log-mel features without torch: what `features.log_mel` computes, by numpy, and its parts for a graph."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from fairseq_ext.speaker.audio.waveform import Waveform
from fairseq_ext.speaker.features import BLOCK_FRAMES, FeatureSpec, condition


class PlainSpec(FeatureSpec):
    """A specification whose features are made without torch."""

    def features(self, samples: ArrayLike) -> np.ndarray:
        """See `log_mel`."""
        return log_mel(samples, self)

    def of_padded(self, padded: np.ndarray, frames: int) -> np.ndarray:
        return mel_frames(padded, frames, self)


class WaveformSpec(FeatureSpec):
    """The specification of a network that takes samples and makes the features itself."""

    def features(self, samples: ArrayLike) -> np.ndarray:
        """float32 (n,): the samples as the network takes them, silence trimmed and loudness set."""
        return conditioned(samples, self)

    def stretches(self, samples: Waveform) -> Waveform:
        return samples


def log_mel(samples: ArrayLike, spec: FeatureSpec) -> np.ndarray:
    """As `features.log_mel`, to rounding: samples (n,) at `spec.sample_rate` → float32 (T, n_mels)."""
    samples = conditioned(samples, spec)
    frames, half = 1 + len(samples) // spec.hop_length, spec.n_fft // 2
    padded = np.pad(samples, (0, max(0, half + 1 - len(samples))))
    return mel_frames(np.pad(padded, half, mode="reflect"), frames, spec)


def mel_frames(padded: np.ndarray, frames: int, spec: FeatureSpec) -> np.ndarray:
    """As `FeatureSpec.of_padded`."""
    framed = sliding_window_view(padded, spec.n_fft)[:: spec.hop_length][:frames]
    window, bands = hann(spec).astype(np.float32), mel_bands(spec).astype(np.float32)
    blocks = []
    for first in range(0, frames, BLOCK_FRAMES):
        spectrum = np.fft.rfft(framed[first : first + BLOCK_FRAMES] * window)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        energies = power.astype(np.float32) @ bands
        blocks.append(np.log(np.maximum(energies, np.float32(spec.floor))))
    return np.concatenate(blocks)


def conditioned(samples: ArrayLike, spec: FeatureSpec) -> np.ndarray:
    """float32 (n,) with silence trimmed and loudness set; ValueError for no samples."""
    found = condition(np.ascontiguousarray(samples, dtype=np.float32), spec)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"features need samples of shape (n,), got {found.shape}")
    return found


def hann(spec: FeatureSpec) -> np.ndarray:
    """float64 (n_fft,): the periodic Hann window, in the middle of zeros where it is shorter."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.win_length) / spec.win_length)
    before = (spec.n_fft - spec.win_length) // 2
    return np.pad(window, (before, spec.n_fft - spec.win_length - before))


def windowed_dft(spec: FeatureSpec) -> np.ndarray:
    """float64 (2 (n_fft // 2 + 1), n_fft): the rows give real, then imaginary parts of a frame's spectrum."""
    bins = np.arange(spec.n_fft // 2 + 1)[:, None]
    # the phase modulo a turn, in integers: cosine and sine of small angles lose no digits
    angles = 2 * np.pi * (bins * np.arange(spec.n_fft) % spec.n_fft) / spec.n_fft
    filters: np.ndarray = np.concatenate([np.cos(angles), -np.sin(angles)]) * hann(spec)
    return filters


def mel_bands(spec: FeatureSpec) -> np.ndarray:
    """float64 (n_fft // 2 + 1, n_mels): triangles of height 1, edges evenly spaced on the HTK scale.

    m = 2595 log10(1 + f / 700) from f_min to half the sample rate (Young et al., The HTK Book).
    """
    top = spec.sample_rate / 2
    low, high = (2595 * np.log10(1 + f / 700) for f in (spec.f_min, top))
    edges = 700 * (10 ** (np.linspace(low, high, spec.n_mels + 2) / 2595) - 1)
    bins = np.linspace(0, top, spec.n_fft // 2 + 1)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall))
