"""The three trainings on this machine's device: speed, memory, share of the card's peak, time without data.

    python -m benchmarks.gpu --output gpu_check.json

Each job trains generated data with its presets for this machine, in float32, --bf16 and --amp, and once more
compiled. A step is timed inside `fairseq-train`; its floating-point operations are counted by torch
(matrix products, convolutions, attention; forward and backward). `scripts/gpu_check.sh` calls this.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import ROOT
from ext_common.cli import Parser, add_dataclass, from_args, run
from ext_common.manifest import atomic_json, versions
from ext_common.threads import settle

# Dense bfloat16 of the vendors' data sheets, 10^12 operations a second, by a part of the card's name.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40": 181, "L4": 121, "A10": 125}
PEAKS |= {"RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}
WAYS = {
    "float32": "",
    "bf16": "--bf16",
    "amp": "--amp",
    "bf16, compiled": "--bf16 --compile inductor",
}
TASKS = {
    "speaker": ("fairseq_ext", "speaker_id", "utterances"),
    "translation": ("fairseq_ext", "translation_spm", "tokens"),
    "diffusion": ("diffusion_ext", "diffusion", "images"),
}


@dataclass
class Options:
    output: str = field(default="gpu_check.json", metadata={"help": "JSON file to write"})
    tests: Optional[str] = field(
        default=None, metadata={"help": "what pytest wrote with --junitxml; its outcomes go along"}
    )
    updates: int = field(default=60, metadata={"help": "updates of each training"})
    warm: int = field(default=20, metadata={"help": "of these, not timed"})
    small: bool = field(
        default=False, metadata={"help": "little data: shows that it runs, no more"}
    )


def main(argv: list[str]) -> None:
    """The command."""
    if argv[:1] == ["--inside"]:
        return inside(Path(argv[1]), int(argv[2]), argv[3:])
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    rows: list[dict[str, Any]] = []
    found = {"machine": machine(), "card": card(), "versions": versions(), "trainings": rows}
    if options.tests:
        found["tests"] = outcomes(Path(options.tests))
    with tempfile.TemporaryDirectory() as folder:
        # what was found is kept whatever comes
        atomic_json(options.output, found)
        data = written(Path(folder), options.small)
        for job in TASKS:
            for way, flags in WAYS.items():
                figures = timed(Path(folder), job, data[job], flags, options)
                rows.append({"job": job, "way": way, **figures})
                atomic_json(options.output, found)
    print("\n".join(table(rows)))


def card() -> Optional[str]:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def written(folder: Path, small: bool, jobs: Collection[str] = tuple(TASKS)) -> dict[str, Path]:
    """DATA of each of these jobs, of shapes as usual and without a meaning."""
    from ext_common.store import StoreWriter
    from fairseq_ext.speaker.corpus import write_corpus
    from fairseq_ext.speaker.features import FeatureSpec

    draw, scale = np.random.default_rng(1), 20 if small else 1
    speakers = [f"s{k:04}" for k in range(1200 // scale)]
    place, rows = folder / "speaker", []
    with StoreWriter(place, (40,)) as writer:
        for number in range(4 * len(speakers)):
            frames = draw.standard_normal((400, 40)).astype("float32") - 5
            offset = writer.append(str(number), frames)
            split = "train" if number < 3 * len(speakers) else "valid"
            rows.append((str(number), speakers[number % len(speakers)], split, None, offset, 400))
        write_corpus(place, writer.part, rows, speakers, FeatureSpec(n_mels=40))
        writer.finish()
    images = draw.integers(0, 256, (20_000 // scale, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    data = {"speaker": place, "translation": folder / "pairs", "diffusion": folder / "images.npy"}
    if "translation" not in jobs:
        return {job: data[job] for job in jobs}
    words = ["".join(draw.choice(list("abcdefghij"), 4)) for _ in range(2000)]
    lines = [" ".join(draw.choice(words, draw.integers(4, 40))) for _ in range(2 * 40_000 // scale)]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    prepare = [sys.executable, "-m", "fairseq_ext.translation.prepare", str(folder / "pairs.tsv")]
    prepare += [str(folder / "pairs"), "--source-lang", "en", "--target-lang", "de"]
    prepare += [
        "--no-check-language",
        "--filters",
        "none",
        *(["--spm-size", "400"] if small else []),
    ]
    subprocess.run(prepare, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return {job: data[job] for job in jobs}


def timed(folder: Path, job: str, data: Path, flags: str, options: Options) -> dict[str, Any]:
    """What a training of a process of its own tells of itself; {"error": …} where it fails."""
    plugin, task, _ = TASKS[job]
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    words = [str(data), "--user-dir", plugin, "--task", task, "--no-save", "--disable-validation"]
    words += [
        "--save-dir",
        str(folder / "ck"),
        "--max-update",
        str(options.updates),
        *flags.split(),
    ]
    words += ["--log-format", "simple", "--sample-interval", "0"][: 4 if job == "diffusion" else 2]
    inner = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--inside",
        str(report),
        str(options.warm),
        *words,
    ]
    done = subprocess.run(inner, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not report.exists():
        return {"error": (done.stderr or done.stdout)[-600:]}
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def inside(report: Path, warm: int, words: list[str]) -> None:
    """`fairseq-train WORDS`, its steps watched."""
    import torch
    from fairseq import trainer
    from torch.utils.flop_counter import FlopCounterMode

    original = trainer.Trainer.train_step
    steps: list[tuple[float, float, float]] = []
    counted: list[int] = []
    cuda = torch.cuda.is_available()

    def train_step(self: Any, samples: Any, *rest: Any, **more: Any) -> Any:
        units = sum(s["ntokens"] if "target" in s else s["nsentences"] for s in samples)
        if (
            self.task.progress_unit == "utterances"
            if hasattr(self.task, "progress_unit")
            else False
        ):
            units = sum(s["nsentences"] for s in samples)
        began = time.perf_counter()
        # the first step has what is done once, too
        if len(steps) == 1:
            # what is compiled cannot be counted, and fails where somebody tries
            eager = torch.compiler.set_stance("force_eager")
            with eager, FlopCounterMode(display=False) as counter:
                result = original(self, samples, *rest, **more)
            counted.append(counter.get_total_flops())
        else:
            result = original(self, samples, *rest, **more)
        if cuda:
            torch.cuda.synchronize()
        steps.append((began, time.perf_counter(), float(units)))
        return result

    trainer.Trainer.train_step = train_step
    sys.argv = ["fairseq-train", *words]
    from fairseq_cli.train import cli_main

    cli_main()
    kept = steps[warm:]
    busy = [end - began for began, end, _ in kept]
    whole = kept[-1][1] - kept[0][0]
    waits = sum(b[0] - a[1] for a, b in zip(kept, kept[1:], strict=False))
    second = statistics.median(busy)
    # what is compiled in an update is no part of the steady rate
    steady = [(end - began, units) for began, end, units in kept if end - began < 3 * second]
    rate = sum(units for _, units in steady) / sum(seconds for seconds, _ in steady)
    found = {
        "per_second": sum(units for *_, units in kept) / whole,
        "steady_per_second": rate,
        "first_seconds": sum(end - began - units / rate for began, end, units in steps),
        "seconds_per_update": second,
        "without_data": waits / whole,
        "tflops": counted[0] / second / 1e12 if counted else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    found["share_of_bf16_peak"] = found["tflops"] / peak if peak and found["tflops"] else None
    report.write_text(json.dumps(found))


def outcomes(path: Path) -> dict[str, str]:
    """Name of each test → passed, skipped or failed, with the reason."""
    found: dict[str, str] = {}
    if not path.exists():
        return {"all": "failed: pytest ended before it wrote anything"}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        told = [child for child in case if child.tag in ("failure", "error", "skipped")]
        found[name] = f"{told[0].tag}: {(told[0].get('message') or '')[:300]}" if told else "passed"
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| job | way | a second | share of bf16 peak | waits | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['job']} | {row['way']} | failed: {row['error'][-80:]!r} | | | |")
            continue
        share, memory = row["share_of_bf16_peak"], row["peak_gb"]
        lines.append(
            f"| {row['job']} | {row['way']} | {row['per_second']:,.0f} {TASKS[row['job']][2]} |"
            f" {'-' if share is None else f'{share:.1%}'} | {row['without_data']:.1%} |"
            f" {'-' if memory is None else f'{memory:.1f} GB'} |"
        )
    return lines


if __name__ == "__main__":
    settle()
    run(main)
