"""Bitext and synthetic text become one folder to train the forward model on.

python -m fairseq_ext.backtranslation.assemble DATA SYNTH DATA_BT --tag '<BT>' --upsample 2
python -m fairseq_ext.backtranslation.assemble DATA ROUND1 ROUND2 DATA_BT --filters 'empty; duplicate'

DATA_BT is a prepared folder with the models, dictionaries, valid and test of DATA, and one train split:
the bitext as many times as --upsample says, then the synthetic pairs. Its direction is from the synthetic
language to the real one; trained the other way round, tags would be in targets.

In text/train.ids a pair of the bitext has the number of its input line, a synthetic one the name of its
folder (bt1 for the first SYNTH), of its line and, from the second best on, of its rank: bt1:17, bt1:17:2.
Only in lines with such a name is the first word of text/train.LANG the tag, and, where manifest.json says
"fillers" of the folder, the word <BLANK> a missing word (<unk> in the ids); elsewhere these letters are text.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

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
from fairseq_ext.backtranslation.assemble.build import TRAIN, fill
from fairseq_ext.backtranslation.assemble.checks import (
    check_direction,
    check_one_direction,
    hash_files,
)
from fairseq_ext.backtranslation.assemble.filters import DEFAULT_SYNTHETIC_FILTERS, Context
from fairseq_ext.backtranslation.assemble.synthetic import Synthetic
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.decode.checkpoint import split_paths
from fairseq_ext.translation.prepare.filter_chain import FILTERS, FilterChain
from fairseq_ext.translation.prepare.folder import already_made
from fairseq_ext.translation.prepare.report import next_command, share

KIND = "assembled"
# What may differ between two runs that write the same bytes; forward counts by its content.
RUN_ONLY = ("workers", "overwrite", "forward")
EPILOG = """
DATA is a folder of fairseq_ext.translation.prepare, each SYNTH one of fairseq_ext.backtranslation.generate,
from text in one language of DATA by a model that writes the other. Further outputs of a line (--nbest) are
further pairs.

filters (--filters 'name; name:option=value,option=value', in this order; none: keep every usable pair):
{filters}

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class AssembleOptions:
    """What is kept of synthetic text, and how it is mixed with the bitext."""

    tag: Optional[str] = field(
        default="<BT>",
        metadata={
            "help": "extra symbol of DATA put before synthetic sources (Caswell et al. 2019); none: no tag"
        },
    )
    upsample: int = field(default=1, metadata={"help": "copies of the bitext"})
    filters: str = field(
        default=DEFAULT_SYNTHETIC_FILTERS,
        metadata={"help": "what removes synthetic pairs; see the list below"},
    )
    on_leak: str = field(
        default="remove",
        metadata={
            "help": "synthetic pairs that hold a line of DATA's valid or test, on either side; ordinary "
            "monolingual text may well hold some",
            "choices": ("refuse", "remove"),
        },
    )
    max_synthetic: Optional[int] = field(
        default=None,
        metadata={"help": "synthetic pairs at most, drawn from those that are kept; none: all"},
    )
    forward: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint(s) a.pt:b.pt of a forward model, for the filter round_trip"},
    )
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder whose Python modules register filters of your own"}
    )
    seed: int = field(default=1, metadata={"help": "of samples and of --max-synthetic"})
    workers: Optional[int] = field(
        default=None, metadata={"help": "processes; none: one for each CPU"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace what was assembled before with other options"}
    )

    def __post_init__(self):
        if self.upsample < 1:
            raise OptionError(f"upsample must be at least 1, got {self.upsample}")
        if self.max_synthetic is not None and self.max_synthetic < 1:
            raise OptionError(f"max_synthetic must be at least 1, got {self.max_synthetic}")
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"workers must be at least 1, got {self.workers}")
        if self.seed < 0:
            raise OptionError(f"seed {self.seed} must not be negative")


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.backtranslation.assemble",
        description=__doc__,
        epilog=EPILOG.replace("{filters}", FILTERS.describe()),
    )
    parser.add_argument("data", metavar="DATA", help="prepared bitext")
    parser.add_argument("synths", metavar="SYNTH", nargs="+", help="generated synthetic text")
    parser.add_argument("dest", metavar="DATA_BT", help="folder to write")
    add_dataclass(parser, AssembleOptions)
    leave_out_harmless_warnings()
    args = parser.parse_args(argv)
    assemble(args.data, args.synths, args.dest, from_args(AssembleOptions, args))


def assemble(data, synths, dest, options: AssembleOptions | None = None) -> dict[str, Any]:
    """Write the folder `dest` of a prepared bitext and synthetic folders, and print the table.

    Returns the report that is printed and lies in manifest.json ("report"). `dest` appears whole or not
    at all. Raises UserError, UsageError.
    """
    options = options or AssembleOptions()
    data, synths, dest = Path(data), [Path(path) for path in synths], Path(dest)
    check_paths(data, synths, dest)
    load_plugin(options.user_dir)
    corpus = open_bitext(data)
    opened = [Synthetic.open(path) for path in synths]
    direction = check_one_direction(
        {str(one.path): check_direction(one, corpus.languages) for one in opened}
    )
    chain = make_chain(options, direction)
    if options.tag is not None:
        corpus.codec(direction[0]).symbol_id(options.tag)
    hashes = hash_inputs(corpus, opened, options)
    plan = {"inputs": [digest(files) for files in hashes], "options": without_run_only(options)}
    with making(dest, lambda: already_made(dest, plan, options.overwrite)) as folder:
        if folder is None:
            print(f"{dest} is already assembled with these options and files: nothing to do")
            report = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8"))["report"]
        else:
            context = Context(corpus.extra_symbols, options.forward, options.user_dir)
            for one in chain.filters.values():
                if hasattr(one, "setup"):
                    one.setup(context)
            report = fill(folder, corpus, opened, direction, options, chain)
            write_manifest(
                folder,
                inputs={name: value for files in hashes for name, value in files.items()},
                counts=report["counts"],
                options=without_run_only(options),
                seed=options.seed,
                kind=KIND,
                split_sha256=corpus.split_sha256,
                report=report,
                plan=plan,
            )
    print(table(report))
    command = next_command(dest, Corpus.open(dest).splits, report["languages"])
    print(f"\nwritten to {dest}; next, for example:\n\n{command}")
    return report


