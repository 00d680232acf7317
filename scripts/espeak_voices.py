"""Recordings of synthetic speakers, spoken by eSpeak NG from the wheel espeakng-loader.

python scripts/espeak_voices.py DEST

Writes DEST/<speaker>/<split>-<number>.wav and DEST/metadata.csv (path, speaker, split, text), which
`python -m fairseq_ext.speaker.prepare DEST DATA --layout csv` reads. A speaker is a voice variant,
an accent, a pitch and a speed. train, valid and test hold different sentences, so that a model
cannot remember what is said; each recording has its own loudness, mood and background noise. These
are machine voices: figures on them say nothing about real speech. The same command writes the same
bytes.
"""

import csv
import ctypes
import io
import json
import multiprocessing
import os
import shutil
import tempfile
import wave
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import atomic_json, atomic_write, write_manifest

# Two accents of each variant: what tells such a pair apart is how they speak, not the spectrum.
VARIANTS = {
    "m1": 42, "m2": 50, "m3": 46, "m4": 55, "m7": 50, "m8": 60, "max": 52, "robert": 45,
    "f1": 46, "f2": 42, "f3": 52, "f4": 58,
}  # fmt: skip
ACCENTS = {"us": "en-us", "gb": "en", "sc": "en-gb-scotland", "nyc": "en-us-nyc"}
PAIRS = (("us", "sc"), ("gb", "nyc"))

SENTENCES = {
    "train": [
        "The ferry to the island leaves at a quarter past nine.",
        "She keeps her old letters in a green wooden box.",
        "Nobody noticed that the clock had stopped again.",
        "We planted three apple trees behind the school.",
        "He whistled all the way home through the rain.",
        "Could you pass me the blue cup on the left?",
        "The village baker gets up long before sunrise.",
        "My grandmother taught me how to mend a fishing net.",
        "A thin layer of ice covered the pond this morning.",
        "They argued about the price of the yellow carpet.",
        "Our train was delayed because a cow stood on the track.",
        "Put the heavy books on the bottom shelf, please.",
        "The orchestra tuned while the audience found their seats.",
        "Every summer the twins build a raft of empty barrels.",
        "What a strange colour for a garden gate!",
        "I would rather walk than wait for another bus.",
        "The museum is closed on Mondays and public holidays.",
        "Fresh snow makes even a car park look peaceful.",
        "He measured the window twice and cut the glass once.",
        "Please write your name and address on the second page.",
    ],
    "valid": [
        "The cat watched the washing machine for an hour.",
        "Turn right after the bridge and follow the river.",
        "Her brother sells used bicycles near the harbour.",
        "It takes about ten minutes to boil the potatoes.",
    ],
    "test": [
        "A flock of geese flew low over the empty fields.",
        "Who left the kitchen light on all night?",
        "The doctor asked him to breathe in slowly.",
        "Two small dogs were chasing each other around the fountain.",
        "We cannot see the mountains from here in winter.",
        "Her first job was painting numbers on boats.",
        "This key opens the shed but not the front door.",
        "The lecture starts at eight, so bring some coffee.",
        "An owl has been living in the church tower for years.",
        "Just leave the parcel with the neighbours downstairs.",
    ],
}


@dataclass
class VoicesOptions:
    """How many speakers, and how far the recordings of one differ."""

    speakers: int = field(default=24, metadata={"help": "how many speakers, 2 to 24"})
    snr_low: float = field(default=4.0, metadata={"help": "lowest speech-to-noise ratio (dB)"})
    snr_high: float = field(default=20.0, metadata={"help": "highest speech-to-noise ratio (dB)"})
    mood: float = field(
        default=12.0,
        metadata={"help": "how far a speaker's pitch and speed vary, uniform in ± this (percent)"},
    )
    seed: int = field(default=1, metadata={"help": "of loudness, mood and noise"})

    def __post_init__(self):
        if not 2 <= self.speakers <= 2 * len(VARIANTS):
            raise ValueError(f"speakers must lie in 2 to {2 * len(VARIANTS)}, got {self.speakers}")
        if self.snr_low > self.snr_high:
            raise ValueError(f"snr_low {self.snr_low} is above snr_high {self.snr_high}")
        if not 0 <= self.mood <= 50:
            raise ValueError(f"mood {self.mood} must lie in 0 to 50 percent")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")


