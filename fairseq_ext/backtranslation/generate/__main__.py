"""Monolingual text and a reverse model make synthetic sources: as many lines as the text has, in its order.

python -m fairseq_ext.backtranslation.generate mono.zh SYNTH --model CKPT_ZH_EN/checkpoint_best.pt --mode beam
"""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from ext_common.checkpoints import load_plugin
from ext_common.cli import (
    Parser,
    UsageError,
    UserError,
    add_dataclass,
    from_args,
    progress,
    run,
    writing,
)
from fairseq_ext.backtranslation.assemble.checks import LEAST, typical_share
from fairseq_ext.backtranslation.generate import claims as claiming
from fairseq_ext.backtranslation.generate import mono as monolingual
from fairseq_ext.backtranslation.generate import sanity
from fairseq_ext.backtranslation.generate.chunks import MERGE, Chunks
from fairseq_ext.backtranslation.generate.claims import (
    Claims,
    Heart,
    Owner,
    device_of_rank,
    is_first_rank,
    pauses,
)
from fairseq_ext.backtranslation.generate.merge import merge, next_command, table
from fairseq_ext.backtranslation.generate.setup import clean, enter, finished_without, manifest_of
from fairseq_ext.backtranslation.generate.work import Worker
from fairseq_ext.backtranslation.models.backends import (
    describe_model,
    greedy,
    open_model,
)
from fairseq_ext.backtranslation.models.options import ModelOptions
from fairseq_ext.backtranslation.modes import MODES, Mode, make_mode
from fairseq_ext.translation.prepare.leaks import Guard
from fairseq_ext.translation.text import identify
from fairseq_ext.translation.text.languages import check_code
from fairseq_ext.translation.text.normalise import language

# These change how fast DEST comes about, or are part of what describe_model says.
_NOT_IN_PLAN = (
    "device",
    "threads",
    "max_tokens",
    "user_dir",
    "backend",
    "compute_type",
    "shortlist",
)

EPILOG = """
modes (--mode, --mode-options 'key=value,…'):
{modes}

MONO is UTF-8 text, a sentence a line (.gz and .zst are unpacked), - the standard input; only a newline
ends a line. DEST gets
  real.LANG         the bytes of MONO, unpacked
  synthetic.LANG    a line for each of them, empty where there is none that can be used; with --nbest k
                    also synthetic.2.LANG to synthetic.k.LANG
  rejects.jsonl     number (from 1) and reason for each that cannot be used
  provenance.jsonl  number, model, mode and score (mean log-probability of a piece, base e) of each line
  manifest.json     inputs, options, counts, versions

Draws belong to a line: they depend on --seed, --round and its number, not on batches or processes. The
same command, run any number of times at once, on one machine or on several that share DEST, under
torchrun or SLURM, shares the work; killed at any moment and run again, it continues, and the files are
the same bytes. A run that is finished is left as it is.
Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.
"""


@dataclass
class GenerateOptions(ModelOptions):
    """Options of `generate`."""

    model: Optional[str] = field(
        default=None,
        metadata={
            "help": "reverse model: checkpoint of fairseq-train (or several: a.pt:b.pt), folder of "
            "Hugging Face or CTranslate2"
        },
    )
    mode: str = field(default="beam", metadata={"help": "how to write; the modes are below"})
    mode_options: Optional[str] = field(
        default=None, metadata={"help": "options of the mode, such as k=10,temperature=0.9"}
    )
    lang: Optional[str] = field(
        default=None, metadata={"help": "language of MONO; none: the one that the model reads"}
    )
    guard: Optional[str] = field(
        default=None,
        metadata={
            "help": "prepared bitext: lines of MONO that its valid or test has are not to be used"
        },
    )
    nbest: int = field(default=1, metadata={"help": "synthetic lines for each line"})
    seed: int = field(default=1, metadata={"help": "seed of all draws"})
    round: int = field(
        default=1, metadata={"help": "round of iterated back-translation; each draws anew"}
    )
    chunk_lines: int = field(
        default=1000, metadata={"help": "lines that a process claims at a time"}
    )
    sanity_check: bool = field(
        default=True,
        metadata={
            "help": "stop where MONO is in another script than its language, and where most of the first "
            "20 lines become garbage by greedy search"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("--model is missing: give the model that reads the language of MONO")
        if self.lang is not None:
            check_code(self.lang, "--lang")
        for name in ("nbest", "round", "chunk_lines"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, name)}")


def main(argv: list[str]) -> int:
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.backtranslation.generate",
        description=__doc__,
        epilog=EPILOG.format(modes=MODES.describe()),
    )
    parser.add_argument("mono", metavar="MONO", help="text file, - for the standard input")
    parser.add_argument("dest", metavar="DEST", help="folder to write")
    add_dataclass(parser, GenerateOptions)
    args = parser.parse_args(argv)
    options = from_args(GenerateOptions, args)
    fresh, manifest = generate(args.mono, args.dest, options)
    if is_first_rank(os.environ):
        if not fresh:
            print(f"{args.dest} is already done")
        print(table(manifest))
        print(f"next: {next_command(Path(args.dest), options.guard)}")
    return 0


