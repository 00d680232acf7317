"""More than one process, random numbers, compiled networks, large stores: figures of docs/results/speed.md.

    python -m benchmarks.scale two         two processes of one training beside two trainings of one process
    python -m benchmarks.scale random      Philox beside a torch generator an image, its share of an update
    python -m benchmarks.scale compile     the three networks as they are and compiled, a thread each
    python -m benchmarks.scale store       anonymous memory of training from 50 GB and of preparing 2 GB
    python -m benchmarks.scale images      1,000 to 71,000 images, 16 to 128 pixels: start, update, memory

Each is minutes, and a run that is recorded is not made again: killed and started once more it goes on. All
but `store` are timings, for when the machine does nothing else. What one training of two processes does
beside two of one, both on the whole machine, a core a process, is its efficiency.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

from benchmarks import gpu
from benchmarks.common import machine
from benchmarks.pages import markdown, origin, processor
from benchmarks.recorded import RESULTS, ROOT, Results, digest_of
from ext_common.cli import Parser, UsageError, add_dataclass, from_args, run
from ext_common.manifest import versions

BIN = Path(sys.executable).parent
# Samples of a process.
BATCHES = {"speaker": 32, "diffusion": 16}
# shapes of the presets, and images of a batch
SHAPES = {
    "digits 28": ((1, 28, 28), 64),
    "32 × 32": ((3, 32, 32), 32),
    "64 × 64": ((3, 64, 64), 32),
}
# Of the networks; the last keeps the lengths of the sentences.
WAYS = {
    "as it is": "",
    "compiled": "--compile inductor",
    "compiled, any lengths": "--compile inductor --required-seq-len-multiple 1",
}
# How many images, and their pixels a side.
GROWTH = ((1000, 16), (1000, 32), (1000, 64), (10_000, 64), (71_000, 64), (1000, 128))
FRAMES, N_MELS = 5000, 40  # of an utterance of the large store: 800 kB
BYTES_OF_A_RECORDING = 105_000 * 1.14  # of `benchmarks.speaker.prepare`, with the unlabelled ones


@dataclass
class Options:
    updates: int = field(
        default=40,
        metadata={"help": "updates of each training, of which the first quarter is not timed"},
    )
    rounds: int = field(
        default=7, metadata={"help": "rounds of `two`, in each of which every side runs once"}
    )
    train_gb: float = field(default=50.0, metadata={"help": "size of the large store of `store`"})
    prepare_gb: float = field(
        default=2.0, metadata={"help": "size of the recordings that `store` prepares"}
    )
    output: str = field(
        default=str(RESULTS / "scale.jsonl"), metadata={"help": "JSON-lines file for the figures"}
    )


# The name of a run, and what measures it.
Run = tuple[str, Callable[[], dict[str, Any]]]


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("what", choices=list(PARTS))
    add_dataclass(parser, Options)
    args = parser.parse_args(argv)
    options = from_args(Options, args)
    if options.updates < 8:
        raise UsageError("--updates must be at least 8")
    # a round more is not another recipe
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "rounds")}
    results, recipe = Results(options.output), digest_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in PARTS[args.what](Path(folder), options):
            name = f"{args.what} {name}"
            if results.has(name, recipe) and "error" not in (results.get(name) or {}):
                continue
            record = {
                "run": name,
                "recipe_sha256": recipe,
                "date": datetime.date.today().isoformat(),
                "machine": machine(),
                "command": f"python -m benchmarks.scale {args.what}",
                "versions": versions(),
            }
            results.put({**record, **measure()})
            print(f"{name} is recorded", file=sys.stderr)
    print(SECTIONS[args.what](of(results.all(), args.what)))


def of(records: list[dict], what: str) -> dict[str, dict]:
    """The records of a command, by the rest of their names."""
    return {
        record["run"].removeprefix(f"{what} "): record
        for record in records
        if record["run"].split()[0] == what
    }


def report(records: list[dict]) -> str:
    """The sections of docs/results/speed.md; none for what was not run yet."""
    found = [(section, of(records, what)) for what, section in SECTIONS.items()]
    return "\n\n".join(section(records) for section, records in found if records)


# --- two processes --------------------------------------------------------------------------------


def two(folder: Path, options: Options) -> Iterator[Run]:
    """Samples a second of two single trainings together, and of one training of two processes."""
    data = gpu.written(folder, small=True, jobs=BATCHES)
    for number in range(options.rounds):
        for job, batch in BATCHES.items():
            plugin, task, _ = gpu.TASKS[job]
            words = [str(data[job]), "--user-dir", plugin, "--task", task, "--cpu", "--no-save"]
            words += ["--max-update", str(options.updates), "--disable-validation"]
            words += ["--log-format", "json", "--log-interval", str(options.updates // 4)]
            words += ["--save-dir", str(folder / "ck"), "--batch-size", str(batch)]
            if job == "diffusion":
                words += ["--sample-interval", "0"]
            train = [str(BIN / "fairseq-train"), *words]
            torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--no-python", *train]
            for side, commands in {"single": [train] * 2, "together": [torchrun]}.items():

                def measure(commands: list[list[str]] = commands) -> dict[str, Any]:
                    return {"per_second": sum(speeds(commands))}

                yield f"{job} {side} {number + 1}", measure


def speeds(commands: list[list[str]]) -> list[float]:
    """Samples a second of trainings that run at the same time, after the first quarter."""
    from tests.trainings import traced

    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    found = []
    for process in started:
        log = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(log[-2000:])
        rate, size = traced(log, "ups"), traced(log, "bsz")
        found.append(statistics.mean(float(rate[k]) * float(size[k]) for k in sorted(rate)[1:]))
    return found


def two_section(records: dict[str, dict]) -> str:
    rows = []
    for job in BATCHES:
        each = {
            side: {
                name.split()[-1]: r["per_second"]
                for name, r in records.items()
                if name.startswith(f"{job} {side}")
            }
            for side in ("single", "together")
        }
        rounds = sorted(each["single"].keys() & each["together"].keys())
        if rounds:
            single, together = (statistics.median(rates.values()) for rates in each.values())
            # the processor's own speed drifts from minute to minute: the sides of one round share it
            ratios = sorted(each["together"][k] / each["single"][k] for k in rounds)
            figures = [f"{single:.0f} {gpu.TASKS[job][2]}/s", f"{together:.0f}"]
            figures += [f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"]
            rows.append([job, *figures])
    head = ["a core a process", "two trainings", "one of two processes", "efficiency (goal: 0.90)"]
    about = "Medians of rounds, and the median of their ratios."
    return section("Two processes", [*head, "of single rounds"], rows, records, about)


# --- random numbers -------------------------------------------------------------------------------


def draws(_folder: Path, options: Options) -> Iterator[Run]:
    """Milliseconds: the draws of an update, by a generator for each image and by Philox, and the update."""
    for name, (shape, batch) in SHAPES.items():

        def measure(shape: tuple = shape, batch: int = batch) -> dict[str, Any]:
            import torch

            from diffusion_ext.randomness import BEFORE, training_draws
            from ext_common.random import STREAM

            torch.set_num_threads(1)
            ids, times = torch.arange(batch), {}
            for stream in (BEFORE, STREAM):
                rounds = []
                for update in range(25):
                    began = time.perf_counter()
                    training_draws(1, update, ids, shape, 1000, 7, stream=stream)
                    rounds.append(time.perf_counter() - began)
                times[stream] = 1000 * statistics.median(rounds[5:])
            update_ms = 1000 * seconds_of_update(shape, batch)
            return {
                "batch": batch,
                "before_ms": times[BEFORE],
                "philox_ms": times[STREAM],
                "update_ms": update_ms,
            }

        yield name, measure


def seconds_of_update(shape: tuple[int, int, int], batch: int) -> float:
    """Forward and backward of the network that the preset of this size trains, on one thread."""
    import torch

    from diffusion_ext.presets import PRESETS
    from diffusion_ext.unet import UNet, UNetOptions
    from ext_common.presets import Machine

    asked = {"image_size": [shape[1]], "channels": shape[0]}
    choices = PRESETS.choose(PRESETS.read(".", asked), Machine(False, 1, 5.0), {})
    flags = next(choice.flags for choice in choices if choice.part == "arch")
    options = UNetOptions()
    for name, field_ in UNetOptions.__dataclass_fields__.items():
        text = flags.get(f"--{name.replace('_', '-')}")
        if text is not None:
            kind = type(getattr(options, name))
            several = "List" in str(field_.type)
            setattr(options, name, list(map(int, text.split(","))) if several else kind(text))
    network = UNet(options, shape[0], shape[0], shape[1], 0, 0)
    x, t = torch.randn(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        network(x, t, None, None).square().mean().backward()
        times.append(time.perf_counter() - began)
    return min(times)


def random_section(records: dict[str, dict]) -> str:
    rows = [
        [
            name,
            str(r["batch"]),
            *(f"{r[key]:.1f} ms" for key in ("before_ms", "philox_ms")),
            f"{r['update_ms']:,.0f} ms",
            f"{r['philox_ms'] / r['update_ms']:.2%}",
        ]
        for name, r in records.items()
    ]
    head = ["images", "a batch", "a generator each, as before", "Philox", "an update"]
    about = (
        "Noise, timesteps and augmentation of an update, on one thread. What the arithmetic of Philox buys is"
        " the same numbers on every device and in every batch. Its words are its authors' known answers, to"
        " the bit (`tests/ext_common/test_random.py`)."
    )
    return section("Random numbers", [*head, "share (goal: 2 %)"], rows, records, about)


# --- compiled networks ----------------------------------------------------------------------------


def compiled(folder: Path, options: Options) -> Iterator[Run]:
    """Seconds of an update of each job, with its network as it is and compiled, and what compiling takes."""
    data = gpu.written(folder, small=True)
    for job in gpu.TASKS:
        for way, flags in WAYS.items():
            if job != "translation" and way == "compiled, any lengths":
                continue

            def measure(job: str = job, flags: str = flags) -> dict[str, Any]:
                timing = gpu.Options(updates=options.updates, warm=options.updates // 2)
                # what an earlier one has compiled would be found again; g++ wants no space in it
                cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{job}-{len(flags)}")}
                with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", **cache):
                    return gpu.timed(folder, job, data[job], f"--cpu {flags}", timing)

            yield f"{job} {way}", measure


def compile_section(records: dict[str, dict]) -> str:
    rows = []
    for job, (*_, unit) in gpu.TASKS.items():
        plain = records.get(f"{job} as it is", {}).get("steady_per_second")
        for way in WAYS:
            if (r := records.get(f"{job} {way}")) is None:
                continue
            if "error" in r:
                rows.append([job, way, "failed", "", "", ""])
                continue
            rate, first = r["steady_per_second"], r["first_seconds"]
            row = [job, way, f"{rate:,.0f} {unit}/s"]
            if way == "as it is" or not plain:
                rows.append([*row, "", "", ""])
                continue
            # so long takes the plain one what the compiled one does in as long, compiling included
            pays = f"{first / (1 - plain / rate) / 60:.1f} minutes" if rate > plain else "never"
            rows.append([*row, f"{rate / plain:.2f} ×", f"{first:.0f} s", pays])
    head = ["job", "network", "training", "beside as it is", "compiling", "pays in trainings from"]
    about = (
        "`--compile inductor` in float32 on one thread, the networks that presets choose for minutes. Batches"
        " of sentences are padded to lengths of 16, 32, 48 …, so that they have few shapes, or left as they"
        " are. *Compiling* is what updates took beyond the steady rate."
    )
    return section("Compiled networks", head, rows, records, about)


# --- large stores ---------------------------------------------------------------------------------


def store(folder: Path, options: Options) -> Iterator[Run]:
    """Peak of anonymous memory, of sizes a thousand (or ten) times apart."""
    for gb in (options.train_gb / 1000, options.train_gb):

        def trained(gb: float = gb) -> dict[str, Any]:
            utterances = sparse(folder / f"{gb}", gb)
            plugin, task, _ = gpu.TASKS["speaker"]
            command = [str(BIN / "fairseq-train"), str(folder / f"{gb}"), "--user-dir", plugin]
            command += ["--task", task, "--cpu", "--no-save", "--max-update", str(options.updates)]
            command += ["--save-dir", str(folder / "ck"), "--disable-validation"]
            command += ["--num-workers", "0"]
            return {"gb": gb, "utterances": utterances, **watched(command)}

        yield f"train {gb:g}", trained
    for gb in (options.prepare_gb / 10, options.prepare_gb):

        def prepared(gb: float = gb) -> dict[str, Any]:
            from benchmarks.speaker.prepare import generate

            source, dest = folder / f"source {gb}", folder / f"dest {gb}"
            utterances = max(2, round(gb * 1e9 / BYTES_OF_A_RECORDING))
            generate(source, utterances, 1)
            command = [sys.executable, "-m", "fairseq_ext.speaker.prepare", str(source), str(dest)]
            command += ["--layout", "hw4", "--workers", "1"]
            return {"gb": gb, "utterances": utterances, **watched(command)}

        yield f"prepare {gb:g}", prepared


def sparse(place: Path, gb: float) -> int:
    """DATA of so many GB that take no room on the disk: silence; how many utterances."""
    from ext_common.store import FORMAT, store_paths
    from fairseq_ext.speaker import corpus
    from fairseq_ext.speaker.features import FeatureSpec

    count = max(8, round(gb * 1e9 / (4 * FRAMES * N_MELS)))
    place.mkdir()
    _, final, index, _ = store_paths(place)
    final.touch()
    os.truncate(final, 4 * count * FRAMES * N_MELS)
    lengths = [FRAMES] * count
    about = {"format": FORMAT, "dtype": "<f4", "row_shape": [N_MELS], "rows": sum(lengths)}
    index.write_text(json.dumps({**about, "lengths": lengths}))
    speakers = [f"s{number:03}" for number in range(min(500, count // 2))]
    rows = [
        (f"{k:06}", speakers[k % len(speakers)], "train", None, k * FRAMES, FRAMES)
        for k in range(count)
    ]
    # 50 GB of silence need not be read for its mean
    silence = ([0.0] * N_MELS, [1.0] * N_MELS, "", count * FRAMES)
    with mock.patch.object(corpus, "frame_statistics", lambda *_: silence):
        corpus.write_corpus(place, final, rows, speakers, FeatureSpec(n_mels=N_MELS))
    return count


def watched(command: list[str], log: IO[bytes] | int = subprocess.DEVNULL) -> dict[str, float]:
    """Run a command: peaks of its processes' anonymous memory and of their pages of files, MB; seconds."""
    from benchmarks.speaker.prepare import descendants

    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.PIPE
    )
    anonymous, files = 0.0, 0.0
    while process.poll() is None:
        found = [resident(pid) for pid in descendants(process.pid)]
        anonymous = max(anonymous, sum(anon for anon, _ in found))
        files = max(files, sum(file for _, file in found))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode()[-2000:] if process.stderr else command)
    return {"anon_mb": anonymous, "file_mb": files, "seconds": time.monotonic() - began}


