"""Speaker identification beside its peers: speed, as ratios, and peak memory.

    python -m benchmarks.speaker

Training step against torchaudio's Conformer of the same size, reading crops against one torch.load
an utterance, embeddings against torchaudio's Conformer and SpeechBrain's ECAPA-TDNN of equal size
(where it is installed: pip install -e .[bench]). Sides alternate in one process; the ratio is that
of the medians, with the smallest and largest of a round; memory is measured in fresh processes.
What the machine does besides costs both sides, but not alike: run it when it does nothing else.
"""

import functools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from benchmarks.common import (
    alternate,
    compare,
    in_fresh_process,
    machine,
    memory_increase,
    processor,
    summary,
)
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.cli import Parser, UsageError, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "speaker_speed.jsonl"
EMBED_PEERS = ("torchaudio", "speechbrain")
EMBED_WAYS = ("one by one", "batches of 8")


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=7, metadata={"help": "rounds, in each of which every side runs once"}
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads of torch; none: one for each CPU"}
    )
    output: str = field(default=str(RESULT), metadata={"help": "JSON-lines file for the figures"})
    folder: Optional[str] = field(
        default=None,
        metadata={"help": "where 0.7 GB of utterances are written; none: the temporary folder"},
    )
    quick: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, no more"})
    memory_of: Optional[str] = field(
        default=None, metadata={"help": "used inside: measure CASE/SIDE of --folder, print JSON"}
    )


@dataclass
class Case:
    """One comparison. `sides[0]` is ours, `against` the peer of the ratio."""

    name: str
    sides: list
    against: str
    unit: str
    build: Callable
    goal: Optional[float] = None
    threads: Optional[int] = None
    warmup: int = 1
    memory: bool = True


def main(argv):
    """The command."""
    began = time.monotonic()
    parser = Parser(prog="python -m benchmarks.speaker", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if options.rounds < 1:
        raise UsageError("--rounds must be at least 1")
    quiet_imports()
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    folder = Path(tempfile.mkdtemp(prefix="speaker_benchmark_", dir=options.folder)).resolve()
    try:
        figures = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(figures))
    Results(options.output).put({"run": f"speed on {processor()}", **figures})
    print(f"{figures['machine']}; written to {options.output}")


def measure(folder, options):
    """Everything, as one dict."""
    from benchmarks.speaker.cases import write_utterances
    from benchmarks.speaker.peers import SAME_SIZE, describe

    size = size_of(options)
    write_utterances(folder, size.utterances)
    os.sync()
    results = []
    for case in cases(folder, options):
        print(f"{case.name} …", file=sys.stderr, flush=True)
        results.append(measure_case(case, folder, options))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "python -m benchmarks.speaker " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "quick": options.quick,
        "rounds": options.rounds,
        "size": vars(size),
        "network": describe(SAME_SIZE),
        "cases": results,
    }


def cases(folder, options):
    """The comparisons, in the order of the table."""
    from benchmarks.speaker import cases as c

    size = size_of(options)
    cpus = options.threads or len(os.sched_getaffinity(0))
    networks = functools.cache(c.embedding_networks)
    ways = [f"{p}, {w}" for p in EMBED_PEERS if p in networks() for w in EMBED_WAYS]
    training = ["ours", "torchaudio", "our default"]
    return [
        *(
            Case(
                f"training step, {n} thread{'s' * (n > 1)}",
                training,
                "torchaudio",
                "utterances/s",
                lambda side: c.training_side(side, size),
                goal=2,
                threads=n,
                warmup=2,
                memory=n == cpus,
            )
            for n in sorted({1, cpus}, reverse=True)
        ),
        Case(
            "reading crops, page cache warm",
            ["store", "torch.load"],
            "torch.load",
            "crops/s",
            lambda side: c.reading_side(side, size, folder),
            goal=20,
            threads=cpus,
        ),
        Case(
            "reading crops, page cache cold",
            ["store", "torch.load"],
            "torch.load",
            "crops/s",
            lambda side: c.reading_side(side, size, folder, cold=True),
            goal=1,
            threads=cpus,
            warmup=0,
            memory=False,
        ),
        Case(
            "embedding whole utterances",
            ["ours", *ways],
            "torchaudio, one by one",
            "utterances/s",
            lambda side: c.embedding_side(side, size, networks()),
            goal=1.8,
            threads=cpus,
        ),
    ]


