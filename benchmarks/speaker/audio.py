"""What users' audio does to the result: `python -m benchmarks.speaker.audio CKPT PEOPLE.json --name after`.

The same recordings of libri251, spoilt as real ones are, read and embedded by one checkpoint; with the
package of an older version first on PYTHONPATH and `--name before` it measures that one. One line a name in
benchmarks/results/speaker_audio.jsonl; `python -m benchmarks.report` makes the table.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, Results, data_file, digest_of
from benchmarks.speaker.report import AUDIO, audio_table
from ext_common.cli import UserError
from ext_common.manifest import sha256_file
from fairseq_ext.speaker.features import load_audio, resample
from fairseq_ext.speaker.inference import SpeakerModel

RECORDED = Results(RESULTS / "speaker_audio.jsonl")
RATE, PIECE = 16000, 3 * 16000
# how memory is told: anonymous, so that pages of a mapped file do not count
METHOD = "RssAnon, every 20 ms"


def spoilt(folder: Path, samples: np.ndarray) -> None:
    """Write the files of AUDIO, each of `samples` at RATE."""
    soundfile.write(folder / "whole.wav", samples, RATE)
    wav = (folder / "whole.wav").read_bytes()
    # quiet at first: the decoder guesses the length from the first frame
    half = len(samples) // 2
    faded = np.repeat([0.0003, 0.2], [half, len(samples) - half]).astype(np.float32)
    faded *= np.random.default_rng(0).standard_normal(len(samples), dtype=np.float32)
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.4}
    soundfile.write(folder / "vbr.mp3", faded, RATE, **options)
    mp3 = (folder / "vbr.mp3").read_bytes()
    first = mp3.find(mp3[:2], 40)
    soundfile.write(folder / "whole.ogg", samples, RATE)
    ogg = (folder / "whole.ogg").read_bytes()
    soundfile.write(folder / "whole.flac", samples, RATE)
    flac = bytearray((folder / "whole.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    for name, content in (
        ("without_length.mp3", mp3[first:]),
        ("twice.mp3", mp3 + mp3),
        ("cut.wav", wav[: len(wav) * 2 // 3]),
        ("cut.ogg", ogg[: len(ogg) * 2 // 3]),
        ("pipe.wav", wav[:4] + bytes(4) + wav[8:40] + bytes(4) + wav[44:]),
        ("pipe.flac", bytes(flac)),
        ("hertz.wav", wav[:24] + (1).to_bytes(4, "little") + wav[28:64]),
    ):
        (folder / name).write_bytes(content)
    soundfile.write(folder / "inverted.wav", np.stack([samples, -samples * 0.98], 1), RATE)
    noise = np.random.default_rng(0).standard_normal(400) * 0.1
    soundfile.write(folder / "short.wav", noise, RATE)


def share(path: Path, expected: int) -> str:
    """How much of a file is read, or that it is refused."""
    try:
        found = len(load_audio(path, RATE))
    except (UserError, ValueError, soundfile.SoundFileError) as error:
        return "refused" if isinstance(error, UserError) else f"{type(error).__name__}"
    return f"{100 * found / expected:.0f} %"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def memory() -> float:
    """MB of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def spent(do: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, MB more at the highest point) of a call."""
    found, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found.append(memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    do()
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    return seconds, max(found) - found[0]


def eer(same: np.ndarray, other: np.ndarray) -> float:
    """Equal error rate in %, by steps."""
    scores = np.concatenate([same, other])
    order = np.argsort(scores, kind="stable")
    targets = np.concatenate([np.ones(len(same)), np.zeros(len(other))])[order]
    misses = np.cumsum(targets) / len(same)
    false = 1 - np.cumsum(1 - targets) / len(other)
    place = int(np.argmin(np.abs(misses - false)))
    return float(50 * (misses[place] + false[place]))


def stored_narrow(samples: np.ndarray) -> np.ndarray:
    """The samples at 8 kHz and back, rounded to 16 bits: telephone audio in a file of 16 kHz."""
    narrow = resample(resample(samples, RATE, 8000), 8000, RATE)
    return (np.round(narrow * 32767) / 32767).astype(np.float32)


def verification(model: SpeakerModel, people: list[str]) -> dict[str, str]:
    """EER of 3-second pieces of people who were not trained on: 16 kHz, and 8 against 16 kHz."""
    from fairseq_ext.speaker.features import log_mel

    speakers, wide, narrow = [], [], []
    for person in people:
        (path,) = data_file("libri251").glob(f"{person}-*.flac")
        samples = load_audio(path, RATE)
        for first in range(0, len(samples) - PIECE + 1, PIECE):
            piece = samples[first : first + PIECE]
            speakers.append(person)
            wide.append(log_mel(piece, model.spec))
            narrow.append(log_mel(stored_narrow(piece), model.spec))
    a, b = (model.embed(each) for each in (wide, narrow))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    names = np.array(speakers)
    same = names[:, None] == names
    pairs = ~np.eye(len(names), dtype=bool)
    return {
        "wide": f"{eer((a @ a.T)[same & pairs], (a @ a.T)[~same]):.2f}",
        "narrow": f"{eer((b @ a.T)[same & pairs], (b @ a.T)[~same]):.2f}",
    }


def measured(checkpoint: str, people: list[str], hour: bool) -> dict[str, str]:
    """Everything in AUDIO."""
    torch.set_num_threads(1)
    model = SpeakerModel.from_checkpoint(checkpoint)
    (source,) = data_file("libri251").glob(f"{people[0]}-*.flac")
    samples = np.tile(load_audio(source, RATE), 3)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spoilt(folder, samples)
        for name in list(AUDIO)[:7]:
            expected = 2 * len(samples) if name == "twice.mp3" else len(samples)
            found[name] = share(folder / name, expected)
        found["hertz.wav"] = share(folder / "hertz.wav", 10 * RATE)
        if found["hertz.wav"] != "refused":
            found["hertz.wav"] = f"{len(load_audio(folder / 'hertz.wav', RATE)) / RATE:.0f} s"
        whole, inverted = (model.embed([folder / n])[0] for n in ("whole.wav", "inverted.wav"))
        found["inverted.wav"] = f"{cosine(whole, inverted):.2f}"
        try:
            found["short.wav"] = f"is {model.identify([folder / 'short.wav'])[0].speaker}"
        except UserError:
            found["short.wav"] = "refused"
        found |= verification(model, people)
        lengths = {"ten minutes": 600, **({"hour": 3600} if hour else {})}
        for name, seconds in lengths.items():
            with soundfile.SoundFile(folder / "long.flac", "w", RATE, 1) as file:
                for _ in range(round(seconds * RATE / len(samples))):
                    file.write(samples)
            cpu, more = spent(lambda: model.embed([folder / "long.flac"]))
            found[name] = f"{cpu:.0f} s, {more:.0f} MB"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("people", help="JSON list of the people that it was not trained on")
    parser.add_argument("--name", default="after")
    parser.add_argument("--no-hour", action="store_true", help="leave the hour out")
    args = parser.parse_args()
    people = json.loads(Path(args.people).read_text())
    digest = digest_of(sha256_file(args.checkpoint), people, AUDIO, not args.no_hour, METHOD)
    if not RECORDED.has(args.name, digest):
        results = measured(args.checkpoint, people, not args.no_hour)
        record = {"run": args.name, "recipe_sha256": digest, "results": results}
        RECORDED.put(record | {"date": date.today().isoformat(), "machine": machine()})
    print(audio_table(RECORDED.all()))


if __name__ == "__main__":
    main()
