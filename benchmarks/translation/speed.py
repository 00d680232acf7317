"""`translation.translate` beside `fairseq-generate`: speed and memory, also with a trained model's quality.

python -m benchmarks.translation                                   speed, random weights
python -m benchmarks.translation --path CKPT --bitext DATA         a trained model's test split, too

Speed: a Transformer of base size (d 512, 6+6 layers) with random weights; sentences of real lengths
(English of Tatoeba, SentencePiece as `prepare` would make it); every output is forced to the same
number of pieces, the mean of the real targets. Greedy and with a beam of 5. Each side runs in a process
of its own, in alternation, with the same number of threads; the ratio is that of the medians.

What is timed: for fairseq-generate what it reports itself ("Translated … sentences/s"), which is its
search alone, without reading, writing or making text, with the best of three --max-tokens. For ours all
from lines of text to lines of text, after the model is loaded, with our default batch size. Peak
memory is that of the whole process, loading included. Conversion for CTranslate2 happens before.

A trained model translates its test split, every line as far as it likes, up to 200 pieces. One that
CTranslate2 cannot run is translated by our own decoder, in bfloat16 too.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

from benchmarks.common import compare, machine, processor, summary
from benchmarks.recorded import RESULTS, ROOT, SHARED, Results
from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "translation_speed.jsonl"
CORPUS = "cmn-eng/cmn.txt"
PEER = "fairseq-generate"
# ours → backend and compute type
SIDES = {
    "fairseq float32": ("fairseq", "float32"),
    "ctranslate2 float32": ("ctranslate2", "float32"),
    "ctranslate2 int8": ("ctranslate2", "int8"),
}
OWN_SIDES = {
    "fairseq float32": ("fairseq", "float32"),
    "fairseq bfloat16": ("fairseq", "bfloat16"),
}
BEAMS = (5, 1)
MAX_TOKENS = (1000, 4000, 12000)
GOAL = 2.5
GOAL_BLEU = 0.3


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=3, metadata={"help": "rounds, in each of which every side runs once"}
    )
    sentences: Optional[int] = field(
        default=None, metadata={"help": "sentences of the speed part; none: 600"}
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads; none: one for each CPU"}
    )
    corpus: Optional[str] = field(
        default=None,
        metadata={"help": f"tab-separated bitext; none: {CORPUS} in FAIRSEQ_EXT_DATA"},
    )
    path: Optional[str] = field(default=None, metadata={"help": "trained checkpoint, for quality"})
    bitext: Optional[str] = field(
        default=None, metadata={"help": "prepared folder whose test split measures quality"}
    )
    speed: bool = field(default=True, metadata={"help": "measure speed and memory"})
    output: str = field(default=str(RESULT), metadata={"help": "JSON-lines file for the figures"})
    folder: Optional[str] = field(
        default=None, metadata={"help": "where 1 GB is written; none: the temporary folder"}
    )
    quick: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, no more"})
    side: Optional[str] = field(
        default=None, metadata={"help": "used inside: run one side on --folder, print JSON"}
    )
    decode: Optional[str] = field(
        default=None, metadata={"help": "used inside: how to decode, JSON"}
    )


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.translation", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if options.side:
        print(json.dumps(run_ours(options)))
        return
    if options.rounds < 1:
        raise UsageError("--rounds must be at least 1")
    if bool(options.path) != bool(options.bitext):
        raise UsageError("quality needs both --path and --bitext")
    began = time.monotonic()
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "python -m benchmarks.translation " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "quick": options.quick,
        "rounds": options.rounds,
        "threads": options.threads or len(os.sched_getaffinity(0)),
    }
    folder = Path(tempfile.mkdtemp(prefix="translation_benchmark_", dir=options.folder)).resolve()
    try:
        if options.speed:
            figures["speed"] = measure_speed(folder / "speed", options)
        if options.path:
            figures["quality"] = measure_quality(folder / "quality", options)
    finally:
        shutil.rmtree(folder)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(figures))
    part = "speed" if options.speed else "trained"
    Results(options.output).put({"run": f"{part} on {processor()}", **figures})
    print(f"{figures['machine']}; written to {options.output}")


# --- speed -----------------------------------------------------------------------------------------


def measure_speed(folder, options):
    """Sentences per second and peak memory of every side, greedy and with a beam."""
    statistics = make_case(folder, options)
    # converts once, which is not timed
    for side in SIDES:
        if SIDES[side][0] == "ctranslate2":
            in_process(side, folder, folder / "model.pt", dict(beam=1, max_len_b=1), options)
    results = []
    length = statistics["length"]
    for beam in BEAMS:
        decode = dict(beam=beam, min_len=length, max_len_a=0, max_len_b=length)
        say(f"beam {beam}: looking for the batch size that suits {PEER}")
        tried = {
            tokens: generate(folder, folder / "model.pt", {**decode, "max_tokens": tokens}, options)
            for tokens in (MAX_TOKENS[:1] if options.quick else MAX_TOKENS)
        }
        best = max(tried, key=lambda tokens: tried[tokens]["rate"])
        decode["max_tokens"] = best
        runs = alternating(folder, folder, folder / "model.pt", SIDES, decode, options)
        results.append(
            {
                "beam": beam,
                "max_tokens_of_peer": best,
                "rates_of_peer": {tokens: made["rate"] for tokens, made in tried.items()},
                "goal": GOAL,
                "sides": {name: side_of(made, runs[PEER]) for name, made in runs.items()},
            }
        )
    return {**statistics, "results": results}


def alternating(data, folder, checkpoint, sides, decode, options):
    """The peer, which reads `data`, and our sides, which read text in `folder`, in turn: name → runs."""
    runs = {name: [] for name in (PEER, *sides)}
    ours = {name: value for name, value in decode.items() if name != "max_tokens"}
    order = random.Random(1)
    for number in range(options.rounds):
        names = list(runs)
        order.shuffle(names)
        for name in names:
            say(f"beam {decode['beam']}, round {number + 1} of {options.rounds}: {name}")
            if name == PEER:
                made = generate(data, checkpoint, decode, options)
            else:
                made = in_process(name, folder, checkpoint, ours, options)
            runs[name].append(made)
    return runs


def side_of(made, peer):
    """Rates, memory and ratio to the peer of one side's runs."""
    rates = [one["rate"] for one in made]
    return {
        **summary(rates),
        **compare(rates, [one["rate"] for one in peer]),
        "peak_mb": max(one["peak_mb"] for one in made),
    }


