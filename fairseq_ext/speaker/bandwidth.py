"""Up to which frequency a recording really goes, whatever its rate says.

A telephone's 8 kHz stay 8 kHz when they are stored at 16: above 4 kHz there is nothing but rounding. Speech
that a model knows with its high frequencies is not recognised without them.
"""

import numpy as np

WINDOW = 512
# What is looked at of a long recording: windows, evenly spaced.
MOST_WINDOWS = 4000
# Bands in which the level is taken, Hz.
BAND = 125.0
# A cliff: what is above it is this much quieter than what lies just below it, dB, in loud moments.
CLIFF_DB = 18.0
BELOW = 500.0
# Filters have slopes: the bands in between are not asked.
SLOPE = 250.0
# Narrow means that less than this is there, Hz: a telephone's 3.4 kHz, and all of 8 kHz audio.
NARROW = 5000.0


def bandwidth(samples: np.ndarray, rate: int) -> float:
    """The highest frequency in Hz that there is something at in float (n,) samples; at most rate / 2.

    Taken is, in each band, the level that one window in twenty exceeds (hisses are rare, and reach highest).
    The end is where it falls by `CLIFF_DB` against all that is above. Silence has rate / 2.
    """
    half = rate / 2
    size = min(WINDOW, len(samples))
    if size < WINDOW // 4:
        return half
    count = max(1, len(samples) // size)
    starts = np.unique(
        np.linspace(0, len(samples) - size, min(count, MOST_WINDOWS)).astype(np.int64)
    )
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[starts]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)))
    edges = np.arange(0, half + 1, BAND)
    bins = np.fft.rfftfreq(size, 1 / rate)
    bands = np.clip(np.searchsorted(edges, bins, "right") - 1, 0, len(edges) - 2)
    sums = np.stack([power[:, bands == band].sum(1) for band in np.unique(bands)], axis=1)
    edges = edges[np.unique(bands)]
    level = 10 * np.log10(np.quantile(sums, 0.95, axis=0) + 1e-30)
    best, end = CLIFF_DB, half
    for place in range(1, len(edges)):
        frequency = edges[place]
        above = level[edges >= frequency + SLOPE]
        under = level[(edges >= frequency - BELOW) & (edges < frequency)]
        if frequency >= BELOW and len(above) and under.mean() - above.max() > best:
            best, end = under.mean() - above.max(), float(frequency)
    return end
