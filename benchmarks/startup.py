"""How long one file, one line, one image take, beside the same commands of another version of this project.

    python -m benchmarks.startup --before OTHER_CHECKOUT

Each command runs in a process of its own, the sides in turn; what counts is the median above that of a bare
`import torch`, which nobody can go below. Wall seconds depend on what the machine does besides; the CPU
seconds of the process do so less, and are given too. The models are untrained, of the sizes of the recipes,
and kept in --folder. Threads are left to the commands (OMP_NUM_THREADS and OMP_WAIT_POLICY are taken out).
"""

import datetime
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "startup.jsonl"
LINES = ("the old man sees a big red house .", "we buy new books and cold fish today .")
SETTLED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@dataclass
class Options:
    """What to compare and where the result goes."""

    before: Optional[str] = field(
        default=None, metadata={"help": "folder of the other checkout; none: ours alone"}
    )
    rounds: int = field(
        default=7, metadata={"help": "rounds, in each of which every side runs once"}
    )
    only: Optional[str] = field(default=None, metadata={"help": "one command, by name"})
    output: str = field(
        default=str(RESULT), metadata={"help": "file of lines of JSON for the figures"}
    )
    folder: Optional[str] = field(
        default=None, metadata={"help": "where data and models are; none: a new temporary folder"}
    )


class Case(NamedTuple):
    """A command, and the share of the time before that it may take; None for one that needs no torch."""

    name: str
    words: list[str]
    goal: Optional[float]
    text: str = ""


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m benchmarks.startup",
        description=__doc__,
    )
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    sides = {"ours": ROOT}
    if options.before:
        sides["before"] = Path(options.before).resolve()
        if not (sides["before"] / "ext_common").is_dir():
            raise UserError(f"--before {options.before} is no checkout of this project")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).resolve()
        cases = [c for c in make_cases(folder) if options.only in (None, c.name)]
        if not cases:
            raise UserError(f"--only {options.only} is none of the commands")
        figures = measure(cases, sides, options.rounds, folder)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        # folders of one machine are of no use to a reader
        "command": f"python -m benchmarks.startup --before CHECKOUT --rounds {options.rounds}",
        "versions": versions(),
        "rounds": options.rounds,
        **figures,
    }
    Results(options.output).put({"run": "startup", **record})
    print(table(record))


def measure(cases, sides, rounds, folder):
    """Median wall and CPU seconds of `import torch` and of every case on every side, and the shares."""
    bare = [sys.executable, "-c", "import torch"]
    jobs = [("torch", "ours", bare, "")]
    for case in cases:
        command = [sys.executable, "-m", *case.words]
        jobs += [(case.name, side, command, case.text) for side in sides]
    taken = {(name, side): [] for name, side, _, _ in jobs}
    order = random.Random(1)
    # the first round warms the disk's cache and lets CTranslate2 convert
    for number in range(rounds + 1):
        order.shuffle(jobs)
        for name, side, command, text in jobs:
            shutil.rmtree(folder / "drawn", ignore_errors=True)
            seconds = timed(command, sides[side], text, folder)
            if number:
                taken[name, side].append(seconds)
    medians = {
        key: [statistics.median(one) for one in zip(*several, strict=True)]
        for key, several in taken.items()
    }
    torch_wall, torch_cpu = medians["torch", "ours"]
    found = []
    for case in cases:
        row = {"name": case.name, "goal": case.goal, "sides": {}}
        for side in sides:
            wall, cpu = medians[case.name, side]
            above = {"above_torch": wall - torch_wall, "cpu_above_torch": cpu - torch_cpu}
            row["sides"][side] = {"wall": wall, "cpu": cpu, **above}
        # a command without torch takes less than torch alone
        if "before" in sides and case.goal is not None:
            ours, before = row["sides"]["ours"], row["sides"]["before"]
            row["share"] = ours["above_torch"] / before["above_torch"]
            row["cpu_share"] = ours["cpu_above_torch"] / before["cpu_above_torch"]
        found.append(row)
    return {"torch": {"wall": torch_wall, "cpu": torch_cpu}, "commands": found}