def make_case(folder, options):
    """The folder of the speed part; its statistics."""
    from benchmarks.translation.cases import Size, read_corpus, write_case

    quiet_imports()
    size = Size.quick() if options.quick else Size()
    if options.sentences:
        size = Size(**{**asdict(size), "sentences": options.sentences})
    corpus = None if options.quick else options.corpus or default_corpus()
    if corpus and not os.path.exists(corpus):
        raise UserError(f"{corpus} does not exist: give a tab-separated bitext with --corpus")
    say("making a model with random weights")
    return {
        "corpus": named(corpus) if corpus else "invented",
        **write_case(folder, read_corpus(corpus), size),
    }


def default_corpus():
    return str(SHARED / CORPUS)


def named(path):
    """A file of the data by its name there, whatever the folder is called here."""
    path = Path(path).resolve()
    data = SHARED.resolve()
    return str(path.relative_to(data) if path.is_relative_to(data) else path.name)


# --- quality ---------------------------------------------------------------------------------------


def measure_quality(folder, options):
    """BLEU of every way of translating the test split of --bitext, and the differences."""
    from fairseq_ext.translation.corpus import Corpus

    corpus = Corpus.open(options.bitext)
    source, target = languages_of(options.path)
    lines = read(corpus.text("test", source))
    references = read(corpus.text("test", target))
    folder.mkdir(parents=True)
    # of its own, so that nothing is written beside the user's checkpoint
    checkpoint = folder / "model.pt"
    shutil.copyfile(options.path, checkpoint)
    (folder / "text").mkdir()
    (folder / "text" / f"test.{source}").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    sides = sides_of(checkpoint)
    results = []
    for beam in BEAMS[-1:] if options.quick else BEAMS:
        # fairseq's own limit, which is the same for every line: with an A it depends on the batch
        decode = dict(beam=beam, max_len_a=0, max_len_b=200, max_tokens=4000, source_lang=source)
        runs = alternating(Path(options.bitext), folder, checkpoint, sides, decode, options)
        found = {name: made[0]["hypotheses"] for name, made in runs.items()}
        for name, hypotheses in found.items():
            if len(hypotheses) != len(references):
                raise UserError(f"{name} gave {len(hypotheses)} lines for {len(references)}")
        scores = {name: bleu(hypotheses, references, target) for name, hypotheses in found.items()}
        results.append(
            {
                "beam": beam,
                "goal": GOAL_BLEU,
                "sides": {
                    name: {
                        **side_of(runs[name], runs[PEER]),
                        "bleu": scores[name],
                        "difference": scores[name] - scores[PEER],
                        "same_lines": same(found[name], found[PEER]),
                    }
                    for name in found
                },
            }
        )
    return {"sentences": len(lines), "source": source, "target": target, "results": results}


def sides_of(checkpoint):
    """Ours for a trained model, by what can run it."""
    from fairseq_ext.translation.decode.checkpoint import build_model, read_state
    from fairseq_ext.translation.decode.ctranslate_convert import unsupported

    quiet_imports()
    return OWN_SIDES if unsupported(build_model(read_state(checkpoint), checkpoint)) else SIDES


def bleu(hypotheses, references, lang):
    import sacrebleu

    from fairseq_ext.translation.score.metrics import tokenizer_for

    return sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenizer_for(lang)).score


