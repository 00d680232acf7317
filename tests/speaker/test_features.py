import math
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ext_common.cli import UserError
from fairseq_ext.speaker.audio import recording as audio
from fairseq_ext.speaker.features import (
    BLOCK_FRAMES,
    AudioError,
    FeatureSpec,
    Recording,
    audio_features,
    load_audio,
    log_mel,
    resample,
    set_loudness,
    trim_silence,
)

RATE = 16000
SPEC = FeatureSpec()


def noise(samples, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def tone(hertz, samples, rate=RATE, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


def mel_edges(spec):
    """HTK mel scale: n_mels + 2 points, equally spaced in mel."""
    points = np.linspace(mel(spec.f_min), mel(spec.sample_rate / 2), spec.n_mels + 2)
    return 700 * (10 ** (points / 2595) - 1)


def oracle(waveform, spec):
    """Log-mel features written out in numpy, float64: the DFT and the triangles by definition."""
    n = spec.n_fft
    window = np.zeros(n)
    left = (n - spec.win_length) // 2
    steps = np.arange(spec.win_length)
    window[left : left + spec.win_length] = 0.5 - 0.5 * np.cos(2 * np.pi * steps / spec.win_length)
    padded = np.pad(waveform.astype(np.float64), n // 2, mode="reflect")
    starts = range(0, len(padded) - n + 1, spec.hop_length)
    frames = np.stack([padded[s : s + n] * window for s in starts])
    bins = np.arange(n // 2 + 1)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n), bins) / n)
    power = np.abs(frames @ dft) ** 2
    hertz = bins * spec.sample_rate / n
    edges = mel_edges(spec)
    bank = np.zeros((len(bins), spec.n_mels))
    for m in range(spec.n_mels):
        low, centre, high = edges[m : m + 3]
        rise, fall = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
        bank[:, m] = np.clip(np.minimum(rise, fall), 0, None)
    return np.log(np.maximum(power @ bank, spec.floor))


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        FeatureSpec(n_mels=80, n_fft=512),
        FeatureSpec(sample_rate=8000, n_fft=256, win_length=200, hop_length=80, f_min=20.0),
    ],
)
@pytest.mark.parametrize("samples", [401, 1600, 7123])
def test_log_mel_equals_an_independent_implementation(spec, samples):
    waveform = noise(samples) + tone(700, samples)
    got = log_mel(waveform, spec)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, oracle(waveform, spec), atol=1e-3)


def test_silence_is_the_logarithm_of_the_floor():
    assert (log_mel(np.zeros(3200), SPEC) == np.float32(math.log(1e-9))).all()
    assert math.isclose(math.log(1e-9), -20.7233, abs_tol=1e-4)


@pytest.mark.parametrize("hertz", [300, 1000, 3000, 6500])
def test_a_tone_is_loudest_in_the_band_that_weighs_it_most(hertz):
    edges = mel_edges(SPEC)
    rise = (hertz - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - hertz) / np.diff(edges)[1:]
    band = np.minimum(rise, fall).argmax()
    got = log_mel(tone(hertz, RATE), SPEC)
    assert (got[5:-5].argmax(axis=1) == band).all()


@pytest.mark.parametrize("samples", [1, 100, 159, 160, 200, 201, 319, 320, 1600, 16000])
def test_number_of_frames(samples):
    got = log_mel(noise(samples), SPEC)
    assert got.shape == (1 + samples // 160, 40)
    assert np.isfinite(got).all()


def test_no_samples_raise():
    with pytest.raises(ValueError, match=r"\(0,\)"):
        log_mel(np.zeros(0), SPEC)


def test_a_long_recording_in_blocks_equals_torchaudio_in_one_piece():
    import torch
    from torchaudio.transforms import MelSpectrogram

    samples = 160 * (2 * BLOCK_FRAMES + 17) + 55
    waveform = noise(samples)
    transform = MelSpectrogram(
        RATE, n_fft=400, win_length=400, hop_length=160, f_min=50.0, n_mels=40, power=2.0
    )
    whole = transform(torch.from_numpy(waveform)).clamp(min=1e-9).log().T.numpy()
    np.testing.assert_allclose(log_mel(waveform, SPEC), whole, atol=1e-4)


def test_empty_mel_bands_are_refused_with_a_remedy():
    with pytest.raises(UserError, match="--n-fft"):
        log_mel(noise(1600), FeatureSpec(n_mels=300))


def test_loudness_is_the_rms_it_says():
    scaled = set_loudness(noise(16000), -27.0)
    assert 20 * math.log10(math.sqrt(np.mean(np.square(scaled, dtype=np.float64)))) == (
        pytest.approx(-27.0, abs=1e-4)
    )
    np.testing.assert_array_equal(set_loudness(np.zeros(100, np.float32), -27.0), np.zeros(100))
    spec = FeatureSpec(loudness_db=-27.0)
    np.testing.assert_allclose(
        log_mel(noise(8000), spec), log_mel(noise(8000) * 0.03, spec), atol=1e-3
    )


def test_silence_is_trimmed_at_the_ends_and_kept_inside():
    quiet = np.zeros(8000, np.float32)
    loud = tone(440, 4000)
    signal = np.concatenate([quiet, loud, quiet, loud, quiet])
    trimmed = trim_silence(signal, RATE)
    # One window of 25 ms may reach over each edge.
    assert 16000 <= len(trimmed) <= 16000 + 2 * 400
    first = 8000 - trimmed_offset(signal, trimmed)
    assert 0 <= first <= 400
    np.testing.assert_array_equal(trim_silence(quiet, RATE), quiet)
    everything = tone(440, 16000)
    np.testing.assert_array_equal(trim_silence(everything, RATE), everything)


def trimmed_offset(signal, part):
    starts = np.flatnonzero(signal)[0] - np.arange(401)
    return next(s for s in starts if np.array_equal(signal[s : s + len(part)], part))


def test_the_specification_decides_trimming_and_loudness():
    signal = np.concatenate([np.zeros(16000, np.float32), tone(440, 8000)])
    assert len(log_mel(signal, FeatureSpec(trim_silence=True))) < 60 < len(log_mel(signal, SPEC))


def test_resampling_keeps_a_tone_and_its_length():
    for rate in (8000, 22050, 44100, 48000):
        got = resample(tone(1000, rate, rate), rate, RATE)
        assert len(got) == RATE
        np.testing.assert_allclose(got[2000:-2000], tone(1000, RATE)[2000:-2000], atol=5e-3)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    got = resample(tone(10000, 48000, 48000), 48000, RATE)
    assert np.abs(got[1000:-1000]).max() < 0.01


def test_a_rate_without_common_divisor_is_refused_before_it_eats_the_memory():
    with pytest.raises(AudioError, match="15999 Hz"):
        resample(noise(100), 15999, RATE)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_a_cut_equals_that_part_of_the_whole(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, noise(5 * RATE), RATE)
    whole = load_audio(path, RATE)
    cut = load_audio(path, RATE, 1.25, 3.5)
    np.testing.assert_array_equal(cut, whole[20000:56000])
    np.testing.assert_array_equal(audio_features(path, SPEC, 1.25, 3.5), log_mel(cut, SPEC))
    np.testing.assert_array_equal(load_audio(path, RATE, start=4.5), whole[72000:])
    np.testing.assert_array_equal(load_audio(path, RATE, end=0.5), whole[:8000])


@pytest.mark.parametrize("ending", ["flac", "mp3"])
def test_several_cuts_of_one_open_recording(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(audio, "DECODE_SAMPLES", 7001)
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, noise(5 * RATE), RATE)
    whole = load_audio(path, RATE)
    with Recording(path) as recording:
        for start, end in [(0.5, 1.0), (1.0, 2.0), (3.25, 4.0), (2.0, 3.5), (0.0, 5.0)]:
            expected = whole[round(start * RATE) : round(end * RATE)]
            np.testing.assert_array_equal(recording.read(start, end), expected)


def test_channels_are_averaged(tmp_path):
    left, right = noise(4000, 1), noise(4000, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", RATE), (left + right) / 2, atol=1e-7)


def test_an_end_rounded_up_by_a_hundredth_is_the_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(RATE + 30), RATE)
    assert len(load_audio(tmp_path / "a.wav", RATE, 0.5, 1.01)) == RATE + 30 - 8000


def bad_files(folder):
    nan = noise(4000)
    nan[7] = np.nan
    soundfile.write(folder / "nan.wav", nan, RATE, subtype="FLOAT")
    soundfile.write(folder / "empty.wav", noise(0), RATE)
    (folder / "bytes.wav").write_bytes(b"")
    (folder / "text.wav").write_text("hello\n")
    soundfile.write(folder / "whole.flac", noise(40000), RATE)
    content = (folder / "whole.flac").read_bytes()
    (folder / "half.flac").write_bytes(content[: len(content) // 2])
    soundfile.write(folder / "whole.mp3", noise(400000), RATE)
    content = (folder / "whole.mp3").read_bytes()
    (folder / "half.mp3").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nan.wav", "nan"),
        ("empty.wav", "empty"),
        ("bytes.wav", "empty"),
        ("text.wav", "corrupt"),
        ("half.flac", "corrupt"),
        ("half.mp3", "corrupt"),
        ("absent.wav", "corrupt"),
    ],
)
def test_unusable_audio_is_named_with_a_reason(tmp_path, name, reason):
    bad_files(tmp_path)
    with pytest.raises(AudioError, match=name) as caught:
        load_audio(tmp_path / name, RATE)
    assert caught.value.reason == reason
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("start, end", [(0.5, 1.5), (2.0, 3.0), (0.5, 0.5), (-1.0, 0.5)])
def test_a_cut_outside_the_recording_is_refused(tmp_path, start, end):
    soundfile.write(tmp_path / "a.wav", noise(RATE), RATE)
    with pytest.raises(AudioError) as caught:
        load_audio(tmp_path / "a.wav", RATE, start, end)
    assert caught.value.reason == "cut"


def test_the_specification_survives_json_and_refuses_nonsense():
    spec = FeatureSpec(n_mels=80, loudness_db=-27.0, trim_silence=True)
    assert FeatureSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(UserError, match="dither"):
        FeatureSpec.from_dict(spec.to_dict() | {"dither": 1})
    for wrong in ({"n_mels": 0}, {"f_min": 9000.0}, {"win_length": 500}, {"loudness_db": 3.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FeatureSpec(**wrong)


def test_reading_features_needs_neither_torch_nor_fairseq():
    code = (
        "import sys, fairseq_ext.speaker.corpus, fairseq_ext.speaker.prepare;"
        "sys.exit(','.join({'torch', 'torchaudio', 'fairseq'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_real_recording_at_8_khz(shared_data):
    path = shared_data / "fsdd" / "0_george_0.wav"
    samples = load_audio(path, RATE)
    assert soundfile.info(path).samplerate == 8000
    assert len(samples) == 2 * soundfile.info(path).frames
    got = audio_features(path, SPEC)
    assert got.shape == (1 + len(samples) // 160, 40)
    # Nothing above the old half rate of 4 kHz: bands from there on are far below the loudest.
    upper = mel_edges(SPEC)[:-2] > 4300
    assert (got[:, ~upper].max() - got[:, upper].max()) > 6
