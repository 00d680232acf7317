"""Channels, and up to where a recording goes."""

import numpy as np
import pytest

from fairseq_ext.speaker.audio.bandwidth import bandwidth, is_narrow, mixture
from fairseq_ext.speaker.audio.recording import resample, to_mono

RATE = 16000


def noise(n, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def test_the_best_channel_is_the_mean_but_where_channels_cancel():
    a, b = noise(4000, 1), noise(4000, 2)
    for left, right in ((a, a), (a, b), (a, 0 * a), (a, a + b), (0 * a, 0 * a)):
        samples = np.stack([left, right], 1)
        mono, said = to_mono(samples)
        np.testing.assert_array_equal(mono, samples.mean(1))
        assert said is None
    for right, name, expected in ((-a, "the left", a), (-1.2 * a + 0.1 * b, "the right", None)):
        samples = np.stack([a, right], 1)
        mono, said = to_mono(samples)
        np.testing.assert_array_equal(mono, samples[:, 0] if expected is a else samples[:, 1])
        assert "cancel" in said and name in said
        assert "--channel best" in to_mono(samples, "mean")[1]
    three = np.stack([a, -a, 0.1 * b], 1)
    assert "channel 1" in to_mono(three)[1]


def test_left_and_right_are_the_first_two():
    samples = np.stack([noise(100, 1), noise(100, 2)], 1)
    np.testing.assert_array_equal(to_mono(samples, "left")[0], samples[:, 0])
    np.testing.assert_array_equal(to_mono(samples, "right")[0], samples[:, 1])
    np.testing.assert_array_equal(to_mono(samples[:, :1], "right")[0], samples[:, 0])
    with pytest.raises(ValueError, match="best, mean, left, right"):
        to_mono(samples, "middle")


@pytest.mark.parametrize("seconds", [0.2, 1, 30])
def test_the_bandwidth_is_what_is_there_not_what_the_rate_says(seconds):
    x = noise(int(seconds * RATE))
    assert bandwidth(x, RATE) == 8000
    for limit in (3400, 4000, 5500):
        spectrum = np.fft.rfft(x)
        spectrum[np.fft.rfftfreq(len(x), 1 / RATE) > limit] = 0
        stored = (np.round(np.fft.irfft(spectrum, len(x)) * 32767) / 32767).astype(np.float32)
        found = bandwidth(stored, RATE)
        assert limit - 250 <= found <= limit + 250
        assert is_narrow(found, RATE) == (limit < 5000)
    assert bandwidth(resample(x, RATE, 8000), 8000) == 4000


def test_what_is_rare_counts_and_silence_is_not_narrow():
    x = resample(resample(noise(10 * RATE), RATE, 8000), 8000, RATE)
    x[3 * RATE : 4 * RATE] += noise(RATE, 1, 0.01)
    assert bandwidth(x, RATE) == 8000
    assert bandwidth(np.zeros(RATE, np.float32), RATE) == 8000
    assert bandwidth(noise(100), RATE) == 8000


def test_a_mixture_is_counted():
    assert mixture([8000.0, 3500.0, 4000.0], RATE).startswith(
        "2 of 3 recordings hold nothing above 4.0"
    )
    assert mixture([8000.0], RATE) is None and mixture([], RATE) is None
