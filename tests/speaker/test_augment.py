"""Augmentation of features against the same thing done to waveforms."""

import pickle

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from ext_common.cli import UserError
from fairseq_ext.speaker.augment import (
    AUGMENTATIONS,
    Context,
    add_noise,
    build_augmentation,
    change_speed,
    mel_frequencies,
    reverberate,
    tilt_response_db,
)
from fairseq_ext.speaker.augment.codecs import KINDS, through
from fairseq_ext.speaker.augment.made import babble, coloured, room
from fairseq_ext.speaker.export.frontend import mel_bands
from fairseq_ext.speaker.features import FeatureSpec, log_mel

SPEC = FeatureSpec()
RATE, MELS = SPEC.sample_rate, SPEC.n_mels
FREQUENCIES = mel_frequencies(MELS, SPEC.f_min, RATE / 2)
FLOOR = float(np.log(SPEC.floor))
DB = np.log(10) / 10


def context(**changes):
    mean = np.linspace(-8, -3, MELS).astype(np.float32)
    return Context(mean, FREQUENCIES, RATE, FLOOR, **changes)


def lfilter(b, a, x):
    """b(z) / a(z) on a signal, float64."""
    b, a = (torch.tensor([*c, 0.0, 0.0][:2], dtype=torch.float64) for c in (b, a))
    x = torch.tensor(np.asarray(x), dtype=torch.float64)
    return torchaudio.functional.lfilter(x, a, b, clamp=False).numpy()


def speech(seconds=2.0, seed=0):
    """Noise with a falling spectrum, loud and soft by turns: level and spectrum of speech."""
    rng = np.random.default_rng(seed)
    x = lfilter([1], [1, -0.9], rng.standard_normal(int(seconds * RATE)))
    syllables = 0.2 + np.abs(np.sin(2 * np.pi * 2 * np.arange(len(x)) / RATE))
    return (0.05 * x * syllables).astype(np.float32)


def crop(frames=80, seed=0):
    return np.random.default_rng(seed).normal(-6, 2, (frames, MELS)).astype(np.float32)


def run(pipeline, x, seed=0, ctx=None):
    rng = np.random.default_rng(seed)
    for step in build_augmentation(pipeline):
        x = step(x, rng, ctx or context())
    return x


NOISES = [crop(30, 7), crop(200, 8)]
ROOMS = [np.linspace(0, -12, 40)[:, None] + np.zeros(MELS, dtype=np.float32)]
FULL = dict(noises=NOISES, impulse_responses=ROOMS)
EVERY = [
    "bandwidth:p=1",
    "channel",
    "channel:ripple_db=3",
    "codec:p=1",
    "noise:p=1",
    "reverb:p=1",
    "specaugment",
]


def test_every_augmentation_is_tested_here():
    assert {p.partition(":")[0] for p in EVERY} == set(AUGMENTATIONS.names())


@pytest.mark.parametrize("pipeline", [*EVERY, ";".join(EVERY)])
def test_contract(pipeline):
    """Source untouched, shape and type kept, deterministic, never below the floor."""
    x = crop()
    before = x.copy()
    x.flags.writeable = False
    first = run(pipeline, x, 1, context(**FULL))
    again = run(pipeline, x, 1, context(**FULL))
    other = run(pipeline, x, 2, context(**FULL))
    assert np.array_equal(x, before)
    assert first.shape == x.shape and first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other) or "reverb" in pipeline
    assert not np.array_equal(first, x)
    assert np.isfinite(first).all()
    for y in (np.full((20, MELS), FLOOR, dtype=np.float32), crop(1)):
        result = run(pipeline, y, 1, context(**FULL))
        assert np.isfinite(result).all() and (result >= np.float32(FLOOR)).all()