def measure_case(case, folder, options):
    """Speed and memory of the sides of one case."""
    import torch

    torch.set_num_threads(case.threads)
    sides = {name: case.build(name) for name in case.sides}
    rounds = 1 if options.quick else options.rounds
    prepare = {name: getattr(side, "prepare", None) for name, side in sides.items()}
    rates = alternate(
        sides, rounds, case.warmup, before=lambda name: prepare[name] and prepare[name]()
    )
    measured = case.sides if case.memory else []
    measured = measured[:1] if options.quick else measured
    memory = {name: memory_in_process(case, name, folder, options) for name in measured}
    return {
        "case": case.name,
        "unit": case.unit,
        "threads": case.threads,
        "goal": case.goal,
        "against": case.against,
        **compare(rates[case.sides[0]], rates[case.against]),
        "ratios": {n: compare(rates[case.sides[0]], rates[n])["ratio"] for n in case.sides[1:]},
        "sides": {n: {**summary(rates[n]), "memory": memory.get(n)} for n in case.sides},
        **parameters(case),
    }


def parameters(case):
    """Parameters of the networks of a case."""
    from benchmarks.speaker import peers as p
    from fairseq_ext.speaker.network import NetworkOptions

    ours, peer = p.our_network(), p.torchaudio_network()
    if case.name.startswith("training"):
        default = p.count(p.our_network(NetworkOptions()))
        found = {"ours": p.count(ours), "torchaudio": p.count(peer), "our default": default}
    elif case.name.startswith("embedding"):
        found = {"ours": p.encoder_parameters(ours), "torchaudio": p.encoder_parameters(peer)}
        ecapa = p.ecapa_network(found["ours"])
        found |= {"speechbrain": p.count(ecapa)} if ecapa else {}
    else:
        return {}
    return {"parameters": found}


def memory_in_process(case, side, folder, options):
    """What `measure_memory` finds, in a process of its own."""
    arguments = ["-m", "benchmarks.speaker", "--memory-of", f"{case.name}/{side}"]
    arguments += ["--folder", str(folder), "--threads", str(case.threads)]
    arguments += ["--quick"] if options.quick else []
    return in_fresh_process(arguments, ROOT)


def measure_memory(options):
    """Build one side of one case, run it, and report the increase of resident memory."""
    import torch

    name, _, side = options.memory_of.partition("/")
    case = next(c for c in cases(Path(options.folder), options) if c.name == name)
    torch.set_num_threads(case.threads)
    work = case.build(side)
    return memory_increase(work)


def table(figures):
    """The figures for a terminal."""
    lines = []
    for result in figures["cases"]:
        goal = result["goal"]
        met = (
            ""
            if goal is None
            else f", goal {goal:g}: {'met' if result['ratio'] >= goal else 'missed'}"
        )
        lines.append(
            f"\n{result['case']}: {result['ratio']:.2f} × {result['against']}"
            f" ({result['ratio_min']:.2f} to {result['ratio_max']:.2f}{met})"
        )
        for name, side in result["sides"].items():
            ratio = result["ratios"].get(name)
            lines.append(
                f"  {name:<28}{side['median']:>10.1f} {result['unit']:<13}"
                f"{'' if ratio is None else f'ours × {ratio:<7.2f}':<16}"
                + (f"peak {side['memory']['peak_mb']:>7.1f} MB" if side["memory"] else "")
            )
        if "parameters" in result:
            shown = ", ".join(f"{name} {n:,}" for name, n in result["parameters"].items())
            lines.append(f"  parameters: {shown}")
    return "\n".join(lines)


def size_of(options):
    from benchmarks.speaker.cases import Size

    return Size.quick() if options.quick else Size()


def quiet_imports():
    """Import fairseq without its messages."""
    warnings.filterwarnings("ignore")
    import fairseq  # noqa: F401

    logging.getLogger().setLevel(logging.ERROR)


if __name__ == "__main__":
    run(main)
