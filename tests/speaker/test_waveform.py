"""A long recording read in stretches, against the same read whole."""

import numpy as np
import pytest
import soundfile

from ext_common.cli import UserError
from fairseq_ext.speaker import features, inference
from fairseq_ext.speaker.audio import recording
from fairseq_ext.speaker.audio.recording import Recording, resample
from fairseq_ext.speaker.audio.waveform import Waveform
from fairseq_ext.speaker.export.frontend import PlainSpec
from fairseq_ext.speaker.features import FeatureSpec, LongFeatures, hear, listen
from fairseq_ext.speaker.inference.chunks import forward_long

SPEC = FeatureSpec()


def write(folder, name, rate, channels, seconds=1.9):
    rng = np.random.default_rng(rate)
    x = 0.1 * rng.standard_normal(round(seconds * rate))
    both = np.stack([x, -1.2 * x if channels == "inverted" else 0.5 * x], 1)
    soundfile.write(folder / name, x if channels == "mono" else both, rate)
    return folder / name


@pytest.mark.parametrize(
    "name, rate, channels",
    [
        ("x.wav", 16000, "mono"),
        ("x.flac", 16000, "inverted"),
        ("x.wav", 44100, "two"),
        ("x.wav", 8000, "inverted"),
        ("x.mp3", 16000, "mono"),
        ("x.mp3", 44100, "inverted"),
    ],
)
def test_stretches_are_those_of_the_whole(tmp_path, monkeypatch, name, rate, channels):
    monkeypatch.setattr(recording, "DECODE_SAMPLES", 7001)
    path = write(tmp_path, name, rate, channels)
    with Recording(path) as one, Recording(path) as other:
        whole = hear(one, SPEC)
        samples = resample(whole.samples, rate, SPEC.sample_rate)
        found = Waveform(other, SPEC.sample_rate)
        made = LongFeatures(found, SPEC)
        assert (len(found), len(made)) == (len(samples), len(whole.features))
        assert (min(found.survey.hertz, 8000), found.survey.said) == (whole.hertz, whole.said)
        n, frames = len(samples), len(made)
        for a, b in [(0, 1), (0, 399), (1, 2), (5000, 12345), (n - 1, n), (n - 500, n), (7, 3000)]:
            np.testing.assert_allclose(found[a:b], samples[a:b], atol=1e-6)
        for a, b in [
            (0, 1),
            (0, 60),
            (1, 40),
            (33, 90),
            (frames - 1, frames),
            (frames - 3, frames),
        ]:
            np.testing.assert_allclose(made[a:b], whole.features[a:b], atol=2e-3)
        np.testing.assert_allclose(made[:], whole.features, atol=2e-3)
        plain = PlainSpec.from_dict(SPEC.to_dict()).stretches(found)
        np.testing.assert_allclose(plain[30:50], whole.features[30:50], atol=2e-3)


def test_what_is_longer_than_a_chunk_is_never_held(tiny_checkpoint, tmp_path, monkeypatch):
    path = write(tmp_path, "x.wav", 16000, "inverted", 4)
    model = inference.SpeakerModel.from_checkpoint(tiny_checkpoint)
    whole = model.embed(path)
    for module in (features, inference):
        monkeypatch.setattr(module, "CHUNK_FRAMES", 100)
    monkeypatch.setattr(forward_long, "__defaults__", (100, "cpu"))
    monkeypatch.setattr(recording, "DECODE_SAMPLES", 8000)
    read, decode = [], Recording.decode
    monkeypatch.setattr(
        Recording, "decode", lambda self, a, b: read.append(b - a) or decode(self, a, b)
    )
    found = model.embed([path, np.ones((30, 40), np.float32), path])
    assert max(read) <= 101 * 160 + 400 and sum(read) > 4 * 64000
    np.testing.assert_array_equal(found[0], found[2])
    assert found[0] @ whole / np.linalg.norm(found[0]) / np.linalg.norm(whole) > 0.999
    with Recording(write(tmp_path, "s.wav", 16000, "mono", 0.5)) as short:
        np.testing.assert_array_equal(listen(short, SPEC).features, model._features(short._source))


def test_long_recordings_of_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK_FRAMES", 50)
    rng = np.random.default_rng(0)
    spoilt = 0.1 * rng.standard_normal((16000, 2))
    spoilt[8000, 1] = np.nan
    for content, why in ((np.full(16000, 0.25), "all samples are 0.25"), (spoilt, "holds NaN")):
        soundfile.write(tmp_path / "x.wav", content, 16000, subtype="FLOAT")
        with pytest.raises(UserError, match=why):
            listen(Recording(tmp_path / "x.wav"), SPEC)
    assert len(listen(Recording(tmp_path / "x.wav", "left"), SPEC).features) == 101


def test_a_mean_over_the_whole_is_taken_in_pieces():
    from fairseq_ext.speaker.inference.chunks import mean_frame

    x = np.random.default_rng(0).normal(3, 1, (101, 4)).astype(np.float32)
    np.testing.assert_allclose(mean_frame(x, 20), x.astype(np.float64).mean(0), rtol=1e-6)
