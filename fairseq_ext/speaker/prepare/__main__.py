"""Recordings become one packed folder of features to train on.

python -m fairseq_ext.speaker.prepare RECORDINGS DATA --layout folder
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

from ext_common.cli import (
    Parser,
    UsageError,
    UserError,
    add_dataclass,
    from_args,
    progress,
    run,
)
from ext_common.folders import exclusive, is_made, refuse_file, refuse_strangers
from ext_common.manifest import MANIFEST_NAME, clear_temporary, sha256_file, write_manifest
from ext_common.registry import UnknownName
from ext_common.store import StoreWriter, discard, interrupted_key, store_paths
from fairseq_ext.speaker.corpus import Corpus, write_corpus
from fairseq_ext.speaker.features import MIN_SECONDS, FeatureSpec
from fairseq_ext.speaker.prepare.before import (
    BEFORE,
    SOURCES,
    adds_to,
    forget,
    open_before,
    set_aside,
    write_sources,
)
from fairseq_ext.speaker.prepare.extract import extract_all
from fairseq_ext.speaker.prepare.layouts import LAYOUTS
from fairseq_ext.speaker.prepare.report import report_bad, report_duplicates, table, warn
from fairseq_ext.speaker.prepare.splits import check_fractions
from fairseq_ext.speaker.prepare.steps import (
    check_given_splits,
    check_grouping,
    divide,
    gather,
    make_plan,
    noticed,
    ready_spec,
    usable_records,
)

GROUPINGS = ("auto", "group", "recording", "directory", "none")
OWN_FILES = ("corpus.json", "utterances.csv", SOURCES, MANIFEST_NAME)
LOCK = ".lock"
WORDS = {"recordings": "other recordings, or they have changed since (--add reads only these)"}
BUILT_IN = {"hw4", "folder", "kaldi", "csv"}

EXAMPLE_TEXT = r"""
layouts:
{layouts}

--pattern is matched against the whole path below RECORDINGS. Its group `speaker` is required,
`group` keeps utterances on one side of a split, `split` names the split; a group called train,
valid or test sets that split where it takes part in the match. The spoken digits (FSDD), where
numbers 0 to 4 are the official test split:

  python -m fairseq_ext.speaker.prepare recordings DATA --layout folder \
      --pattern '\d_(?P<speaker>[a-z]+)_(?:(?P<test>[0-4])|\d+)\.wav'

Interrupted, the same command continues. Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class PrepareOptions:
    """What to read and how to divide it."""

    layout: str = field(
        default="folder", metadata={"help": "how RECORDINGS is laid out; see the list below"}
    )
    csv: Optional[str] = field(
        default=None,
        metadata={
            "help": "table of the csv layout, an ordinary path; none: RECORDINGS/metadata.csv"
        },
    )
    pattern: Optional[str] = field(
        default=None,
        metadata={"help": "regular expression of the folder layout, over paths below RECORDINGS"},
    )
    valid_fraction: float = field(
        default=0.1,
        metadata={"help": "part of each speaker's utterances for valid, where none is given"},
    )
    test_fraction: float = field(
        default=0.1,
        metadata={"help": "part of each speaker's utterances for test, where none is given"},
    )
    group_by: str = field(
        default="auto",
        metadata={
            "help": "utterances that stay in one split: those of one group (named by the data), "
            "recording or directory; auto: by group where the data has it",
            "choices": GROUPINGS,
        },
    )
    seed: int = field(default=1, metadata={"help": "of the splits that are drawn"})
    min_seconds: float = field(
        default=MIN_SECONDS, metadata={"help": "shorter utterances are left out (seconds)"}
    )
    max_bad: float = field(
        default=0.01, metadata={"help": "fail when more than this fraction cannot be used"}
    )
    workers: Optional[int] = field(
        default=None, metadata={"help": "processes that decode; none: one for each CPU"}
    )
    add: bool = field(
        default=False,
        metadata={
            "help": "DATA was prepared before and RECORDINGS have come or gone: read only what is new or"
            " changed; what is there keeps its split"
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace what was prepared before with other options"}
    )

    def __post_init__(self):
        check_fractions({"valid": self.valid_fraction, "test": self.test_fraction})
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad {self.max_bad} must lie in [0, 1]")
        if self.min_seconds < 0:
            raise ValueError(f"min_seconds {self.min_seconds} must not be negative")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.speaker.prepare",
        description=__doc__,
        epilog=EXAMPLE_TEXT.replace("{layouts}", LAYOUTS.describe()),
    )
    parser.add_argument("source", metavar="RECORDINGS", help="folder with the recordings")
    parser.add_argument("dest", metavar="DATA", help="folder to write")
    add_dataclass(parser, PrepareOptions)
    add_dataclass(parser.add_argument_group("features"), FeatureSpec)
    args = parser.parse_args(argv)
    options, spec = from_args(PrepareOptions, args), from_args(FeatureSpec, args)
    prepare(Path(args.source), Path(args.dest), options, spec)