def generate(
    source: str, dest: str | os.PathLike, options: GenerateOptions
) -> tuple[bool, dict[str, Any]]:
    """Do, or help to do, what is left of `dest`; (whether there was anything left, its manifest)."""
    dest = Path(dest)
    monolingual.check(source)
    load_plugin(options.user_dir)
    options = dataclasses.replace(options, device=device_of_rank(options.device, os.environ))
    mode = make_mode(options.mode, options.mode_options)
    model = describe_model(options.model, options)
    real = real_language(options, model)
    guard = Guard(options.guard, real) if options.guard else None
    owner = Owner.this()
    plan = make_plan(options, mode, model, real, guard)
    with writing(dest), Heart(claiming.HEARTBEAT) as heart:
        chunks = enter(dest, source, plan, owner, heart, claiming.PATIENCE)
        if chunks is None:
            return False, manifest_of(dest)
        try:
            share(dest, source, chunks, mode, guard, owner, heart, options)
        except OSError as error:
            # this process was paused, and the others have finished without it
            if error.errno not in claiming.GONE or not finished_without(dest):
                raise
        except KeyboardInterrupt:
            print("the same command continues where this one stopped", file=sys.stderr)
            raise
    clean(dest, owner, claiming.PATIENCE)
    return True, manifest_of(dest)


def share(
    dest: Path,
    source: str,
    chunks: Chunks,
    mode: Mode,
    guard: Guard | None,
    owner: Owner,
    heart: Heart,
    options: GenerateOptions,
) -> None:
    """Translate chunks until all are done, by whomever; then merge, or wait for who does."""
    mode.stream = chunks.plan.get("stream")
    pieces = Claims(chunks.folder, owner, heart, claiming.PATIENCE)
    before = chunks.done_lines()
    if before < chunks.lines:
        if options.sanity_check:
            check_language(chunks.read(0), chunks.plan["real_lang"], source)
        with Meter(chunks.lines, before, is_first_rank(os.environ)) as meter:
            model = open_model(options.model, options)
            if options.sanity_check:
                lines = chunks.read(0)
                sanity.check(
                    lambda some: greedy(model, some), lines, model.target_lang, options.model
                )

            def judge(line: str) -> str | None:
                return guard(line) if guard else None

            Worker(chunks, pieces, model, mode, judge).run(meter.show)
    last = Claims(chunks.folder / MERGE, owner, heart, claiming.PATIENCE)
    waits = pauses()
    try:
        while manifest_of(dest) is None:
            if not (claim := last.take()):
                time.sleep(next(waits))
            elif manifest_of(dest) is None:
                merge(dest, chunks, claim, source, options)
    except BaseException:
        last.put_back_all()
        raise


class Meter:
    """Progress over all lines, done by whomever; a context."""

    def __init__(self, lines: int, before: int, visible: bool) -> None:
        self._shown = before
        if before and visible:
            print(f"{before:,} of {lines:,} lines are there already", file=sys.stderr)
        self._bar = progress(range(0), "generate", "lines", total=lines - before)
        self._visible = visible

    def show(self, done: int) -> None:
        """`done` lines of all; never counts back."""
        if self._visible and done > self._shown:
            self._bar.update(done - self._shown)
            self._shown = done

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def real_language(options: GenerateOptions, model: Mapping[str, Any]) -> str:
    """The language of MONO; UserError where that of the model is another or not known."""
    reads, writes = model["source_lang"], model["target_lang"]
    if not writes:
        raise UserError(f"{options.model} does not say what it writes: give --model-target")
    if not (reads or options.lang):
        raise UserError(f"{options.model} does not say what it reads: give --model-source")
    if reads and options.lang and language(reads) != language(options.lang):
        raise UsageError(
            f"{options.model} reads {reads} and writes {writes}, and the text is {options.lang}: give "
            f"a model that reads {options.lang}"
        )
    return options.lang or reads


def check_language(lines: Sequence[str], lang: str, name: str) -> None:
    """UserError where typical lines are in another language, or its script."""
    share = typical_share(lines, lang)
    if share < LEAST:
        raise UserError(
            f"{name} is not {lang}, which the model reads: {share:.0%} of the letters of a typical line are "
            "of its script; give text of that language (--no-sanity-check where it is written that way)"
        )
    remedy = " (--no-sanity-check where it is of that language all the same)"
    identify.check_language(lines, lang, name, remedy=remedy)


def make_plan(
    options: GenerateOptions,
    mode: Mode,
    model: Mapping[str, Any],
    real: str,
    guard: Guard | None,
) -> dict[str, Any]:
    """What, beside MONO, decides the bytes of DEST but for its manifest; equal plans, equal folders."""
    names = [f.name for f in dataclasses.fields(ModelOptions) if f.name not in _NOT_IN_PLAN]
    return {
        "model": dict(model),
        "real_lang": real,
        "synthetic_lang": model["target_lang"],
        "mode": {"name": mode.name, **mode.options},
        "round": options.round,
        "seed": options.seed,
        **({"stream": mode.stream} if mode.uses_draws else {}),
        "nbest": options.nbest,
        "guard": guard.sha256 if guard else None,
        "chunk_lines": options.chunk_lines,
        # a folder of before `split` was there goes on
        "model_options": {
            n: getattr(options, n) for n in names if n != "split" or not options.split
        },
    }


if __name__ == "__main__":
    run(main)
