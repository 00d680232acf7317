"""Raw bitext becomes a folder to train on: filtered, split, with its SentencePiece models.

python -m fairseq_ext.translation.prepare corpus.tsv DATA --source-lang en --target-lang zh
python -m fairseq_ext.translation.prepare corpus.en corpus.zh DATA --source-lang en --target-lang zh
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, List, Optional

from ext_common.checkpoints import load_plugin
from ext_common.cli import (
    OptionError,
    Parser,
    UsageError,
    UserError,
    add_dataclass,
    from_args,
    run,
)
from ext_common.compat.messages import leave_out_harmless_warnings
from ext_common.folders import making
from ext_common.manifest import MANIFEST_NAME, sha256_file, write_manifest
from fairseq_ext.translation.prepare.build import fill
from fairseq_ext.translation.prepare.filter_chain import DEFAULT_FILTERS, FILTERS, FilterChain
from fairseq_ext.translation.prepare.folder import already_made
from fairseq_ext.translation.prepare.report import next_command, table
from fairseq_ext.translation.prepare.settings import HELD_OUT, Settings, settle
from fairseq_ext.translation.prepare.steps import Cleaner
from fairseq_ext.translation.text.languages import check_code
from fairseq_ext.translation.text.moses import detokeniser
from fairseq_ext.translation.text.normalise import CONVENTIONS
from fairseq_ext.translation.text.spm import COVERAGE, KINDS, check_symbols

# What may differ between two runs that write the same bytes.
RUN_ONLY = ("workers", "overwrite")
GIVEN = ("valid", "test")
# Options that were not there from the first.
LATER = ("character_coverage", "check_language", "detokenise", "fields")
EPILOG = """
INPUT is one file with both languages, or two parallel files, the source first; .gz and .zst are unpacked.
One file is, by its ending, a CSV (.csv, separated by comma, semicolon or tab), JSON Lines (.jsonl), a
translation memory (.tmx), a catalogue of gettext (.po), or else a table with tabs, in which quotes are text
unless a spreadsheet wrote them all.
Nothing in valid and test occurs in train on either side. The folder trains both directions
(fairseq-train -s zh -t en).

filters (--filters 'name; name:option=value,option=value', in this order; none: keep every pair):
{filters}

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class PrepareOptions:
    """What to read, what to leave out and how to divide the rest."""

    source_lang: str = field(metadata={"help": "language of the source, such as en"})
    target_lang: str = field(metadata={"help": "language of the target, such as zh"})
    columns: List[int] = field(
        default_factory=lambda: [1, 2],
        metadata={"help": "columns of source and target in a tab-separated INPUT, counted from 1"},
    )
    fields: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "names of source and target in JSON Lines (none: the languages, also inside "
            '"translation"), or of two columns in the first row of a table'
        },
    )
    normalise: str = field(
        default="standard",
        metadata={
            "help": f"convention of the text, one of {', '.join(CONVENTIONS.names())}; with --vocab-from "
            "its own"
        },
    )
    opencc: Optional[str] = field(
        default=None,
        metadata={
            "help": "convert the Chinese side with OpenCC: t2s (to simplified), s2t, tw2s, …"
        },
    )
    check_language: bool = field(
        default=True,
        metadata={"help": "refuse text that is of another language than is said (extra langid)"},
    )
    detokenise: bool = field(
        default=False,
        metadata={
            "help": "put text together again that Moses' tokenizer has cut (don &apos;t, @-@)"
        },
    )
    filters: str = field(
        default=DEFAULT_FILTERS, metadata={"help": "what removes pairs; see the list below"}
    )
    valid: Optional[List[str]] = field(
        default=None,
        metadata={"help": "file(s) with the pairs of valid, laid out like INPUT, used as they are"},
    )
    test: Optional[List[str]] = field(
        default=None,
        metadata={"help": "file(s) with the pairs of test, laid out like INPUT, used as they are"},
    )
    valid_fraction: Optional[float] = field(
        default=None,
        metadata={
            "help": "part of the pairs for valid, at least 100 pairs where there are 1,000; none: "
            f"{HELD_OUT}, but 0 with --vocab-from"
        },
    )
    test_fraction: Optional[float] = field(
        default=None, metadata={"help": "part of the pairs for test; none: as for valid"}
    )
    on_leak: str = field(
        default="refuse",
        metadata={
            "help": "pairs of INPUT of which a side is in a given valid or test, whole or nearly so; keep: "
            "for official splits, whose scores are told with them",
            "choices": ("refuse", "remove", "keep"),
        },
    )
    spm_kind: str = field(
        default="unigram", metadata={"help": "kind of SentencePiece model", "choices": KINDS}
    )
    spm_size: Optional[int] = field(
        default=None, metadata={"help": "size of the vocabulary; none: by the number of pairs"}
    )
    character_coverage: float = field(
        default=COVERAGE,
        metadata={
            "help": "part of the characters of the text that are pieces; rarer ones are spelled in bytes, "
            "but ASCII digits and punctuation never"
        },
    )
    joint: bool = field(
        default=True, metadata={"help": "one SentencePiece model for both languages"}
    )
    extra_symbols: List[str] = field(
        default_factory=lambda: ["<BT>"], metadata={"help": "pieces that no text can turn into"}
    )
    vocab_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "prepared folder whose models and dictionaries are used, and whose valid and test "
            "must not occur in INPUT"
        },
    )
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder whose Python modules register filters of your own"}
    )
    seed: int = field(default=1, metadata={"help": "of the split and of SentencePiece"})
    workers: Optional[int] = field(
        default=None, metadata={"help": "processes; none: one for each CPU"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace what was prepared before with other options"}
    )

    def __post_init__(self):
        for lang in (self.source_lang, self.target_lang):
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", lang):
                raise OptionError(
                    f"{lang!r} is no name for a language: letters, digits and _ are allowed (zh_Hant), "
                    "because fairseq separates languages by '-'"
                )
        check_code(self.source_lang, "--source-lang")
        check_code(self.target_lang, "--target-lang")
        if self.source_lang == self.target_lang:
            raise OptionError(f"source and target are both {self.source_lang}: give two languages")
        if len(self.columns) != 2 or min(self.columns) < 1:
            raise OptionError(f"columns {self.columns} must be two numbers from 1")
        if self.fields is not None and len(self.fields) != 2:
            raise OptionError(f"fields {self.fields} must be two names")
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"workers must be at least 1, got {self.workers}")
        if self.seed < 0:
            raise OptionError(f"seed {self.seed} must not be negative")
        if not 0.9 <= self.character_coverage <= 1:
            raise OptionError(f"character_coverage {self.character_coverage} must lie in [0.9, 1]")
        for name in ("valid", "test"):
            fraction, files = getattr(self, f"{name}_fraction"), getattr(self, name)
            if fraction is not None and not 0 <= fraction < 1:
                raise OptionError(f"{name}_fraction {fraction} must lie in [0, 1)")
            if fraction and files:
                raise OptionError(f"give --{name} or --{name}-fraction, not both")
        check_symbols(self.extra_symbols)

    @property
    def languages(self) -> tuple[str, str]:
        return self.source_lang, self.target_lang


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.translation.prepare",
        description=__doc__,
        epilog=EPILOG.replace("{filters}", FILTERS.describe()),
    )
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="one file of pairs, or two parallel"
    )
    parser.add_argument("dest", metavar="DEST", help="folder to write")
    add_dataclass(parser, PrepareOptions)
    leave_out_harmless_warnings()
    args = parser.parse_args(argv)
    options = from_args(PrepareOptions, args)
    prepare(args.inputs, args.dest, options)


