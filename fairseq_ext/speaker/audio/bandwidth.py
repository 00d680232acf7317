"""Up to which frequency a recording really goes, whatever its rate says.

A telephone's 8 kHz stay 8 kHz when they are stored at 16: above 4 kHz there is nothing but rounding. Speech
that a model knows with its high frequencies is not recognised without them.
"""

from collections.abc import Iterable

import numpy as np

WINDOW = 512
# What is looked at of a long recording: windows, evenly spaced.
MOST_WINDOWS = 4000
# Bands in which the level is taken, Hz.
BAND = 250.0
# What is this much quieter than the loudest band is nothing. Of 63 people of LibriSpeech 5 to 7.5 kHz are
# 11 to 37 dB below; of the same at 8 kHz and back, rounded to 16 bits, 53 to 74 dB.
NOTHING_DB = -45.0
# Narrow means that less than this is there, Hz: a telephone's 3.4 kHz, and all that was once at 8 kHz.
NARROW = 5000.0


def bandwidth(samples: np.ndarray, rate: int) -> float:
    """The highest frequency in Hz that there is something at in float (n,) samples; at most rate / 2.

    Taken is, in each band, the level that one window in twenty exceeds: hisses are rare, and reach highest.
    Silence has rate / 2.
    """
    if len(samples) < WINDOW:
        return rate / 2
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)
    return bandwidth_of_windows(windows[window_starts(len(samples))], rate)


def window_starts(samples: int) -> np.ndarray:
    """int64: where the windows lie that are looked at of so many samples."""
    count = min(samples // WINDOW, MOST_WINDOWS)
    starts: np.ndarray = np.linspace(0, samples - WINDOW, count).astype(np.int64)
    return starts


def bandwidth_of_windows(frames: np.ndarray, rate: float) -> float:
    """As `bandwidth`, of the windows (N, WINDOW) themselves."""
    half = rate / 2
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), axis=1)))
    band_of = (np.fft.rfftfreq(WINDOW, 1 / rate) / max(BAND, rate / WINDOW)).astype(np.int64)
    bands, first = np.unique(band_of, return_index=True)
    sums = np.add.reduceat(power, first, axis=1) / np.diff([*first, power.shape[1]])
    level = np.quantile(sums, 0.95, axis=0)
    there = np.flatnonzero(level > level.max() * 10 ** (NOTHING_DB / 10))
    if not len(there):
        return half
    return min(half, float((bands[there[-1]] + 1) * max(BAND, rate / WINDOW)))


def is_narrow(hertz: float, sample_rate: int) -> bool:
    """Whether a recording lacks what a model of `sample_rate` listens to."""
    return hertz <= min(NARROW, 0.625 * sample_rate / 2)


def mixture(hertz: Iterable[float], sample_rate: int) -> str | None:
    """A sentence on recordings of which some are narrow; None where none is."""
    found = np.array(list(hertz))
    narrow = found[[is_narrow(each, sample_rate) for each in found]] if len(found) else found
    if not len(narrow):
        return None
    return (
        f"{len(narrow)} of {len(found)} recordings hold nothing above {narrow.max() / 1000:.1f} kHz (as by"
        " telephone)"
    )