class TestSpecAugment:
    def test_filled_with_the_mean_of_the_data_and_nothing_else_touched(self):
        ctx, x = context(), crop()
        seen_bands, seen_frames = set(), set()
        for seed in range(250):
            y = run("specaugment:freq_masks=1,time_masks=1,time_fraction=0.2", x, seed, ctx)
            changed = y != x
            assert np.array_equal(y[changed], np.broadcast_to(ctx.mean, x.shape)[changed])
            bands = np.flatnonzero(changed.all(0))
            frames = np.flatnonzero(changed.all(1))
            rest = changed.copy()
            rest[:, bands] = False
            rest[frames] = False
            assert not rest.any(), "whole bands and whole frames only"
            assert len(bands) <= 6 and len(frames) <= 16
            for places in (bands, frames):
                assert len(places) == 0 or np.array_equal(
                    places, np.arange(places[0], places[0] + len(places))
                )
            seen_bands.update(bands.tolist())
            seen_frames.update(frames.tolist())
        # both ends can be masked
        assert {0, MELS - 1} <= seen_bands and {0, len(x) - 1} <= seen_frames

    def test_every_width_up_to_the_largest_is_drawn(self):
        x = crop()
        widths = {
            int((run("specaugment:freq_masks=1,freq_width=4,time_masks=0", x, s) != x).all(0).sum())
            for s in range(80)
        }
        assert widths == {0, 1, 2, 3, 4}

    def test_masks_differ_between_crops(self):
        """One mask for a whole batch is a known mistake."""
        x = crop()
        masks = {(run("specaugment", x, seed) != x).tobytes() for seed in range(10)}
        assert len(masks) > 8

    @pytest.mark.parametrize("frames", [1, 2, 3])
    def test_short_crops(self, frames):
        assert run("specaugment:time_fraction=1", crop(frames)).shape == (frames, MELS)

    def test_wider_than_the_features(self):
        assert run("specaugment:freq_width=99", crop()).shape == (80, MELS)


class TestChannel:
    @pytest.mark.parametrize("a", [-0.5, 0.3, 0.5])
    @pytest.mark.parametrize("gain_db", [-10.0, 6.0])
    def test_response_is_that_of_the_filter(self, a, gain_db):
        """x[n] − a·x[n−1] and a gain on the waveform move each band by the response there."""
        x = speech()
        y = 10 ** (gain_db / 20) * lfilter([1, -a], [1], x).astype(np.float32)
        # edge frames hold the filter's start and the reflection
        measured = (log_mel(y, SPEC) - log_mel(x, SPEC))[3:-3].mean(0) / DB
        expected = gain_db + tilt_response_db(a, FREQUENCIES, RATE)
        np.testing.assert_allclose(measured, expected, atol=0.35)

    def test_response_by_hand(self):
        """|1 − a e^(−jω)|² at 0, a quarter and half of the rate."""
        found = tilt_response_db(0.5, np.array([0, 4000, 8000]), 16000)
        np.testing.assert_allclose(found, 10 * np.log10([0.25, 1.25, 2.25]))
        np.testing.assert_allclose(tilt_response_db(0.0, FREQUENCIES, RATE), 0, atol=1e-12)

    def test_one_response_a_crop(self):
        x = crop()
        difference = run("channel:gain_db=10,tilt=0.5,ripple_db=2", x) - x
        np.testing.assert_allclose(difference, np.broadcast_to(difference[:1], x.shape), atol=1e-5)

    def test_draws_are_uniform_within_bounds(self):
        x = crop(2)
        gains = np.array(
            [(run("channel:gain_db=10,tilt=0", x, s) - x).mean() / DB for s in range(400)]
        )
        assert np.abs(gains).max() <= 10 + 1e-4
        assert abs(gains.mean()) < 1.2 and abs(gains.std() - 20 / np.sqrt(12)) < 0.6
        # the tilt at the lowest band goes from 20 log10(1 − 0.5) to 20 log10(1 + 0.5)
        tilts = np.array([(run("channel:gain_db=0", x, s) - x)[0, 0] / DB for s in range(400)])
        assert -6.1 < tilts.min() < -5.5 and 3.2 < tilts.max() < 3.6

    def test_nothing_to_do(self):
        x = crop()
        np.testing.assert_allclose(run("channel:gain_db=0,tilt=0", x), x, atol=1e-6)