def resident(pid: int) -> tuple[float, float]:
    """MB of a process that are its own, and that are pages of files; 0 for one that is gone."""
    found = {"RssAnon": 0.0, "RssFile": 0.0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) / 1024
    except OSError:
        pass
    return found["RssAnon"], found["RssFile"]


def store_section(records: dict[str, dict]) -> str:
    about = (
        "Speaker data: a store that is a hole in the disk, as silence is; recordings of the course's layout,"
        " prepared by one worker. The larger one has a thousand (ten) times as much; what grows in training"
        " is what stands for each utterance and each crop of an epoch."
    )
    rows = [
        [
            {"train": "training from", "prepare": "preparing"}[name.split()[0]],
            f"{r['gb']:g} GB",
            f"{r['utterances']:,}",
            f"{r['anon_mb']:.0f} MB",
            f"{r['file_mb']:.0f} MB",
        ]
        for name, r in sorted(records.items(), key=lambda one: (one[0].split()[0], one[1]["gb"]))
    ]
    head = [
        "",
        "size",
        "utterances",
        "peak of anonymous memory",
        "mapped files, given back at need",
    ]
    return section("Large stores", head, rows, records, about)


# --- more images, and larger ones -----------------------------------------------------------------


def images(folder: Path, options: Options) -> Iterator[Run]:
    """A folder of PNG files to train on with the preset's network, for the first time and once more."""
    from benchmarks.diffusion.cases import write_images

    for count, side in GROWTH:

        def measure(count: int = count, side: int = side) -> dict[str, Any]:
            from tests.trainings import traced

            source = folder / f"{count} of {side}"
            write_images(source, count, side)
            command = [sys.executable, "-m", "diffusion_ext.train", str(source), "--cpu"]
            command += [
                "--no-save",
                "--image-size",
                str(side),
                "--minutes",
                "60",
                "--sample-interval",
                "0",
            ]
            command += ["--max-update", str(options.updates // 4), "--disable-validation"]
            command += ["--log-format", "json", "--log-interval", "1"]
            command += ["--save-dir", str(folder / "ck")]
            found: dict[str, Any] = {"images": count, "side": side}
            for start in ("first", "later"):
                with (
                    tempfile.NamedTemporaryFile() as log,
                    mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")),
                ):
                    figures = watched(command, log)
                    text = Path(log.name).read_text()
                found["batch"] = float(traced(text, "bsz")[1])
                # of the first update fairseq knows no rate
                rates = list(map(float, traced(text, "wps").values()))
                found["update_s"] = found["batch"] / statistics.median(rates[1:])
                # what is not training: importing, decoding or opening, building
                found[f"{start}_s"] = figures["seconds"] - len(rates) * found["update_s"]
                found[f"{start}_mb"] = figures["anon_mb"]
            return found

        yield f"{count} of {side}", measure


def images_section(records: dict[str, dict]) -> str:
    rows = [
        [
            f"{r['images']:,}",
            f"{r['side']} × {r['side']}",
            f"{r['update_s']:.2f} s of {r['batch']:.0f} images",
            *(f"{r[f'{start}_s']:.1f} s" for start in ("first", "later")),
            *(f"{r[f'{start}_mb']:,.0f} MB" for start in ("first", "later")),
            processor(r).partition(",")[0],
        ]
        for r in sorted(records.values(), key=lambda r: (r["images"], r["side"]))
    ]
    about = (
        "A folder of PNG files, the network that presets choose for minutes on a CPU, one thread. Beside the"
        " updates: from the command to its end without them; the first start decodes with all processors, a"
        " later one opens what that left. Memory is anonymous, of all processes together."
    )
    head = ["images", "pixels", "an update", "the first start", "a later one"]
    head += ["memory, first", "later", "on"]
    return section("More images", head, rows, records, about)


def section(
    title: str, head: list[str], rows: list[list[str]], records: dict[str, dict], about: str = ""
) -> str:
    found = list(records.values())
    parts = [f"## {title}", about, markdown(head, rows), origin(found[0]["command"], found)]
    return "\n\n".join(filter(None, parts))


PARTS: dict[str, Callable[[Path, Options], Iterator[Run]]] = {
    "two": two,
    "random": draws,
    "compile": compiled,
    "store": store,
    "images": images,
}
SECTIONS: dict[str, Callable[[dict[str, dict]], str]] = {
    "two": two_section,
    "random": random_section,
    "compile": compile_section,
    "store": store_section,
    "images": images_section,
}

if __name__ == "__main__":
    run(main)
