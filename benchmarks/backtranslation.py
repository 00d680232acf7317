"""Back-translation beside what people do without it: speed, memory, and quality of int8.

python -m benchmarks.backtranslation                               speed, random weights
python -m benchmarks.backtranslation --memory                      peak memory of 1e4, 1e5 and 1e6 lines
python -m benchmarks.backtranslation --quality --path CKPT --data DATA

Speed: models of Marian's size (d 512, 6+6 layers, 32,000 pieces) with random weights; lines joined of
sentences of Tatoeba to 20 pieces on the average; a beam of 4; every output is forced to 25 pieces. On one side
Hugging Face's `generate`, a call a line, as course notes do, and in batches in file order, with the best of
three sizes; and fairseq-generate, with the best of its --max-tokens. On the other ours, on each back end with
its default batches. Sides run in alternation with the same number of threads; ratios are those of medians.

What is timed: from lines of text to lines of text, after the model is loaded; for fairseq-generate what it
reports itself, which is its search alone, in a process of its own. Hugging Face makes 25 steps for 25 pieces,
fairseq and ours one more, for </s>. A call a line is so slow that it gets few lines, and CTranslate2, of whose
batches each thread decodes its own, gets more, as it would in any corpus; rates are per line. Peak memory is
that of a whole fresh process, loading included. Conversion for CTranslate2 happens before.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import List, Optional

from benchmarks import backtranslation_sides as sides
from benchmarks.backtranslation_cases import Size, write_case
from benchmarks.backtranslation_report import table
from benchmarks.common import compare, in_fresh_process, machine, summary
from benchmarks.translation import CORPUS, PEER, default_corpus, generate, quiet_imports, say
from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import atomic_json, versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "backtranslation_speed.json"
BATCHES = (16, 32, 64)
MAX_TOKENS = (500, 1000, 4000)
GOALS = {sides.ONE: 30.0, sides.BATCHED: 2.0}
# lines of a side as a share of --sentences
SHARES = {sides.ONE: 1 / 8, "ours, ctranslate2 float32": 3, "ours, ctranslate2 int8": 3}


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=3, metadata={"help": "rounds, in each of which every side runs once"}
    )
    sentences: int = field(
        default=64,
        metadata={"help": "lines of the speed part; a call a line gets 1/8, CTranslate2 3 times"},
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads; none: one for each CPU"}
    )
    corpus: Optional[str] = field(
        default=None,
        metadata={"help": f"tab-separated bitext; none: {CORPUS} in FAIRSEQ_EXT_DATA"},
    )
    memory: bool = field(default=False, metadata={"help": "memory of `generate` with a stub"})
    lines: List[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000],
        metadata={"help": "lines of each run of --memory"},
    )
    quality: bool = field(default=False, metadata={"help": "BLEU of --path on each back end"})
    path: Optional[str] = field(default=None, metadata={"help": "trained checkpoint, for quality"})
    data: Optional[str] = field(
        default=None, metadata={"help": "prepared folder whose test split measures quality"}
    )
    beam: int = field(default=5, metadata={"help": "hypotheses kept, for quality"})
    record: bool = field(default=False, metadata={"help": "write the figures to --output"})
    output: str = field(
        default=str(RESULT), metadata={"help": "JSON file; a run replaces its own part of it"}
    )
    folder: Optional[str] = field(
        default=None, metadata={"help": "where 1 GB is written; none: the temporary folder"}
    )
    tiny: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, no more"})
    side: Optional[str] = field(
        default=None, metadata={"help": "used inside: run one side on --folder, print JSON"}
    )
    batch: Optional[int] = field(default=None, metadata={"help": "used inside: lines a call"})

    def __post_init__(self):
        for name in ("rounds", "sentences", "threads", "beam"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not self.lines or min(self.lines) < 1:
            raise ValueError("--lines needs numbers of at least 1")
        if self.quality != bool(self.path and self.data):
            raise ValueError("--quality, --path and --data belong together")
        if self.quality and self.memory:
            raise ValueError("--quality and --memory are runs of their own")
        self.threads = self.threads or len(os.sched_getaffinity(0))


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.backtranslation", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if options.side:
        print(json.dumps(run_alone(options)))
        return
    began = time.monotonic()
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.backtranslation", *argv]),
        "versions": {**versions(), **{name: metadata.version(name) for name in NAMED}},
        "tiny": options.tiny,
        "threads": options.threads,
    }
    folder = Path(tempfile.mkdtemp(prefix="backtranslation_benchmark_", dir=options.folder))
    part = "memory" if options.memory else "quality" if options.quality else "speed"
    measure = {"memory": measure_memory, "quality": measure_quality, "speed": measure_speed}[part]
    try:
        figures |= measure(folder.resolve(), options)
    finally:
        shutil.rmtree(folder)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(part, figures))
    print(f"\n{figures['machine']}; {figures['seconds']:.0f} s in all")
    if options.record:
        record(Path(options.output), part, figures)
        print(f"written to {options.output}")


NAMED = ("transformers", "ctranslate2")


def record(path: Path, part: str, figures: dict) -> None:
    """Replace one part of the file, and keep the others."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    atomic_json(path, {**before, part: figures})


