"""The steps of prepare that touch no output: what is usable, what belongs where, what is odd."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from ext_common.cli import UsageError, UserError
from ext_common.store import Entry
from fairseq_ext.speaker.audio.bandwidth import is_narrow, mixture
from fairseq_ext.speaker.features import FeatureSpec
from fairseq_ext.speaker.prepare.before import Before
from fairseq_ext.speaker.prepare.layouts import Bad, Record, Source
from fairseq_ext.speaker.prepare.splits import (
    TRAIN,
    assign_splits,
    overlapping_groups,
    shared_between_splits,
    split_overlaps,
)

# What may differ between two runs that write the same bytes.
RUN_ONLY = ("workers", "max_bad", "overwrite", "add")
Kept = tuple[Record, int, int]  # with offset and length in the store


def ready_spec(found: Source, spec: FeatureSpec) -> FeatureSpec:
    """The specification of the features; where the source holds features it says how many bands."""
    if found.n_mels is None:
        return spec
    changed = [f.name for f in fields(spec) if getattr(spec, f.name) != f.default]
    if changed and not (changed == ["n_mels"] and spec.n_mels == found.n_mels):
        flag = "--" + changed[0].replace("_", "-")
        raise UsageError(f"{flag} has no effect: this layout holds features that are already made")
    return replace(spec, n_mels=found.n_mels)


def usable_records(records: Iterable[Record]) -> tuple[list[Record], list[Bad]]:
    """(records, bad): files that are missing and utterances nothing can be done with go out."""
    usable: list[Record] = []
    bad: list[Bad] = []
    there: dict[Path, bool] = {}
    for record in records:
        if record.path not in there:
            there[record.path] = record.path.is_file()
        where = f"{record.where}: " if record.where else ""
        if not there[record.path]:
            bad.append(Bad(record.record_id, "missing", f"{where}no file {record.path}"))
        elif record.speaker is None and record.split in (None, TRAIN):
            detail = f"{where}no speaker; only in a split other than train it may be absent"
            bad.append(Bad(record.record_id, "no speaker", detail))
        else:
            usable.append(record)
    return usable, bad


def check_given_splits(records: Iterable[Record]) -> None:
    """UserError where the data itself puts the same stretch of audio in two splits."""
    given = [record for record in records if record.split is not None]
    columns = [record.path for record in given], [r.start for r in given], [r.end for r in given]
    splits = [record.split for record in given if record.split is not None]
    for first, second in split_overlaps(*columns, splits)[:1]:
        a, b = given[first], given[second]
        raise UserError(
            f"{a.where or a.record_id} ({a.record_id}, {a.split}) and {b.where or b.record_id} "
            f"({b.record_id}, {b.split}) overlap in time but are in different splits: "
            "give each stretch of a recording to one split"
        )


def check_grouping(records: Iterable[Record], options: Any) -> None:
    """UsageError for --group-by group where nothing names a group."""
    if options.group_by == "group" and all(record.group is None for record in records):
        raise UsageError("--group-by group: the data names no groups (a column or pattern group)")


def make_plan(found: Source, options: Any, spec: FeatureSpec) -> dict[str, Any]:
    """Everything that decides which bytes are written, as a JSON object."""
    inventory = sha256()
    stats: dict[Path, tuple[int, int]] = {}
    for record in found.records:
        if record.path not in stats:
            status = record.path.stat()
            stats[record.path] = (status.st_size, status.st_mtime_ns)
        nowhere: Any = None  # where the file lies is no matter
        line = (record._replace(path=nowhere, where=None), stats[record.path])
        # folders that were made before there was this field are still known
        text = repr(line).replace(", recording=None)", ")")
        inventory.update(text.encode("utf-8", "backslashreplace"))
    inventory.update(json.dumps(found.speakers).encode())
    inventory.update(json.dumps(sorted(item[:2] for item in found.bad)).encode())
    chosen = {k: v for k, v in asdict(options).items() if k not in RUN_ONLY}
    chosen["csv"] = None  # where the table lies is no matter, what it says is in the inventory
    return {"options": chosen, "features": spec.to_dict(), "recordings": inventory.hexdigest()}


def gather(
    found: Source, entries: Sequence[Entry]
) -> tuple[list[Kept], list[dict[str, Any]], list[Bad]]:
    """(kept, duplicates, bad) of all records, in the order of the source.

    kept: (record, offset, length); of equal content the first is kept. One without a label is
    always kept: a list to be predicted must be answered whole.
    """
    spans = {e.note["digest"]: (e.offset, e.rows) for e in entries if e.rows is not None}
    kept: list[Kept] = []
    duplicates: list[dict[str, Any]] = []
    bad: list[Bad] = []
    first: dict[str, Record] = {}
    ids: set[str] = set()
    for entry in sorted(entries, key=lambda entry: int(entry.record_id)):
        record = found.records[int(entry.record_id)]
        if "bad" in entry.note:
            bad.append(Bad(record.record_id, *entry.note["bad"]))
            continue
        digest = entry.note["digest"]
        original = first.setdefault(digest, record)
        keep = original is record or (record.speaker is None and record.record_id not in ids)
        if original is not record:
            duplicates.append(
                {
                    "path": record.record_id,
                    "speaker": record.speaker,
                    "of": original.record_id,
                    "of_speaker": original.speaker,
                    "kept": keep,
                }
            )
        if keep:
            ids.add(record.record_id)
            kept.append((record, *spans[digest]))
    return kept, duplicates, bad


def noticed(
    found: Source, entries: Sequence[Entry], sample_rate: int
) -> tuple[list[str], int | None]:
    """(warnings on what recordings are like, how many of them are narrow or None where nobody listened)."""
    said: dict[str, list[str]] = {}
    heard = [entry for entry in entries if "hertz" in entry.note]
    for entry in heard:
        if "said" in entry.note:
            record = found.records[int(entry.record_id)]
            said.setdefault(entry.note["said"], []).append(record.record_id)
    texts = [f"{len(ids)} utterances: {text} (e.g. {ids[0]})" for text, ids in said.items()]
    hertz = [entry.note["hertz"] for entry in heard]
    text = mixture(hertz, sample_rate)
    if text:
        remedy = "" if text.startswith(f"{len(heard)} of") else ": train with --augment bandwidth"
        texts.append(text + remedy)
    return texts, sum(is_narrow(each, sample_rate) for each in hertz) if heard else None


def divide(
    found: Source, kept: Sequence[Kept], options: Any, before: Before | None = None
) -> tuple[list[tuple[Any, ...]], list[str], list[str]]:
    """(rows for write_corpus, speakers, warnings): splits given and drawn, and what is odd about
    them.

    before: what was prepared earlier; where the data says nothing, it stays in its split.
    """
    records = [record for record, _, _ in kept]
    paths, starts, ends = zip(*((r.path, r.start, r.end) for r in records), strict=True)
    groups = [group_of(record, options.group_by) for record in records]
    given = [record.split for record in records]
    fractions = {"valid": options.valid_fraction, "test": options.test_fraction}
    fractions = {name: part for name, part in fractions.items() if name not in given}
    if before:
        given = [record.split or before.split(record) for record in records]
    units = overlapping_groups(paths, starts, ends, groups)
    speakers: list[Any] = [record.speaker for record in records]
    splits = assign_splits(speakers, units, given, fractions, options.seed)
    warnings = []
    for first, second in split_overlaps(paths, starts, ends, splits)[:1]:
        raise UserError(
            f"{records[first].record_id} ({splits[first]}) and {records[second].record_id} "
            f"({splits[second]}) overlap in time: give all rows of this recording a split, or none"
        )
    shared = shared_between_splits(paths, splits)
    if shared:
        remedy = "" if all(given) else "; --group-by recording keeps them apart"
        warnings.append(
            f"{len(shared)} recordings have cuts in more than one split, e.g. {shared[0].name}: "
            f"figures on them measure speaker and channel together{remedy}"
        )
    torn = [g for g in shared_between_splits(groups, splits) if g is not None]
    if torn and not shared:
        warnings.append(f"{len(torn)} groups are in more than one split, e.g. {torn[0]}")
    trained = {s for s, split in zip(speakers, splits, strict=True) if split == TRAIN}
    unseen = sorted(set(speakers) - trained - {None})
    if trained and unseen:
        warnings.append(
            f"{len(unseen)} speakers are not in train and cannot be recognised, e.g. {unseen[0]}"
        )
    if len(trained - {None}) == 1:
        warnings.append("there is one speaker in train: nobody to tell apart, training refuses it")
    if TRAIN in splits and "valid" not in splits:
        warnings.append("there is no valid split: training needs --disable-validation")
    names = found.speakers or sorted(set(speakers) - {None})
    warnings += alike(names)
    # the id of a cut says what it was cut from, but for ids that a table gives
    rows = [
        (record.record_id, record.speaker, split, group or record.recording, offset, length)
        for (record, offset, length), split, group in zip(kept, splits, groups, strict=True)
    ]
    return rows, names, warnings


def alike(names: Sequence[str]) -> list[str]:
    """A warning for names that differ in capitals or in the encoding of letters only."""
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(normalize("NFKC", name).casefold(), []).append(name)
    return [
        f"{' and '.join(map(repr, several))} are taken for {len(several)} speakers: rename if they are one"
        for several in same.values()
        if len(several) > 1
    ]


def group_of(record: Record, group_by: str) -> str | None:
    """The group of a record as text, None where it stands alone."""
    if group_by in ("auto", "group"):
        return record.group
    is_cut = record.start is not None or record.end is not None
    path = record.record_id.rpartition("#")[0] if is_cut else record.record_id
    path = record.recording or path
    if group_by == "recording":
        return path
    return str(PurePosixPath(path).parent) if group_by == "directory" else None
