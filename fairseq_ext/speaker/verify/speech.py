"""Where somebody speaks, by loudness: enough to leave pauses out, no detector of speech among noises."""

from typing import Any

import numpy as np

# Below the loud part of the recording; speech itself spans about 30 dB.
QUIET_DB = 30.0
# Of a stretch, so that it counts as speech
LEAST_SHARE = 0.5
# Levels that are computed at a time
PIECE = 10_000


def levels_of_samples(samples: Any, hop: int) -> np.ndarray:
    """Level in dB of each whole `hop` samples of (n,), float64 (n // hop,), one at least.

    samples: an array, or what gives stretches of one (`Waveform`).
    """
    count = max(1, len(samples) // hop)
    powers = []
    for first in range(0, count, PIECE):
        last = min(first + PIECE, count)
        piece = np.asarray(samples[first * hop : last * hop], dtype=np.float64)
        powers.append(np.square(np.resize(piece, (last - first, hop))).mean(1))
    levels: np.ndarray = 10 * np.log10(np.concatenate(powers) + 1e-12)
    return levels


def levels_of_features(log_mel: np.ndarray) -> np.ndarray:
    """Level in dB of each frame of log-mel features (T, n_mels), float64 (T,)."""
    energy = np.exp(np.asarray(log_mel, dtype=np.float64)).sum(1)
    levels: np.ndarray = 10 * np.log10(energy + 1e-12)
    return levels


def spoken(levels: np.ndarray) -> np.ndarray:
    """bool (T,): is the level at most 30 dB below that of the loudest twentieth of (T,)."""
    loud = np.quantile(levels, 0.95)
    found: np.ndarray = levels >= loud - QUIET_DB
    return found


def spoken_stretches(mask: np.ndarray, size: int, step: int) -> list[int]:
    """Starts of the stretches of `size` frames, every `step`, at least half of which are spoken in (T,)."""
    starts = range(0, len(mask) - size + 1, step)
    return [start for start in starts if mask[start : start + size].mean() >= LEAST_SHARE]
