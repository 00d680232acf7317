"""A recording of any length, read a stretch at a time, so that memory does not grow with it."""

import numpy as np

from fairseq_ext.speaker.audio.recording import (
    Recording,
    filtered,
    ratio_of,
    resampling_filters,
)


class Waveform:
    """Mono samples of an open recording at `rate` Hz: `len`, and `[a:b]`, float32 (b - a,).

    The recording is read through once, for what only the whole of it says (`Survey`); AudioError where that
    fails. Stretches are fast in the order of time.
    """

    def __init__(self, recording: Recording, rate: int) -> None:
        self.recording = recording
        self.survey = recording.survey()
        self._same = recording.rate == rate
        self._down, self._up = ratio_of(recording.rate, rate, recording.name)
        self._length = -(-self.survey.samples * self._up // self._down)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, stretch: slice) -> np.ndarray:
        first, last, _ = stretch.indices(len(self))
        if self._same:
            return self.recording.stretch(first, last, self.survey.column)
        down, up = self._down, self._up
        _, reach = resampling_filters(down, up)
        # whole periods, and what the filters reach on both sides, zeros beyond the ends
        start, end = first // up, -(-last // up)
        begin, behind = start * down - reach, end * down + reach
        samples = self.recording.stretch(
            max(begin, 0), min(behind, self.survey.samples), self.survey.column
        )
        padded = np.pad(samples, (max(-begin, 0), max(behind - self.survey.samples, 0)))
        return filtered(padded, down, up, end - start)[first - start * up : last - start * up]
