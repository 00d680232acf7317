"""Several processes, and random numbers without generators: figures of docs/training.md.

    python -m benchmarks.scale two         two processes of one training beside two trainings of one process
    python -m benchmarks.scale random      Philox beside a torch generator an image, its share of an update

Both sides of `two` use the whole machine, a core a process: what one training of two processes does beside
two of one is its efficiency. Run it when the machine does nothing else.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, digest_of
from ext_common.cli import Parser, UsageError, add_dataclass, from_args, run
from tests.trainings import traced

BIN = Path(sys.executable).parent
# shapes of the presets, and images of a batch
SHAPES = {
    "digits 28": ((1, 28, 28), 64),
    "32 × 32": ((3, 32, 32), 32),
    "64 × 64": ((3, 64, 64), 32),
}


@dataclass
class Options:
    updates: int = field(default=120, metadata={"help": "updates of each training of `two`"})
    rounds: int = field(
        default=3, metadata={"help": "rounds, in each of which every side runs once"}
    )
    output: str = field(
        default=str(RESULTS / "scale.jsonl"), metadata={"help": "JSON-lines file for the figures"}
    )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("what", choices=["two", "random"])
    add_dataclass(parser, Options)
    args = parser.parse_args(argv)
    options = from_args(Options, args)
    if options.updates < 40:
        raise UsageError("--updates must be at least 40: the first 20 are not timed")
    found = {"two": two, "random": draws}[args.what](options)
    record = {"run": args.what, "recipe_sha256": digest_of(vars(options)), "machine": machine()}
    Results(options.output).put({**record, **found})
    for row in found["rows"]:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


def two(options: Options) -> dict[str, Any]:
    """Samples a second of two single trainings together, and of one training of two processes."""
    from benchmarks.gpu import written

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = written(Path(folder), small=False)
        for job, (plugin, task, batch) in {
            "speaker": ("fairseq_ext", "speaker_id", 64),
            "diffusion": ("diffusion_ext", "diffusion", 64),
        }.items():
            words = [str(data[job]), "--user-dir", plugin, "--task", task, "--cpu", "--no-save"]
            words += ["--max-update", str(options.updates), "--disable-validation"]
            words += ["--log-format", "json", "--log-interval", "20", "--save-dir", f"{folder}/ck"]
            if job == "diffusion":
                words += ["--sample-interval", "0"]
            ways: dict[str, list[float]] = {"singles": [], "two": []}
            for _ in range(options.rounds):
                half = [*words, "--batch-size", str(batch // 2)]
                ways["singles"].append(sum(speeds([[BIN / "fairseq-train", *half]] * 2)))
                torchrun = [BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]
                ways["two"].append(sum(speeds([[*torchrun, BIN / "fairseq-train", *half]])))
            singles, both = (statistics.median(ways[name]) for name in ("singles", "two"))
            rows.append([job, singles, both, both / singles])
    return {"rows": rows}


def speeds(commands: list[list[Any]]) -> list[float]:
    """Samples a second of trainings that run at the same time, after the first 20 updates."""
    started = [
        subprocess.Popen(
            list(map(str, command)),
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


def draws(options: Options) -> dict[str, Any]:
    """Milliseconds: the draws of an update, by a generator for each image and by Philox, and the update."""
    import torch

    from diffusion_ext.randomness import BEFORE, training_draws
    from ext_common.random import STREAM

    torch.set_num_threads(1)
    rows = []
    for name, (shape, batch) in SHAPES.items():
        ids = torch.arange(batch)
        times = {}
        for stream in (BEFORE, STREAM):
            rounds = []
            for update in range(5 + 5 * options.rounds):
                began = time.perf_counter()
                training_draws(1, update, ids, shape, 1000, 7, stream=stream)
                rounds.append(time.perf_counter() - began)
            times[stream] = 1000 * statistics.median(rounds[5:])
        update = 1000 * seconds_of_update(shape, batch)
        share = times[STREAM] / update
        rows.append([name, batch, times[BEFORE], times[STREAM], update, share])
    return {"rows": rows}


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


if __name__ == "__main__":
    run(main)
