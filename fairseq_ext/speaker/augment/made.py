"""Noises and rooms that the program makes, for those who have no recordings of them.

Noises: white, pink and brown noise, and babble, several utterances of the training data at once. Rooms: a
direct sound and behind it noise that decays exponentially (Polack 1988), as late reverberation does.
"""

from collections.abc import Callable

import numpy as np

from fairseq_ext.speaker.features import FeatureSpec, log_mel

SECONDS = 10.0
# Power falls with frequency to this power: white, pink, brown.
EXPONENTS = (0.0, 1.0, 2.0)
OF_EACH = 4
BABBLES = 12
VOICES = (3, 7)
ROOMS = 32
# Seconds in which the sound falls by 60 dB: from a furnished room to a hall.
DECAYS = (0.2, 0.8)
# Direct sound to reverberation, dB: from across the room to near the mouth.
RATIOS = (-2.0, 12.0)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def made_noises(spec: FeatureSpec, seed: int, speech: Draw) -> list[np.ndarray]:
    """Log-mel (T, n_mels) of noises of 10 s; speech(rng, T) draws T frames of somebody's speech."""
    rng = np.random.default_rng((seed, 0, 2))
    n = round(SECONDS * spec.sample_rate)
    frames = 1 + n // spec.hop_length
    colours = [coloured(n, exponent, rng) for exponent in EXPONENTS for _ in range(OF_EACH)]
    babbles = []
    for _ in range(BABBLES):
        count = int(rng.integers(VOICES[0], VOICES[1] + 1))
        babbles.append(babble([speech(rng, frames) for _ in range(count)]))
    return [log_mel(0.1 * noise, spec.plain) for noise in colours] + babbles


def made_rooms(spec: FeatureSpec, seed: int) -> list[np.ndarray]:
    """Log-mel (T, n_mels) of the impulse responses of rooms."""
    rng = np.random.default_rng((seed, 0, 3))
    drawn = [(rng.uniform(*DECAYS), rng.uniform(*RATIOS)) for _ in range(ROOMS)]
    return [log_mel(room(spec.sample_rate, *one, rng), spec.plain) for one in drawn]


def coloured(n: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """float32 (n,): Gaussian noise of deviation 1 whose power falls as 1 / f^exponent from 50 Hz on."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    # in bins of a recording at 16 kHz, where nobody hears what is lower
    frequency = np.maximum(np.arange(len(spectrum)) / n * 16000, 50.0)
    noise = np.fft.irfft(spectrum * frequency ** (-exponent / 2), n)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def babble(voices: list[np.ndarray]) -> np.ndarray:
    """Log-mel (T, n_mels) of voices (T, n_mels) at once, all equally loud: the mean of their powers."""
    powers = [np.exp(voice.astype(np.float64)) for voice in voices]
    loudness = np.mean([power.mean() for power in powers])
    mixed = np.mean([power * loudness / power.mean() for power in powers], axis=0)
    return np.asarray(np.log(mixed), dtype=np.float32)


def room(rate: int, decay: float, ratio_db: float, rng: np.random.Generator) -> np.ndarray:
    """float32 (n,): an impulse and, from 2 ms behind it, noise that falls by 60 dB in `decay` seconds.

    ratio_db: energy of the impulse to that of the noise. Half a window of silence goes before.
    """
    before, gap = round(0.05 * rate), round(0.002 * rate)
    t = np.arange(round(decay * rate)) / rate
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / decay)
    tail *= np.sqrt(10 ** (-ratio_db / 10) / np.square(tail).sum())
    return np.concatenate([np.zeros(before), np.ones(1), np.zeros(gap), tail]).astype(np.float32)