def timed(command, side, text, folder):
    """(wall, CPU) seconds of a command with the packages of the checkout `side`."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTLED}
    environment["PYTHONPATH"] = str(side)
    began = time.perf_counter()
    with open(folder / "output.txt", "wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
        )
        child.stdin.write(text.encode())
        child.stdin.close()
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    if status:
        said = (folder / "output.txt").read_text(errors="replace")
        raise UserError(f"{' '.join(command)} failed in {side}: {said[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime


def make_cases(folder):
    """The commands, with the models that they use."""
    folder.mkdir(parents=True, exist_ok=True)
    speaker, translation, diffusion = (
        speaker_model(folder),
        translation_model(folder),
        diffusion_model(folder),
    )
    recording = next((folder / "recordings").rglob("*.wav"))
    translate = ["fairseq_ext.translation.translate", "-", "-", "--path", str(translation)]
    # an untrained model does not end by itself
    translate += ["--max-len-a", "1", "--max-len-b", "5"]
    return [
        Case(
            "identify",
            ["fairseq_ext.speaker.identify", str(recording), "--path", str(speaker)],
            0.4,
        ),
        Case("translate", translate, 0.7, LINES[0] + "\n"),
        Case(
            "translate ctranslate2", [*translate, "--backend", "ctranslate2"], None, LINES[0] + "\n"
        ),
        Case(
            "sample", ["diffusion_ext.sample", "drawn", "--path", str(diffusion), "--num", "1"], 0.4
        ),
    ]


def speaker_model(folder):
    """checkpoint_last.pt of the default network after one update on eight hums of four people."""
    path = folder / "speaker" / "checkpoint_last.pt"
    if path.exists():
        return path
    draw = random.Random(1)
    for person in range(4):
        for number in range(4):
            place = folder / "recordings" / f"p{person}" / f"{number}.wav"
            place.parent.mkdir(parents=True, exist_ok=True)
            with wave.open(str(place), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                noise = (
                    draw.randrange(-9000, 9000).to_bytes(2, "little", signed=True)
                    for _ in range(32000)
                )
                file.writeframes(b"".join(noise))
    python(
        "fairseq_ext.speaker.prepare",
        folder / "recordings",
        folder / "voices",
        "--layout",
        "folder",
    )
    train(
        folder / "voices",
        f"--user-dir {ROOT}/fairseq_ext --task speaker_id --arch conformer_speaker --criterion am_softmax"
        f" --optimizer adam --batch-size 8 --epoch-updates 1 --save-dir {path.parent}",
    )
    return path


def translation_model(folder):
    """checkpoint_last.pt of a Transformer of configs/translation/model/tiny.yaml after one update."""
    path = folder / "translation" / "checkpoint_last.pt"
    if path.exists():
        return path
    draw, words = random.Random(1), " ".join(LINES).split()
    rows = [" ".join(draw.choices(words, k=draw.randrange(5, 12))) for _ in range(3000)]
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(f"{row}\t{row.upper()}\n" for row in rows), encoding="utf-8")
    languages = ("--source-lang", "en", "--target-lang", "de", "--spm-size", "300")
    python(
        "fairseq_ext.translation.prepare",
        pairs,
        folder / "bitext",
        *languages,
        "--filters",
        "length",
    )
    both = "--{0}-layers 4 --{0}-embed-dim 128 --{0}-ffn-embed-dim 256 --{0}-attention-heads 4"
    train(
        folder / "bitext",
        f"--user-dir {ROOT}/fairseq_ext --task translation_spm --arch transformer_iwslt_de_en"
        f" {both.format('encoder')} {both.format('decoder')} --share-all-embeddings"
        " --encoder-normalize-before --decoder-normalize-before --optimizer adam --max-tokens 1000"
        f" --criterion label_smoothed_cross_entropy --save-dir {path.parent}",
    )
    return path


def diffusion_model(folder):
    """checkpoint_last.pt of the network of configs/diffusion/digits.yaml after one update."""
    path = folder / "diffusion" / "checkpoint_last.pt"
    if not path.exists():
        flags = (
            "--image-dataset digits --image-size 16 --channels 1 --sample-interval 0 --batch-size 8"
        )
        size = "--base-channels 32 --channel-mults 1,2,2 --blocks 1 --attention-resolutions 8 --max-update 1"
        where = ("--save-dir", path.parent)
        python("diffusion_ext.train", folder / "digits", *flags.split(), *size.split(), *where)
    return path


def train(data, flags):
    common = "--max-update 1 --disable-validation --num-workers 0 --cpu --log-format none"
    python("fairseq_cli.train", data, *flags.split(), *common.split())


def python(module, *words):
    """Run `python -m`; UserError with the end of what it said where it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")


def table(record):
    """The figures for a terminal."""
    lines = [f"import torch: {record['torch']['wall']:.2f} s ({record['torch']['cpu']:.2f} s CPU)"]
    for row in record["commands"]:
        bare = "above_torch" if row["goal"] else "wall", "cpu_above_torch" if row["goal"] else "cpu"
        parts = [
            f"{side} {of[bare[0]]:.2f} s ({of[bare[1]]:.2f} s CPU)"
            for side, of in row["sides"].items()
        ]
        share = ""
        if "share" in row:
            share = f": {row['share']:.0%} ({row['cpu_share']:.0%} CPU), goal {row['goal']:.0%}"
        above = ", above torch" if row["goal"] else ", in all"
        lines.append(f"{row['name']}{above}: {', '.join(parts)}{share}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