def check_paths(data: Path, synths: list[Path], dest: Path) -> None:
    """UsageError where one folder is given as two things."""
    if not synths:
        raise UsageError(
            "no synthetic folder given: give what generate wrote, between DATA and DATA_BT"
        )
    given = [data, *synths]
    for place, path in enumerate(given):
        if not path.exists():
            continue
        if dest.exists() and path.samefile(dest):
            raise UsageError(
                f"{path} is to be read and to be written: give a new folder as the last"
            )
        if any(other.exists() and path.samefile(other) for other in given[:place]):
            raise UsageError(f"{path} is given twice: give each folder once")


def open_bitext(path: Path) -> Corpus:
    """The prepared folder at `path`; UserError where it is an assembled one or has no train."""
    corpus = Corpus.open(path)
    try:
        kind = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind == KIND:
        raise UserError(
            f"{path} holds synthetic pairs already: give the prepared bitext, and all synthetic folders "
            "that are wanted"
        )
    if not corpus.splits.get(TRAIN):
        raise UserError(f"{path} has no split {TRAIN!r}: prepare it with pairs to train on")
    return corpus


def make_chain(options: AssembleOptions, direction: tuple[str, str]) -> FilterChain:
    """The filters; UsageError where --forward is given for none of them."""
    chain = FilterChain(options.filters, *direction)
    if options.forward and "round_trip" not in chain.filters:
        raise UsageError(
            "--forward is for the filter round_trip, which --filters does not name: add it there"
        )
    return chain


def hash_inputs(corpus: Corpus, synths: list[Synthetic], options) -> list[dict[str, str]]:
    """file → SHA-256 of what decides the result, for DATA, each SYNTH and the forward model."""
    names = [f"dict.{lang}.txt" for lang in corpus.languages]
    names += [corpus.spm[lang]["file"] for lang in corpus.languages]
    files = [corpus.path / name for name in ("corpus.json", *names)]
    for split in corpus.splits:
        files.append(corpus.ids(split))
        for lang in corpus.languages:
            stem = corpus.binarised(split, lang)
            files += [corpus.text(split, lang), Path(f"{stem}.bin"), Path(f"{stem}.idx")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing: restore it, or prepare the bitext again")
    found = [{str(file): sha256_file(file) for file in files}]
    # which words are missing ones, and what the report says, is in the manifest alone
    about = ("round", "nbest", "mode", "real_lang", "synthetic_lang")
    for one in synths:
        facts = json.dumps({name: getattr(one, name) for name in about}, sort_keys=True)
        facts_hash = hashlib.sha256(facts.encode()).hexdigest()
        found.append({**hash_files(one), str(one.path / MANIFEST_NAME): facts_hash})
    for path in split_paths(options.forward) if options.forward else []:
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist: give a checkpoint as --forward")
        found.append({path: sha256_file(path)})
    return found


def digest(files: dict[str, str]) -> str:
    """One hash for several, in their order, wherever they lie."""
    return hashlib.sha256("\n".join(files.values()).encode()).hexdigest()


def without_run_only(options: AssembleOptions) -> dict[str, Any]:
    return {key: value for key, value in asdict(options).items() if key not in RUN_ONLY}


def table(report: dict[str, Any]) -> str:
    """Synthetic pairs in and out by reason, and what an epoch of training consists of, as text."""
    counts, effective = report["counts"], report["effective"]
    lines = [f"synthetic pairs in {counts['in']:>12,}"]
    for name, number in counts["removed"].items():
        lines.append(f"  {name:<17}{-number:>12,}  {share(number, counts['in'])}")
        if name == "unusable":
            lines += [f"    {n:,} {reason}" for reason, n in list(report["unusable"].items())[:5]]
    lines += [f"pairs kept         {counts['out']:>12,}", ""]
    for one in report["folders"] if len(report["folders"]) > 1 else []:
        kept, mode = one["counts"]["out"], one["mode"]["name"]
        lines.append(f"{one['name']:<19}{kept:>12,}  {mode}, round {one['round']}")
    source, target = report["languages"]
    tokens, copies = effective["tokens"], effective["copies"]
    lines.append(f"train               pairs   tokens {source:<8}  tokens {target:<8}")
    rows = [
        (f"bitext × {copies}", effective["bitext"] * copies, "bitext", copies),
        ("synthetic", effective["synthetic"], "synthetic", 1),
    ]
    for name, pairs, key, times in rows:
        both = [tokens[lang][key] * times for lang in (source, target)]
        lines.append(f"{name:<13}{pairs:>12,}{both[0]:>17,}{both[1]:>17,}")
    shown = f"bitext {effective['bitext']:,} pairs × {copies} = {rows[0][1]:,}"
    lines += [
        "",
        f"{shown}, synthetic {effective['synthetic']:,} ({effective['share']:.1%} of train)",
        f"tag                 {report['tag'] or 'none'}",
    ]
    if tokens[source]["fillers"]:
        lines.append(f"fillers (<unk>)     {tokens[source]['fillers']:,}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