class TestNoise:
    @pytest.mark.parametrize("snr", [0.0, 10.0, 20.0])
    def test_as_mixing_waveforms(self, snr):
        """Independent signals: powers add, on average, with the level the ratio asks for."""
        x, noise = speech(8), np.random.default_rng(5).standard_normal(8 * RATE).astype(np.float32)
        noise *= np.sqrt(np.mean(x**2) / np.mean(noise**2) / 10 ** (snr / 10))
        truth = np.exp(log_mel(x + noise, SPEC)).mean(0)
        found = np.exp(add_noise(log_mel(x, SPEC), log_mel(noise * 3.7, SPEC), snr)).mean(0)
        # the mel bands start at 50 Hz, where the waveform's powers do not
        np.testing.assert_allclose(np.log(found / truth) / DB, 0, atol=1.0)

    def test_ratio_of_powers_is_exact(self):
        x, noise = crop(), crop(80, 3)
        mixed = np.exp(add_noise(x, noise, 7.0).astype(np.float64))
        added = mixed - np.exp(x.astype(np.float64))
        ratio = 10 * np.log10(np.exp(x.astype(np.float64)).mean() / added.mean())
        assert ratio == pytest.approx(7.0, abs=1e-3)
        assert (mixed >= np.exp(x.astype(np.float64)) * (1 - 1e-6)).all()

    def test_share_of_crops(self):
        x, ctx = crop(5), context(noises=NOISES)
        count = sum(run("noise:p=0.3", x, s, ctx) is not x for s in range(300))
        assert 50 < count < 130
        assert all(run("noise:p=0", x, s, ctx) is x for s in range(20))
        assert all(run("noise:p=1", x, s, ctx) is not x for s in range(20))

    def test_short_noise_is_repeated_and_any_stretch_is_used(self):
        noise = np.full((7, MELS), -20, dtype=np.float32)
        noise[np.arange(7), np.arange(7)] = 20
        ctx, starts = context(noises=[noise]), set()
        for seed in range(60):
            x = np.full((15, MELS), -5, dtype=np.float32)
            y = run("noise:p=1,snr_low=0,snr_high=0", x, seed, ctx)
            loud = y.argmax(1)
            assert np.array_equal(loud, (loud[0] + np.arange(15)) % 7)
            starts.add(int(loud[0]))
        assert starts == set(range(7))

    def test_ratio_is_within_bounds(self):
        x, ctx, ratios = crop(), context(noises=[crop(80, 3)]), []
        for seed in range(100):
            y = run("noise:p=1,snr_low=5,snr_high=15", x, seed, ctx).astype(np.float64)
            power = np.exp(x.astype(np.float64))
            ratios.append(10 * np.log10(power.mean() / (np.exp(y) - power).mean()))
        # stretches of the noise are rotations of it: same mean power
        assert 4.9 < min(ratios) < 6.5 and 13.5 < max(ratios) < 15.1


class TestReverb:
    def relative(self, response):
        """As the task prepares impulse responses."""
        impulse = np.zeros(2000, dtype=np.float32)
        impulse[320] = 1
        return log_mel(response, SPEC) - log_mel(impulse, SPEC).max(0)

    def test_impulse_alone_is_the_identity(self):
        x = crop()
        decay = np.full((30, MELS), -60, dtype=np.float32)
        decay[5] = 3.0
        np.testing.assert_allclose(reverberate(x, decay), x, atol=1e-4)

    def test_waveform_of_one_sample_is_nearly_the_identity(self):
        """Also in colour: wide bands hold more of an impulse, and that is not the room's doing.

        What remains is the analysis window: a hop behind, its square is 1 % of its peak.
        """
        x = log_mel(speech(), SPEC)
        impulse = np.zeros(4000, dtype=np.float32)
        impulse[800] = 0.3
        difference = reverberate(x, self.relative(impulse)) - x
        assert np.abs(difference.mean(0)).max() < 0.3 * DB
        assert np.abs(difference).max() < 3 * DB

    def test_as_convolving_the_waveform(self):
        """A dark exponential decay over 0.3 s behind a delay: band by band, on average."""
        rng = np.random.default_rng(1)
        t = np.arange(int(0.4 * RATE)) / RATE
        tail = lfilter([0.4], [1, -0.6], rng.standard_normal(len(t))) * np.exp(-6.9 * t / 0.3)
        room = np.concatenate([np.zeros(700), [6.0], tail]).astype(np.float32)
        x = speech(6)
        # both to a mean gain of 1 over the bands, which is what the augmentation keeps
        wet = np.convolve(x, room)[700 : 700 + len(x)].astype(np.float32)
        truth, dry = (np.exp(log_mel(v, SPEC)[2:-2]).mean(0) for v in (wet, x))
        found = np.exp(reverberate(log_mel(x, SPEC), self.relative(room))[2:-2]).mean(0)
        measured, expected = np.log(found / dry) / DB, np.log(truth / dry) / DB
        difference = measured - expected
        assert np.abs(difference - difference.mean()).max() < 2.0
        assert np.corrcoef(measured, expected)[0, 1] > 0.7

    def test_loudness_stays(self):
        x = crop(400)
        decay = np.linspace(0, -14, 40)[:, None] + np.linspace(-1, 1, MELS)
        y = reverberate(x, decay.astype(np.float32))
        ratio = np.exp(y[60:]).mean() / np.exp(x[60:]).mean()
        assert abs(np.log(ratio)) < 0.35

    def test_a_click_becomes_the_decay(self):
        x = np.full((60, MELS), -30, dtype=np.float32)
        x[10] = 5.0
        decay = np.linspace(0, -8, 20)[:, None] + np.zeros(MELS)
        y = reverberate(x, decay.astype(np.float32))
        np.testing.assert_allclose(y[10:30] - y[10], decay, atol=1e-3)
        assert (y[:10] < -25).all(), "nothing before it, nothing wraps round"
        assert (y[31:] < -12).all()

    def test_longer_than_the_crop(self):
        y = reverberate(crop(10), np.linspace(0, -5, 300)[:, None] + np.zeros(MELS))
        assert y.shape == (10, MELS) and np.isfinite(y).all()

    def test_the_task_reads_rooms_relative_to_an_impulse(self, tmp_path):
        pytest.importorskip("fairseq")
        from fairseq_ext.speaker.task import read_collection, relative_rooms

        impulse = np.zeros(4000, dtype=np.float32)
        impulse[800] = 0.25
        soundfile.write(tmp_path / "flat.wav", impulse, RATE, subtype="FLOAT")
        (found,) = relative_rooms(read_collection(str(tmp_path), SPEC), SPEC)
        loudest = found[found.sum(1).argmax()]
        np.testing.assert_allclose(loudest, 2 * np.log(0.25), atol=1e-3)
        assert read_collection(None, SPEC) == []