def same(a, b):
    """Share of lines that are equal."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / max(1, len(a))


def languages_of(path):
    from fairseq_ext.translation.decode.checkpoint import read_state

    saved = read_state(path)["task_state"]["translation"]
    return saved["source_lang"], saved["target_lang"]


def read(path):
    return Path(path).read_text(encoding="utf-8").split("\n")[:-1]


# --- one run ---------------------------------------------------------------------------------------


def generate(data, checkpoint, decode, options):
    """One run of fairseq-generate: rate as it reports it, peak memory, hypotheses by line."""
    flags = [str(Path(sys.executable).with_name(PEER)), str(data)]
    flags += ["--user-dir", str(ROOT / "fairseq_ext"), "--task", "translation_spm"]
    flags += ["--path", str(checkpoint), "--gen-subset", "test", "--cpu", "--num-workers", "0"]
    flags += ["--required-batch-size-multiple", "1", "--no-progress-bar"]
    for name, value in decode.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    out, peak = timed(flags, options)
    rate = re.search(r"Translated ([\d,]+) sentences .* \(([\d.]+) sentences/s", out)
    found = dict(re.findall(r"^D-(\d+)\t[^\t\n]*\t(.*)$", out, re.MULTILINE))
    return {
        "rate": float(rate[2]),
        "sentences": int(rate[1].replace(",", "")),
        "peak_mb": peak,
        "hypotheses": [found.get(str(n), "") for n in range(len(found))],
    }


def in_process(side, folder, checkpoint, decode, options):
    """One run of ours in a process of its own."""
    flags = [sys.executable, "-m", "benchmarks.translation", "--side", side]
    flags += ["--folder", str(folder), "--path", str(checkpoint), "--decode", json.dumps(decode)]
    flags += ["--threads", str(options.threads or len(os.sched_getaffinity(0)))]
    out, peak = timed(flags, options)
    return {**json.loads(out.strip().splitlines()[-1]), "peak_mb": peak}


def run_ours(options):
    """Translate the test split of --folder: lines of text in, lines of text out."""
    from fairseq_ext.translation.decode.translator import DecodeOptions, Translator

    decode = json.loads(options.decode)
    lang = decode.pop("source_lang", "en")
    lines = read(Path(options.folder) / "text" / f"test.{lang}")
    backend, compute_type = {**SIDES, **OWN_SIDES}[options.side]
    translator = Translator.from_checkpoint(
        options.path, backend, compute_type=compute_type, threads=options.threads
    )
    decode = DecodeOptions(**decode)
    began = time.perf_counter()
    found = [translation.text for translation in translator.translate(lines, decode)]
    seconds = time.perf_counter() - began
    return {"rate": len(lines) / seconds, "sentences": len(lines), "hypotheses": found}


def timed(command, options):
    """(what a command prints, peak of its resident memory in MB)."""
    threads = str(options.threads or len(os.sched_getaffinity(0)))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": ":".join(filter(None, paths))}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{texts[0][-1000:]}{texts[1][-3000:]}")
    return texts[0] + "\n" + texts[1] if PEER in command[0] else texts[0], usage.ru_maxrss / 1024


def table(figures):
    """The figures for a terminal."""
    lines = []
    if "speed" in figures:
        speed = figures["speed"]
        lines.append(
            f"\nspeed: {speed['sentences']} sentences of {speed['source_pieces']:.1f} pieces,"
            f" outputs of {speed['length']}, {speed['parameters']:,} parameters,"
            f" {speed['vocabulary']:,} pieces, {figures['threads']} threads"
        )
        for result in speed["results"]:
            lines.append(f"beam {result['beam']} (goal {result['goal']:g} ×)")
            for name, side in result["sides"].items():
                lines.append(
                    f"  {name:<22}{side['median']:>9.1f} sentences/s  {side['ratio']:>6.2f} ×"
                    f" ({side['ratio_min']:.2f} to {side['ratio_max']:.2f})"
                    f"  peak {side['peak_mb']:>7.0f} MB"
                )
    if "quality" in figures:
        quality = figures["quality"]
        lines.append(
            f"\nquality: {quality['sentences']} sentences {quality['source']}-{quality['target']}"
        )
        for result in quality["results"]:
            lines.append(f"beam {result['beam']} (goal ± {result['goal']:g})")
            for name, side in result["sides"].items():
                lines.append(
                    f"  {name:<22}{side['median']:>9.1f} sentences/s  {side['ratio']:>6.2f} ×"
                    f"  BLEU {side['bleu']:6.2f}  {side['difference']:+.2f}"
                    f"  same lines {100 * side['same_lines']:5.1f} %"
                )
    return "\n".join(lines)


def quiet_imports():
    """Import fairseq without its messages."""
    import logging

    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    import fairseq  # noqa: F401

    logging.getLogger().setLevel(logging.ERROR)


def say(text):
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