def prepare(source, dest, options=None, spec=None):
    """Write DATA from RECORDINGS and print the table; returns the Corpus. Raises UserError."""
    options, spec = options or PrepareOptions(), spec or FeatureSpec()
    began = time.monotonic()
    found = read_source(source, dest, options)
    spec = ready_spec(found, spec)
    found.records, bad = usable_records(found.records)
    found.bad += bad
    check_given_splits(found.records)
    check_grouping(found.records, options)
    plan = make_plan(found, options, spec)
    # asked without a lock first: a folder that is ready may be one that cannot be written
    ready = not options.overwrite and is_finished(dest, plan)
    if not ready:
        dest.mkdir(parents=True, exist_ok=True)
        with exclusive(dest / LOCK, dest):
            if options.add and interrupted_key(dest) is None and adds_to(plan, plan_of(dest)):
                ready = is_finished(dest, plan)
                if not ready:
                    set_aside(dest)
                    start_over(dest, plan, True)
            else:
                ready = not start_over(dest, plan, options.overwrite)
            if not ready:
                fill(dest, found, plan, options, spec, open_before(dest, plan))
            forget(dest)
    if ready:
        print(f"{dest} is already prepared with these options and recordings: nothing to do")
    corpus = Corpus.open(dest)
    print(table(corpus))
    if not ready:
        print(f"written to {dest} in {time.monotonic() - began:.0f} s")
    return corpus


def fill(dest, found, plan, options, spec, before=None):
    """Write DATA, or what an interrupted run left to be written; the store gets its name last."""
    with StoreWriter(dest, (spec.n_mels,), "float32", key=json.dumps(plan)) as writer:
        for name in OWN_FILES:
            clear_temporary(dest / name)
        if writer.done:
            print(f"continuing: {len(writer.done)} of {len(found.records)} utterances are there")
        if before:
            take_over(found, writer, before)
        extract_missing(found, writer, options, spec)
        kept, duplicates, unusable = gather(found, writer.done)
        bad = found.bad + unusable
        total = len(found.records) + len(found.bad)
        record = {
            "layout": options.layout,
            "counts": {
                "in": total,
                "out": len(kept),
                "bad": dict(Counter(item.reason for item in bad)),
                "duplicates": len(duplicates),
            },
            "bad": [item._asdict() for item in bad],
            "duplicates": duplicates,
            "plan": plan,
        }
        report_bad(bad, total, options.max_bad)
        if len(bad) > options.max_bad * total or not kept:
            save_manifest(dest, found, options, spec, record | {"status": "failed"})
            raise UserError(
                f"{len(bad)} of {total} utterances cannot be used, more than --max-bad "
                f"{options.max_bad:g} allows: see {dest / 'manifest.json'}; with a higher "
                "--max-bad the same command continues"
            )
        report_duplicates(duplicates)
        rows, speakers, warnings = divide(found, kept, options, before)
        heard, narrow = noticed(found, writer.done, spec.sample_rate)
        warnings = found.warnings + warnings + heard
        for text in warnings:
            warn(text)
        record |= {"warnings": warnings, "narrow": narrow}
        write_corpus(dest, writer.part, rows, speakers, spec, narrow)
        write_sources(dest, found, writer.done)
        save_manifest(dest, found, options, spec, record | {"status": "done"})
        writer.finish()