def prepare(inputs, dest, options: PrepareOptions) -> dict[str, Any]:
    """Write DEST from one tab-separated or two parallel files and print the table.

    Returns the report that is printed and lies in manifest.json ("report"). DEST appears whole or not at
    all. Raises UserError, UsageError.
    """
    inputs, dest = [Path(path) for path in inputs], Path(dest)
    check_paths(inputs, dest, options)
    load_plugin(options.user_dir)
    settings = settle(options)
    chain = FilterChain(options.filters, *options.languages)
    cleaner = Cleaner(options.languages, settings.convention, options.detokenise)
    if options.detokenise:
        detokeniser(options.source_lang)  # a missing package is told before anything is read
    given = {name: [Path(path) for path in getattr(options, name) or ()] for name in GIVEN}
    hashes = {str(path): sha256_file(path) for path in [*inputs, *given["valid"], *given["test"]]}
    plan = make_plan(inputs, given, hashes, options, settings)
    with making(dest, lambda: already_made(dest, plan, options.overwrite)) as folder:
        if folder is None:
            print(f"{dest} is already prepared with these options and files: nothing to do")
            report = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8"))["report"]
        else:
            report = fill(folder, inputs, given, options, settings, chain, cleaner)
            write_manifest(
                folder,
                inputs=hashes,
                counts=report["counts"],
                options=without_run_only(options),
                seed=options.seed,
                split_sha256=report["split_sha256"],
                report=report,
                plan=plan,
            )
    print(table(report))
    print(f"\nwritten to {dest}; next:\n\n{next_command(dest, report['splits'])}")
    return report


def check_paths(inputs: list[Path], dest: Path, options: PrepareOptions) -> None:
    """UserError for files that are not there or not of the expected number."""
    if len(inputs) not in (1, 2):
        raise UsageError(
            f"expected one tab-separated INPUT or two parallel ones, got {len(inputs)}"
        )
    for name, paths in [("INPUT", inputs)] + [(f"--{n}", getattr(options, n) or []) for n in GIVEN]:
        if len(paths) > 2:
            raise UsageError(
                f"{name} is one tab-separated file or two parallel ones, got {len(paths)}"
            )
        for path in map(Path, paths):
            if path.is_dir():
                raise UserError(f"{path} is a folder: give a file of pairs as {name}")
            if not path.exists():
                raise UserError(f"{path} does not exist: give a file of pairs as {name}")
            if not path.is_file():
                raise UserError(
                    f"{path} is no ordinary file, and {name} is read twice: save it first"
                )
            if dest.exists() and path.samefile(dest):
                raise UsageError(
                    f"{path} is both {name} and DEST: give a folder to write as the last"
                )
        if len(paths) == 2 and Path(paths[0]).samefile(paths[1]):
            raise UsageError(f"{paths[0]} is given as source and as target: give two files")


def make_plan(inputs, given, hashes, options, settings: Settings) -> dict[str, Any]:
    """What decides the bytes of DEST; equal plans, equal folders."""
    by_content = {"vocab_from", *GIVEN}
    usual = asdict(PrepareOptions(*options.languages))
    chosen = {
        k: v
        for k, v in without_run_only(options).items()
        # a folder of before an option was there is recognised
        if k not in by_content and not (k in LATER and v == usual[k])
    }
    return {
        "inputs": [hashes[str(path)] for path in inputs],
        "given": {name: [hashes[str(path)] for path in paths] for name, paths in given.items()},
        "vocabulary": settings.fingerprint(),
        "options": chosen,
    }


def without_run_only(options: PrepareOptions) -> dict[str, Any]:
    return {key: value for key, value in asdict(options).items() if key not in RUN_ONLY}


if __name__ == "__main__":
    run(main)
