"""Back-translation beside what people do without it: speed, memory, and quality of int8.

python -m benchmarks.backtranslation                               speed, random weights
python -m benchmarks.backtranslation --memory                      peak memory of 1e4, 1e5 and 1e6 lines
python -m benchmarks.backtranslation --quality --path CKPT --data DATA

Speed: models of Marian's size (d 512, 6+6 layers, 32,000 pieces) with random weights; lines joined of
sentences of Tatoeba to 20 pieces on the average; a beam of 4; every output is forced to 25 pieces. On one
side Hugging Face's `generate`, a call a line, as course notes do, and in batches in file order, with the best
of three sizes; and fairseq-generate, with the best of two --max-tokens. On the other ours, on each back
end with its default batches. Sides run in alternation with the same number of threads; ratios are those of
medians.

What is timed: from lines of text to lines of text, after the model is loaded; for fairseq-generate what it
reports itself, which is its search alone, in a process of its own. Hugging Face makes 25 steps for 25 pieces,
fairseq and ours one more, for </s>. A call a line is so slow that it gets few lines, and CTranslate2, where
each thread decodes batches of its own, gets more, so that all have some, as in any corpus; rates are per
line. Peak memory is that of a whole fresh process, loading included. Conversion happens before.

Memory: `backtranslation.generate` on files of more and more lines, with a model that does nothing.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import List, Optional

from benchmarks.backtranslation import sides
from benchmarks.backtranslation.checks import (
    GENERATE,
    measure_memory,
    measure_quality,
    run_generate,
)
from benchmarks.backtranslation.figures import table
from benchmarks.common import alternate, compare, in_fresh_process, machine, status, summary
from benchmarks.recorded import RESULTS, ROOT, Results
from benchmarks.translation.speed import CORPUS, PEER, quiet_imports, read, say
from ext_common.cli import Parser, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "backtranslation_speed.jsonl"
BATCHES = (16, 32, 64)
# of 64 lines of 20 pieces, two batches and one
MAX_TOKENS = (700, 1000, 4000)
# ours over each of these
GOALS = {sides.ONE: 20.0, sides.BATCHED: 4.0}


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=3, metadata={"help": "rounds, in each of which every side runs once"}
    )
    sentences: int = field(
        default=64,
        metadata={
            "help": "lines of most sides; a call a line gets a tenth, CTranslate2 three times these"
        },
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads; none: one for each CPU"}
    )
    corpus: Optional[str] = field(
        default=None,
        metadata={"help": f"tab-separated bitext; none: {CORPUS} in FAIRSEQ_EXT_DATA"},
    )
    memory: bool = field(default=False, metadata={"help": "measure memory, not speed"})
    lines: List[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000],
        metadata={"help": "lines of each run of --memory"},
    )
    quality: bool = field(default=False, metadata={"help": "measure quality, not speed"})
    path: Optional[str] = field(default=None, metadata={"help": "trained checkpoint, for quality"})
    data: Optional[str] = field(
        default=None, metadata={"help": "prepared folder whose test split measures quality"}
    )
    beam: int = field(default=5, metadata={"help": "hypotheses kept, for quality"})
    record: bool = field(default=False, metadata={"help": "write the figures to --output"})
    output: str = field(
        default=str(RESULT),
        metadata={"help": "JSON-lines file, of which a run replaces its own part"},
    )
    folder: Optional[str] = field(
        default=None, metadata={"help": "where 1 GB is written; none: the temporary folder"}
    )
    tiny: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, no more"})
    side: Optional[str] = field(
        default=None, metadata={"help": "used inside: run one side on --folder, print JSON"}
    )
    batch: int = field(default=1, metadata={"help": "used inside: lines a call"})

    def __post_init__(self):
        for name in ("rounds", "sentences", "threads", "beam"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not self.lines or min(self.lines) < 1:
            raise ValueError("--lines needs numbers of at least 1")
        if not self.quality == bool(self.path) == bool(self.data):
            raise ValueError("--quality, --path and --data belong together: give all or none")
        if self.quality and self.memory:
            raise ValueError("--quality and --memory are runs of their own: give one of them")
        self.threads = self.threads or len(os.sched_getaffinity(0))


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.backtranslation", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if options.side:
        print(json.dumps(run_side(options)))
        return
    part = "memory" if options.memory else "quality" if options.quality else "speed"
    measure = {"memory": measure_memory, "quality": measure_quality, "speed": measure_speed}[part]
    began = time.monotonic()
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.backtranslation", *argv]),
        "versions": versions() | {n: metadata.version(n) for n in ("transformers", "ctranslate2")},
        "tiny": options.tiny,
        "threads": options.threads,
    }
    folder = Path(tempfile.mkdtemp(prefix="backtranslation_benchmark_", dir=options.folder))
    try:
        figures |= measure(folder.resolve(), options)
    finally:
        shutil.rmtree(folder)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(part, figures))
    print(f"\n{figures['machine']}; {figures['seconds']:.0f} s in all")
    if options.record:
        Results(options.output).put({"run": part, **figures})
        print(f"written to {options.output}")


# --- speed -----------------------------------------------------------------------------------------


def measure_speed(folder: Path, options: Options) -> dict:
    """Lines per second, ratios and peak memory of every side."""
    from benchmarks.backtranslation.cases import Size, corpus_of, write_case

    quiet_imports()
    corpus, pairs = corpus_of(options)
    say("making models with random weights")
    size = Size.tiny() if options.tiny else Size()
    counts = {name: lines_of(name, options.sentences) for name in sides.SIDES}
    case = write_case(folder, pairs, size, max(counts.values()), counts[PEER])
    lines = read(folder / "lines")
    peer = sides.HuggingFace(folder, options.threads)
    say(f"looking for the batch size that suits {sides.BATCHED}")
    peer(lines[:2], batch=2)
    some = lines[: counts[sides.BATCHED]]
    tried = {batch: rate_of(lambda n=batch: peer(some, batch=n), some) for batch in BATCHES}
    batch = max(tried, key=tried.get)
    say(f"looking for the batch size that suits {PEER}")
    search = sides.FairseqGenerate(folder, options, MAX_TOKENS)
    calls = {
        sides.ONE: lambda some: peer(some, batch=1),
        sides.BATCHED: lambda some: peer(some, batch=batch),
    }
    for name in sides.OURS:
        say(f"opening {name}")
        calls[name] = sides.ours(name, folder, options.threads)
        calls[name](lines[:2])
    runs = {name: side_run(call, lines[: counts[name]]) for name, call in calls.items()}
    rates = alternate(
        {**runs, PEER: search.units}, options.rounds, warmup=0, before=lambda name: say(name)
    )
    peaks = {}
    for name in sides.SIDES:
        say(f"memory of {name}")
        # in a smaller process than this one, see fairseq_generate
        flags = ["-m", "benchmarks.backtranslation", "--side", name, "--folder", str(folder)]
        flags += ["--sentences", str(options.sentences), "--threads", str(options.threads)]
        flags += ["--batch", str(search.best if name == PEER else batch)]
        peaks[name] = in_fresh_process(flags, ROOT)["peak_mb"]
    return {
        "corpus": corpus,
        **case,
        "beam": sides.BEAM,
        "rounds": options.rounds,
        "goals": GOALS,
        "rates_of_batches": tried,
        "rates_of_max_tokens": search.tried,
        "sides": {name: side_of(name, rates, counts, peaks) for name in sides.SIDES},
    }


def lines_of(name: str, sentences: int) -> int:
    """How many lines a side gets."""
    if name == sides.ONE:
        return max(1, sentences // 10)
    return 3 * sentences if "ctranslate2" in name else sentences


def side_run(call: sides.Side, lines: Sequence[str]) -> Callable[[], int]:
    """Translate `lines` once; how many they are."""

    def once() -> int:
        found = call(lines)
        if len(found) != len(lines):
            raise RuntimeError(f"{len(found)} lines came of {len(lines)}")
        return len(found)

    return once


def rate_of(work: Callable[[], object], lines: Sequence[str]) -> float:
    """Lines per second."""
    began = time.perf_counter()
    work()
    return len(lines) / (time.perf_counter() - began)


def side_of(name: str, rates: dict, counts: dict, peaks: dict) -> dict:
    """Rates, memory and ratios to the peers of one side."""
    peers = (sides.ONE, sides.BATCHED, PEER)
    return {
        "lines": counts[name],
        **summary(rates[name]),
        "over": {peer: compare(rates[name], rates[peer]) for peer in peers},
        "peak_mb": peaks[name],
    }


def run_side(options: Options) -> dict:
    """The peak memory of this process after one side has run; of a call a line, two do."""
    folder, name = Path(options.folder), options.side
    if name == GENERATE:
        run_generate(folder)
    elif name == PEER:
        return sides.fairseq_generate(folder, options.batch, options)
    else:
        if name == "ours, fairseq float32":
            quiet_imports()
        count = 2 if name == sides.ONE else lines_of(name, options.sentences)
        call = sides.open_side(name, folder, options.threads, options.batch)
        side_run(call, read(folder / "lines")[:count])()
    return {"peak_mb": status()["VmHWM"] / 1024}


if __name__ == "__main__":
    run(main)