class Speaker(NamedTuple):
    """name; voice: eSpeak's, as accent+variant; pitch: 0 to 99; speed: words a minute."""

    name: str
    voice: str
    pitch: int
    speed: int


def main(argv):
    """The command."""
    parser = Parser(prog="python scripts/espeak_voices.py", description=__doc__)
    parser.add_argument("dest", metavar="DEST", help="folder to write")
    parser.add_argument(
        "--workers", type=int, metavar="INT", help="processes (default: one for each CPU)"
    )
    add_dataclass(parser, VoicesOptions)
    args = parser.parse_args(argv)
    make_recordings(Path(args.dest), from_args(VoicesOptions, args), args.workers)


def make_recordings(dest, options, workers=None):
    """Write all recordings to `dest` (a new folder), whole or not at all. Raises UserError."""
    cast = speakers()[: options.speakers]
    plan = {"options": asdict(options), "speakers": [list(s) for s in cast], "text": SENTENCES}
    if dest.exists():
        if stored_plan(dest) != plan:
            raise UserError(f"{dest} holds something else: give a new folder, or remove it first")
        print(f"{dest} has these recordings already: nothing to do")
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    for leftover in dest.parent.glob(f".{dest.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
    part.chmod(0o755)
    try:
        rows, samples = speak_all(part, cast, options, workers)
        with atomic_write(part / "metadata.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "speaker", "split", "text"])
            writer.writerows(rows)
        atomic_json(part / "plan.json", plan)
        counts = {"speakers": len(cast), "recordings": len(rows)}
        write_manifest(part, inputs={}, counts=counts, options=asdict(options), seed=options.seed)
        os.replace(part, dest)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    rate = EspeakVoice.sample_rate
    print(
        f"{dest}: {len(rows)} recordings of {len(cast)} synthetic speakers, "
        f"{samples / rate / 60:.0f} minutes"
    )


def stored_plan(dest):
    """The plan of an earlier run, None where there is none."""
    try:
        return json.loads((dest / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def speak_all(folder, cast, options, workers=None):
    """(rows of the table, samples written)."""
    rows, samples = [], 0
    workers = min(workers or len(os.sched_getaffinity(0)), len(cast))
    # eSpeak's noise and flutter carry over from one utterance to the next: each speaker gets a
    # process of its own, so that the bytes do not hang on who spoke before.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        tasks = [(folder, speaker, options) for speaker in cast]
        spoken = pool.imap(speak_one, tasks)
        for written, length in progress(spoken, "speaking", "speakers", total=len(cast)):
            rows += written
            samples += length
    return rows, samples


def speak_one(task):
    """All sentences of one speaker; (rows, samples written)."""
    folder, speaker, options = task
    voice = EspeakVoice(speaker.voice)
    rng = np.random.default_rng([options.seed, zlib.crc32(speaker.name.encode())])
    rows, samples = [], 0
    (folder / speaker.name).mkdir()
    for split, sentences in SENTENCES.items():
        for number, text in enumerate(sentences):
            low, high = 1 - options.mood / 100, 1 + options.mood / 100
            pitch = round(speaker.pitch * rng.uniform(low, high))
            audio = voice.speak(text, pitch, round(speaker.speed * rng.uniform(low, high)))
            audio = recorded(audio, rng, options.snr_low, options.snr_high)
            path = f"{speaker.name}/{split}-{number:02}.wav"
            (folder / path).write_bytes(wav_bytes(audio, voice.sample_rate))
            rows.append((path, speaker.name, split, text))
            samples += len(audio)
    return rows, samples


class EspeakVoice:
    """One voice of eSpeak NG 1.52 through its C API (speak_lib.h); one at a time in a process."""

    sample_rate = 22050

    def __init__(self, name):
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "espeakng-loader is not installed: pip install 'espeakng-loader>=0.2.4', or "
                "bash scripts/setup.sh demo"
            ) from None
        self.chunks = []
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        # Kept: ctypes would free a callback that C still holds.
        self.callback = callback(self.receive)
        synchronous, do_not_exit = 2, 0x8000
        with short_path(espeakng_loader.get_data_path()) as data:
            rate = self.library.espeak_Initialize(synchronous, 0, os.fsencode(data), do_not_exit)
            if rate != self.sample_rate:
                raise UserError(f"eSpeak NG did not start with its data in {data} ({rate})")
            self.library.espeak_SetSynthCallback(self.callback)
            if self.library.espeak_SetVoiceByName(name.encode()) != 0:
                raise UserError(f"eSpeak NG has no voice {name}")
        # It seeds its generators by the clock.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        ctypes.CDLL(None).srand(1)
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def receive(self, samples, count, _events):
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text, pitch=50, speed=175):
        """int16 (n,) at 22050 Hz. pitch: 0 to 99; speed: 80 to 450 words a minute."""
        rate_parameter, pitch_parameter, utf8 = 1, 3, 1
        self.library.espeak_SetParameter(rate_parameter, speed, 0)
        self.library.espeak_SetParameter(pitch_parameter, pitch, 0)
        self.chunks.clear()
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        if not self.chunks:
            raise UserError(f"eSpeak NG said nothing for {text!r}")
        return np.concatenate(self.chunks)


class short_path:
    """Context: another name of a path that is longer than eSpeak's buffer (160 bytes, into which
    names of files are appended)."""

    def __init__(self, path):
        self.path, self.folder = path, None

    def __enter__(self):
        if len(os.fsencode(self.path)) < 120:
            return self.path
        self.folder = tempfile.TemporaryDirectory()
        name = os.path.join(self.folder.name, "espeak-ng-data")
        os.symlink(self.path, name)
        return name

    def __exit__(self, *_):
        if self.folder:
            self.folder.cleanup()


def speakers():
    """All speakers; men and women, accents and variants alternate, so that any number is mixed."""
    cast = []
    for index, (variant, pitch) in enumerate(VARIANTS.items()):
        for place, accent in enumerate(PAIRS[index % 2]):
            voice = f"{ACCENTS[accent]}+{variant}"
            speed = 150 + 5 * ((7 * index + 3 * place) % 10)
            cast.append(Speaker(f"{variant}-{accent}", voice, pitch + 4 * place - 2, speed))
    order = sorted(range(len(cast)), key=lambda i: (i * 5 % 12, i))
    return [cast[i] for i in order]


def recorded(audio, rng, snr_low, snr_high):
    """int16 (n,) as recorded: speech at a random loudness in noise of a random colour and level.

    All speakers have the same distribution of loudness, so that it tells nothing about them.
    """
    x = audio.astype(np.float64)
    x /= np.sqrt(np.mean(x**2)) + 1e-9
    noise = np.fft.rfft(rng.standard_normal(len(x)))
    noise *= np.maximum(np.arange(len(noise)), 1) ** -rng.uniform(0, 0.5)
    noise = np.fft.irfft(noise, len(x))
    noise /= np.sqrt(np.mean(noise**2))
    x += noise * 10 ** (-rng.uniform(snr_low, snr_high) / 20)
    x *= 0.05 * 10 ** (rng.uniform(-6, 6) / 20)
    return np.round(np.clip(x, -1, 1) * 32767).astype(np.int16)


def wav_bytes(audio, sample_rate):
    """A mono 16-bit wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(audio.astype("<i2").tobytes())
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