class TestSpeed:
    @pytest.mark.parametrize("factor", [0.9, 1.1, 1.2])
    def test_a_tone_moves_as_when_resampled(self, factor):
        seconds, tone = 1.5, 1500.0
        t = np.arange(int(seconds * RATE)) / RATE
        x = log_mel(0.1 * np.sin(2 * np.pi * tone * t).astype(np.float32), SPEC)
        fast = log_mel(0.1 * np.sin(2 * np.pi * tone * factor * t).astype(np.float32), SPEC)
        frames = int((len(x) - 1) / factor) - 2
        found = change_speed(x, factor, frames, FREQUENCIES)
        assert found.shape == (frames, MELS) and found.dtype == np.float32
        middle = slice(5, frames - 5)
        expected = np.exp(fast[10]) @ FREQUENCIES / np.exp(fast[10]).sum()
        power = np.exp(found[middle])
        centre = power @ FREQUENCIES / power.sum(1)
        # half a band
        assert np.abs(centre - expected).max() < 0.5 * np.interp(
            expected, FREQUENCIES[1:], np.diff(FREQUENCIES)
        )

    @pytest.mark.parametrize("factor", [0.9, 1.1])
    def test_events_come_earlier_by_the_factor(self, factor):
        x = np.full((100, MELS), -10, dtype=np.float32)
        x[60] = 0
        found = change_speed(x, factor, int(99 / factor), FREQUENCIES)
        assert abs(int(found[:, 20].argmax()) - 60 / factor) <= 1

    @pytest.mark.parametrize("factor", [0.8, 0.95, 1.05, 1.3])
    def test_as_resampling_the_waveform(self, factor):
        """Noise with a smooth spectrum: mean level of each band within two decibels."""
        x = speech(6)
        fast = torchaudio.functional.resample(torch.tensor(x), round(100 * factor), 100).numpy()
        frames = int((len(x) // SPEC.hop_length) / factor) - 2
        found = change_speed(log_mel(x, SPEC), factor, frames, FREQUENCIES).mean(0)
        truth = log_mel(fast, SPEC).mean(0)
        # the highest bands have no source, or lie in the resampler's slope
        low = (FREQUENCIES < 5500) & (FREQUENCIES > 200)
        difference = (found - truth)[low] / DB
        assert np.abs(difference).max() < 2, difference

    def test_factor_of_one_is_the_identity(self):
        x = crop()
        assert np.array_equal(change_speed(x, 1, 50, FREQUENCIES), x[:50])
        np.testing.assert_allclose(change_speed(x, 1 + 1e-9, 50, FREQUENCIES), x[:50], atol=1e-4)

    def test_short_source_repeats_its_end(self):
        y = change_speed(crop(1), 1.1, 5, FREQUENCIES)
        assert np.array_equal(y, np.broadcast_to(y[:1], y.shape)) and np.isfinite(y).all()


@pytest.mark.parametrize("n_mels", [40, 80])
def test_mel_frequencies_are_the_peaks_of_torchaudios_filters(n_mels):
    from torchaudio.functional import melscale_fbanks

    bins = 20001
    filters = melscale_fbanks(bins, 50.0, 8000.0, n_mels, 16000).numpy()
    peaks = filters.argmax(0) * 8000 / (bins - 1)
    np.testing.assert_allclose(mel_frequencies(n_mels, 50.0, 8000.0), peaks, atol=1.0)


class TestBuild:
    def test_order_and_options(self):
        steps = build_augmentation(" channel:gain_db=0,tilt=0 ; specaugment:freq_masks=1 ;")
        assert len(steps) == 2
        ctx, x = context(), crop()
        rng, by_hand = np.random.default_rng(4), np.random.default_rng(4)
        found = x
        for step in steps:
            found = step(found, rng, ctx)
        expected = AUGMENTATIONS.get("channel")(x, by_hand, ctx, gain_db=0.0, tilt=0.0)
        expected = AUGMENTATIONS.get("specaugment")(expected, by_hand, ctx, freq_masks=1)
        assert np.array_equal(found, expected)

    @pytest.mark.parametrize("nothing", ["", None, " ", ";"])
    def test_nothing(self, nothing):
        assert build_augmentation(nothing) == []

    @pytest.mark.parametrize(
        "pipeline, message",
        [
            (
                "specaugmnt",
                "did you mean 'specaugment'.*channel, codec, noise, reverb, specaugment",
            ),
            ("xyzzy", "known: bandwidth, channel, codec, noise, reverb, specaugment"),
            ("channel:gain=3", "did you mean 'gain_db'"),
            ("channel:gain_db=loud", "gain_db"),
            ("channel:gain_db", "key=value"),
            ("specaugment:freq_masks=1.5", "freq_masks"),
            ("channel,specaugment", "unknown augmentation"),
            ("channel:tilt=1", "tilt"),
            ("specaugment:time_fraction=2", "time_fraction"),
            ("specaugment:freq_masks=-1", "freq_masks"),
            ("noise:p=50", "p 50"),
            ("noise:snr_low=20,snr_high=5", "snr_low"),
        ],
    )
    def test_mistakes_are_told_in_words(self, pipeline, message):
        with pytest.raises(UserError, match=message):
            build_augmentation(pipeline)


def test_global_generators_are_left_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    run(";".join(EVERY), crop(), 0, context(**FULL))
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_steps_travel_to_a_loading_worker():
    """A spawned worker gets its dataset pickled."""
    steps = build_augmentation("channel:gain_db=3;specaugment:freq_masks=1")
    again = pickle.loads(pickle.dumps(steps))
    assert [step.keywords for step in again] == [step.keywords for step in steps]


# --- bandwidth --------------------------------------------------------------------------------


def test_a_narrowed_crop_is_like_audio_that_was_once_at_8_khz():
    from fairseq_ext.speaker.features import resample

    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(32000)).astype(np.float32)
    spec = FeatureSpec()
    wide = log_mel(samples, spec)
    narrow = log_mel(resample(resample(samples, 16000, 8000), 8000, 16000), spec)
    about = context()
    step = build_augmentation("bandwidth:p=1,telephone=0")[0]
    low, high = about.frequencies < 3000, about.frequencies > 5300
    for seed in range(20):
        got = step(wide, np.random.default_rng(seed), about)
        assert got.dtype == np.float32 and got.shape == wide.shape and np.isfinite(got).all()
        np.testing.assert_allclose(got[:, low], wide[:, low], atol=1e-5)
        # both are more than 40 dB below what was there
        for found in (got, narrow):
            assert (wide[:, high] - found[:, high]).min() > np.log(10) / 10 * 30
        assert got.min() >= about.floor


def test_a_telephone_begins_at_300_hz_and_p_is_a_share():
    about = context()
    x = np.zeros((5, 40), np.float32)
    step = build_augmentation("bandwidth:p=0.25,telephone=1")[0]
    found = [step(x, np.random.default_rng(seed), about) for seed in range(400)]
    changed = [y for y in found if y is not x]
    assert 70 <= len(changed) <= 130
    assert all((y[:, 0] < -2).all() for y in changed), "below 100 Hz at least 10 dB are gone"
    band = (about.frequencies > 300) & (about.frequencies < 3400)
    assert all((y[:, band] == 0).all() for y in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_does_to_features_what_it_does_to_audio(kind, monkeypatch):
    """The features of speech that went through it, band by band, from those of the speech alone."""
    samples = speech(1.5)
    x = log_mel(samples, SPEC)
    for level in (0.3, 0.95):
        if KINDS[kind][2] is not None:
            monkeypatch.setitem(KINDS, kind, (*KINDS[kind][:2], (level, level)))
        there = log_mel(through(samples, RATE, kind, level if KINDS[kind][2] else None), SPEC) - x
        found = run(f"codec:p=1,kinds={kind}", x) - x
        difference = (found - there)[3:-3].mean(0) / DB
        assert np.abs(difference).mean() < 0.6 and np.abs(difference).max() < 4
    if kind == "mp3":
        assert there[3:-3].mean(0).min() < -20 * DB, "it drops bands, or nothing is tested"


def test_u_law_leaves_its_noise_where_nothing_was():
    """White, 6.02 · 8 + 4.77 − 20 log10 ln 256 = 38.05 dB below the signal (Smith 1957)."""
    band = np.arange(MELS) < 20
    x = np.where(band, 0, FLOOR).astype(np.float32) + np.zeros((60, 1), np.float32)
    y = run("codec:p=1,kinds=ulaw", x)
    assert np.abs((y - x)[:, band]).mean() < 0.2 * DB
    # the signal fills as many bins as its triangles, the noise all 201
    widths = mel_bands(SPEC).sum(0)
    density = np.exp(x[0].astype(float))[band].sum() / widths[band].sum()
    noise = density * widths[24:] * 10**-3.805 * widths[band].sum() / 201
    np.testing.assert_allclose(y[:, 24:].mean(0) / DB, np.log(noise) / DB, atol=2)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_its_colour(exponent):
    noise = coloured(1 << 17, exponent, np.random.default_rng(0))
    assert noise.std() == pytest.approx(1, rel=1e-3)
    power = np.abs(np.fft.rfft(noise.astype(float))) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
    octaves = [100 * 2**k for k in range(6)]
    levels = [power[(hertz >= f) & (hertz < 2 * f)].mean() for f in octaves]
    slope = np.polyfit(np.log2(octaves), np.log2(levels), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.08)


def test_babble_is_the_mean_of_powers_of_equally_loud_voices():
    a, b = crop(50, 1), crop(50, 2)
    np.testing.assert_allclose(babble([a]), a, atol=1e-5)
    np.testing.assert_allclose(np.diff(babble([a, a + 3]), axis=0), np.diff(a, axis=0), atol=1e-4)
    power = np.exp(babble([a, b]).astype(float))
    scaled = [np.exp(v.astype(float)) / np.exp(v.astype(float)).mean() for v in (a, b)]
    np.testing.assert_allclose(power / power.mean(), (scaled[0] + scaled[1]) / 2, rtol=1e-4)


@pytest.mark.parametrize("decay, ratio", [(0.25, -2.0), (0.7, 10.0)])
def test_a_room_decays_as_asked(decay, ratio):
    h = room(RATE, decay, ratio, np.random.default_rng(0)).astype(float)
    direct = int(h.argmax()) if ratio > 0 else 800
    assert h[direct] == 1 and not h[:direct].any()
    tail = h[direct + 1 :]
    assert 10 * np.log10(1 / np.square(tail).sum()) == pytest.approx(ratio, abs=0.01)
    # energy that is still to come (Schroeder 1965), as a straight line in dB
    left = 10 * np.log10(np.cumsum(np.square(tail)[::-1])[::-1])
    t = np.arange(len(tail)) / RATE
    used = (t > 0.01) & (t < 0.6 * decay)
    assert np.polyfit(t[used], left[used], 1)[0] == pytest.approx(-60 / decay, rel=0.12)
