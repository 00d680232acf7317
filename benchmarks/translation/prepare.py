"""Prepare generated bitexts of growing size: lines per second, and how peak memory grows.

    python -m benchmarks.translation.prepare --pairs 100000,1000000 \
        --output benchmarks/results/translation_prepare.jsonl

A pair is 2 or 3 real pairs of Tatoeba (cmn.txt), drawn with a seed and joined on both sides, so that
words, characters, their frequencies and the ratio of lengths are real while nearly every line is new.
One run each, in a fresh process. Memory is that of the process tree, twice: the sum of resident
memory, and with shared pages counted once (Pss); and the largest of any single process so far, the
reason to give sizes in growing order.
"""

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from benchmarks.common import machine
from benchmarks.recorded import SHARED, Results
from benchmarks.speaker.prepare import watched
from benchmarks.translation.speed import CORPUS
from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import versions
from fairseq_ext.translation.text.normalise import read_pairs

PARTS = (2, 3)


@dataclass
class Options:
    """What to generate and where."""

    pairs: List[int] = field(
        default_factory=lambda: [100_000, 1_000_000], metadata={"help": "sizes, in pairs"}
    )
    data: str = field(
        default=str(SHARED / CORPUS),
        metadata={"help": "tab-separated file with the real pairs"},
    )
    folder: Optional[str] = field(
        default=None, metadata={"help": "where to generate; none: the system's temporary folder"}
    )
    workers: Optional[int] = field(
        default=None, metadata={"help": "processes of prepare; none: one for each CPU"}
    )
    output: Optional[str] = field(
        default=None,
        metadata={"help": "JSON-lines file for the figures, added to those of other sizes"},
    )
    seed: int = field(default=1, metadata={"help": "of the pairs"})


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.translation.prepare", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if not options.pairs or min(options.pairs) < 1:
        raise UserError("--pairs needs sizes of at least 1")
    if not Path(options.data).is_file():
        raise UserError(f"{options.data} does not exist: give the real pairs with --data")
    runs = []
    for pairs in options.pairs:
        figures = measure(pairs, options)
        print(json.dumps(figures, indent=2), flush=True)
        runs.append(figures)
        if options.output:
            Results(options.output).put({"run": f"{pairs} pairs", **figures})
    print(
        f"{'pairs':>10}{'s':>8}{'CPU s':>8}{'pairs/s':>9}{'RSS MB':>8}{'Pss MB':>8}{'largest MB':>12}"
    )
    for known in runs:
        print(
            f"{known['pairs']:>10,}{known['prepare_s']:>8}{known['cpu_s']:>8}"
            f"{known['pairs_per_s']:>9,}{known['peak_rss_tree_mb']:>8,.0f}"
            f"{known['peak_pss_tree_mb']:>8,.0f}{known['peak_rss_largest_process_mb']:>12,.0f}"
        )


def measure(pairs, options):
    """Generate and prepare once; the figures as a dict."""
    folder = Path(tempfile.mkdtemp(prefix="prepare_translation_", dir=options.folder))
    try:
        source, dest = folder / "bitext.tsv", folder / "data"
        generate(source, options.data, pairs, options.seed)
        command = [sys.executable, "-m", "fairseq_ext.translation.prepare", source, dest]
        command += ["--source-lang", "en", "--target-lang", "zh"]
        command += ["--workers", options.workers] if options.workers else []
        before, cpu = machine(), cpu_seconds()
        seconds, peaks = watched([str(part) for part in command])
        cpu = cpu_seconds() - cpu
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        manifest = json.loads((dest / "manifest.json").read_text(encoding="utf-8"))
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": before,
            "command": "python -m benchmarks.translation.prepare " + " ".join(sys.argv[1:]),
            "versions": versions(),
            "pairs": pairs,
            "input_mb": round(source.stat().st_size / 1e6, 1),
            "prepare_s": round(seconds, 1),
            "pairs_per_s": round(pairs / seconds),
            "cpu_s": round(cpu, 1),
            "pairs_per_cpu_s": round(pairs / cpu),
            **peaks,
            "peak_rss_largest_process_mb": round(largest, 1),
            "report": manifest["report"],
        }
    finally:
        shutil.rmtree(folder)


def cpu_seconds():
    """CPU time of all ended children; unlike the time of day it bears a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def generate(path, data, pairs, seed):
    """Write `pairs` recombined pairs, tab-separated."""
    real = [(source, target) for _, source, target in read_pairs([data])]
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for _ in progress(range(pairs), "generate", "pairs"):
            chosen = draw.choices(real, k=draw.choice(PARTS))
            source = " ".join(pair[0] for pair in chosen)
            file.write(f"{source}\t{''.join(pair[1] for pair in chosen)}\n")


if __name__ == "__main__":
    run(main)