def read_source(source, dest, options):
    """What the layout finds in `source`."""
    try:
        layout = LAYOUTS.get(options.layout)
    except UnknownName as error:
        raise UsageError(f"--layout: {error}") from None
    for name, owner in (("csv", "csv"), ("pattern", "folder")):
        if getattr(options, name) and options.layout in BUILT_IN - {owner}:
            raise UsageError(f"--{name} belongs to --layout {owner}, not {options.layout}")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the folder with the recordings")
    refuse_file(dest)
    if dest.exists() and source.resolve() == dest.resolve():
        raise UsageError("RECORDINGS and DATA are the same folder: give another one to write")
    return layout(source, options)


def plan_of(dest):
    """What DATA was made by, or is being made by; None where that is not known."""
    key = interrupted_key(dest)
    if key is not None:
        return json.loads(key) if key else None
    try:
        plan = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8")).get("plan")
    except (OSError, ValueError, AttributeError):
        return None
    return plan if store_paths(dest)[1].exists() else None


def is_finished(dest, plan):
    """Whether DATA is what `plan` makes, and all of it is there."""
    return interrupted_key(dest) is None and plan_of(dest) == plan


def start_over(dest, plan, overwrite):
    """Whether there is something to do; empties DATA for --overwrite and refuses to mix two preparations.

    Called while the lock of DATA is held.
    """
    _, final, *_ = paths = store_paths(dest)
    # a manifest that is lost: --overwrite replaces what is plainly from this command
    ours = final.exists() and overwrite and (dest / "corpus.json").exists()
    if plan_of(dest) is None:
        known = {
            LOCK,
            BEFORE,
            f"{BEFORE}.partial",
            *OWN_FILES,
            *(path.name for path in paths if path != final or ours),
        }
        refuse_strangers(dest, known)
    elif is_made(dest, plan, plan_of, overwrite=overwrite, words=WORDS):
        return not is_finished(dest, plan)
    # corpus.json first: without it the folder is no corpus, whatever else is still there.
    for name in OWN_FILES:
        (dest / name).unlink(missing_ok=True)
    discard(dest)
    return True


def take_over(found, writer, before):
    """Write to the store what was prepared before and has not changed."""
    done = {entry.record_id for entry in writer.done}
    seen = {entry.note["digest"] for entry in writer.done if "digest" in entry.note}
    taken = 0
    for number, record in enumerate(found.records):
        old = None if str(number) in done else before.find(record)
        if old is None or old.note["digest"] in seen:
            continue
        seen.add(old.note["digest"])
        writer.append(str(number), old.features, old.note)
        taken += 1
    print(f"{taken} of {len(found.records)} utterances are as they were prepared before")


def extract_missing(found, writer, options, spec):
    """Decode what the store does not hold yet; one line of its journal for each utterance."""
    done = {entry.record_id for entry in writer.done}
    seen = {entry.note["digest"] for entry in writer.done if "digest" in entry.note}
    by_file = {}
    for number, record in enumerate(found.records):
        # Also a file with nothing left keeps its place: the order of the bytes hangs on it.
        task = by_file.setdefault(record.path, [])
        if str(number) not in done:
            task.append((number, record))
    tasks = [task for task in by_file.values() if task]
    left = sum(map(len, tasks))
    if not left:
        return
    workers = options.workers or len(os.sched_getaffinity(0))
    outcomes = extract_all(
        tasks,
        spec,
        options.min_seconds,
        found.n_mels is None,
        min(workers, len(tasks)),
    )
    bar = None
    for task in outcomes:
        # The clock starts behind the workers' start-up, which says nothing about the rate.
        bar = bar or progress(left, "features", "utterances")
        for outcome in task:
            key = str(outcome.number)
            if outcome.bad:
                writer.skip(key, {"bad": list(outcome.bad)})
            elif outcome.digest in seen:
                writer.skip(key, {"digest": outcome.digest} | outcome.note)
            else:
                seen.add(outcome.digest)
                writer.append(key, outcome.features, {"digest": outcome.digest} | outcome.note)
        bar.update(len(task))
    bar.close()


def save_manifest(dest, found, options, spec, record):
    """manifest.json of this run."""
    write_manifest(
        dest,
        inputs={str(path): sha256_file(path) for path in found.inputs},
        options={**asdict(options), **spec.to_dict()},
        seed=options.seed,
        **record,
    )


if __name__ == "__main__":
    run(main)