def read_corpus_of(options):
    from benchmarks.translation_cases import read_corpus

    path = options.corpus or default_corpus()
    if options.corpus and not os.path.exists(path):
        raise UserError(f"{path} does not exist: give a tab-separated bitext with --corpus")
    if options.tiny or not os.path.exists(path):
        return "invented, 2 to 14 words a sentence, uniformly", read_corpus(None)
    return path, read_corpus(path)


# --- speed -----------------------------------------------------------------------------------------


def measure_speed(folder: Path, options: Options) -> dict:
    """Sentences per second, ratios and peak memory of every side."""
    quiet_imports()
    size = Size.tiny() if options.tiny else Size()
    counts = counts_of(options.sentences)
    corpus, pairs = read_corpus_of(options)
    say("making models with random weights")
    case = write_case(folder, pairs, size, max(counts.values()), counts[PEER])
    lines = (folder / "lines").read_text(encoding="utf-8").split("\n")[:-1]
    opened = {}
    for name in (sides.ONE, *sides.OURS):
        say(f"opening {name}")
        opened[name] = sides.open_side(name, folder, size.length, options.threads, None)
        opened[name](lines[:2])  # warm
    say(f"looking for the batch size that suits {sides.BATCHED}")
    tried = {}
    for batch in BATCHES:
        opened[batch] = sides.open_side(
            sides.BATCHED, folder, size.length, options.threads, batch
        )
        opened[batch](lines[:2])
        tried[batch] = rate_of(opened[batch], lines[: counts[sides.BATCHED]])
    opened[sides.BATCHED] = opened[max(tried, key=tried.get)]
    search = PeerSearch(folder / "data", size.length, options)
    runs = {
        name: (lambda name=name: rate_of(opened[name], lines[: counts[name]])) for name in counts
    }
    runs[PEER] = search.rate
    rates = alternated(runs, options.rounds)
    peaks = {PEER: search.peak_mb}
    for name in counts.keys() - {PEER}:
        say(f"memory of {name}")
        flags = ["-m", "benchmarks.backtranslation", "--side", name, "--folder", str(folder)]
        flags += ["--sentences", str(memory_lines(name, options.sentences))]
        flags += ["--threads", str(options.threads), *(["--tiny"] if options.tiny else [])]
        flags += ["--batch", str(max(tried, key=tried.get))]
        peaks[name] = in_fresh_process(flags, ROOT)["peak_mb"]
    return {
        "corpus": corpus,
        **case,
        "beam": sides.BEAM,
        "rounds": options.rounds,
        "goals": GOALS,
        "rates_of_batches": tried,
        "rates_of_max_tokens": search.tried,
        "sides": {
            name: {
                "sentences": counts[name],
                **summary(rates[name]),
                "over": {
                    peer: compare(rates[name], rates[peer])
                    for peer in (sides.ONE, sides.BATCHED, PEER)
                },
                "peak_mb": peaks[name],
            }
            for name in counts
        },
    }
