"""Of every format all of the audio, or a sentence; never less in silence."""

import io

import numpy as np
import pytest
import soundfile

from fairseq_ext.speaker.audio.containers import AudioError, mp3_frames
from fairseq_ext.speaker.audio.recording import load_audio

RATE = 16000
SECONDS = 4
FORMATS = {
    "wav": {},
    "flac": {},
    "ogg": {},
    "mp3": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
    "au": {"subtype": "PCM_16"},
    "caf": {},
    "w64": {},
    "rf64": {"format": "RF64"},
    "voc": {"subtype": "PCM_16"},
    "nist": {"format": "NIST", "subtype": "PCM_16"},
}


@pytest.fixture(scope="module")
def samples():
    """Quiet, then loud: a variable bitrate, whose first frame says nothing of the rest."""
    rng = np.random.default_rng(0)
    half = SECONDS * RATE // 2
    noise = rng.standard_normal(2 * half) * np.repeat([0.0003, 0.2], half)
    return noise.astype(np.float32)


@pytest.fixture(scope="module")
def content(samples, tmp_path_factory):
    """{ending: bytes of the file}."""
    folder, found = tmp_path_factory.mktemp("formats"), {}
    for ending, options in FORMATS.items():
        soundfile.write(folder / f"a.{ending}", samples, RATE, **options)
        found[ending] = (folder / f"a.{ending}").read_bytes()
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.4}
    soundfile.write(folder / "vbr.mp3", samples, RATE, **options)
    found["vbr"] = (folder / "vbr.mp3").read_bytes()
    return found


def read(data):
    return load_audio(io.BytesIO(data), RATE)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_is_read_whole_and_refused_where_it_was_cut_or_doubled(ending, content, samples):
    data = content[ending]
    assert len(read(data)) == len(samples)
    for broken in (data[: len(data) * 2 // 3], data[:-40]):
        with pytest.raises(AudioError) as caught:
            read(broken)
        assert caught.value.reason == "corrupt"
    if ending != "mp3":
        with pytest.raises(AudioError) as caught:
            read(data + data)
        assert caught.value.reason == "corrupt"


def test_an_mp3_without_a_length_and_several_in_one_are_read_whole(content, samples):
    data, per_frame = content["vbr"], 576
    frames = list(mp3_frames(data))
    assert frames[0].samples == per_frame and frames[-1].start + frames[-1].size == len(data)
    without = data[frames[1].start :]
    # the decoder itself estimates it from the first frame
    assert soundfile.info(io.BytesIO(without)).frames < 0.6 * len(samples)
    whole = read(data)
    # without the tag nobody says how long the encoder's delay is, or what fills the last frame
    room = 4 * 1152
    for several, times in ((without, 1), (data + data, 2), (data + b"TAG" + bytes(125) + data, 2)):
        got = read(several)
        assert times * len(samples) <= len(got) <= times * (len(samples) + room)
        # the same audio is found again, at its place behind the delay
        part = whole[40000:41000]
        end = got[-len(samples) - room :]
        match = np.correlate(end, part, "valid")
        place = int(match.argmax())
        np.testing.assert_allclose(end[place : place + 1000], part, atol=1e-4)


def test_a_guess_that_is_too_long_is_no_promise(samples, tmp_path):
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.4}
    quiet = samples * (np.arange(len(samples)) > len(samples) // 2)
    soundfile.write(tmp_path / "a.mp3", quiet.astype(np.float32), RATE, **options)
    data = (tmp_path / "a.mp3").read_bytes()
    second = list(mp3_frames(data))[1].start
    assert soundfile.info(io.BytesIO(data[second:])).frames > 2 * len(samples)
    assert len(samples) <= len(read(data[second:])) <= len(samples) + 4 * 1152


def test_an_mp3_whose_rate_changes_is_refused(content, tmp_path):
    soundfile.write(tmp_path / "b.mp3", np.zeros(48000, np.float32), 48000)
    with pytest.raises(AudioError, match="rate or the number of channels changes"):
        read(content["vbr"] + (tmp_path / "b.mp3").read_bytes())


def test_a_wav_and_a_flac_that_were_written_to_a_pipe_are_read_whole(content, tmp_path):
    wav, expected = content["wav"], read(content["wav"])
    assert wav[36:40] == b"data"
    for size in (b"\0" * 4, b"\xff" * 4):
        data = wav[:4] + size + wav[8:40] + size + wav[44:]
        (tmp_path / "a.wav").write_bytes(data)
        np.testing.assert_array_equal(read(data), expected)
        np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE, 1.0), expected[RATE:])
    flac = bytearray(content["flac"])
    # STREAMINFO: the 36 bits of the number of samples
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    np.testing.assert_array_equal(read(bytes(flac)), read(content["flac"]))


def test_a_wav_of_no_samples_is_empty_whatever_follows(content):
    head = content["wav"][:40] + bytes(4)
    for rest in (b"", b"LIST\x04\0\0\0INFO"):
        with pytest.raises(AudioError) as caught:
            read(head + rest)
        assert caught.value.reason == "empty"


@pytest.mark.parametrize("rate", [1, 3999, 800_000])
def test_absurd_rates_are_refused_by_the_limits(content, rate):
    data = content["wav"]
    with pytest.raises(AudioError, match="from 4000 to 768000"):
        read(data[:24] + rate.to_bytes(4, "little") + data[28:])
