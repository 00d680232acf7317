"""What a prepared folder held before recordings were added to it: features and splits that stay.

`sources.csv` says of each utterance what file it was made from (`COLUMNS`); while a folder is made anew with
more recordings, what it was lies in its folder `.before`.
"""

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ext_common.cli import UserError
from ext_common.manifest import MANIFEST_NAME, atomic_write
from ext_common.store import Entry, open_store
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.prepare.layouts import Record, Source

SOURCES = "sources.csv"
BEFORE = ".before"
COLUMNS = ("id", "start", "end", "size", "mtime_ns", "offset", "length", "note")
FILES = ("features.bin", "features.json", "utterances.csv", "corpus.json", MANIFEST_NAME, SOURCES)


class Old(NamedTuple):
    """What is known of an utterance: features float32 (T, n_mels) and the note of the journal."""

    features: np.ndarray
    note: dict[str, Any]


class Before:
    """The utterances that a folder held, by what they were made from."""

    def __init__(self, folder: Path) -> None:
        corpus = Corpus.open(folder)  # type: ignore[no-untyped-call]
        self.store = open_store(folder)
        with open(folder / SOURCES, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self.rows = {tuple(row[name] for name in COLUMNS[:5]): row for row in rows}
        names = [*corpus.speakers, None]
        self.splits = {
            (name, names[label]): str(split)
            for name, label, split in zip(corpus.ids, corpus.labels, corpus.splits, strict=True)
        }

    def find(self, record: Record) -> Old | None:
        """The utterance of a record whose file has not changed; None where there is none."""
        row = self.rows.get(identity(record))
        if row is None:
            return None
        first = int(row["offset"])
        features = np.array(self.store.data[first : first + int(row["length"])])
        return Old(features, json.loads(row["note"]))

    def split(self, record: Record) -> str | None:
        """Where the utterance was, so that nothing trained on is tested on; None for a new one."""
        return self.splits.get((record.record_id, record.speaker))


def identity(record: Record) -> tuple[str, ...]:
    """The first columns of `SOURCES`."""
    status = record.path.stat()
    times = ("" if time is None else repr(float(time)) for time in (record.start, record.end))
    return (record.record_id, *times, str(status.st_size), str(status.st_mtime_ns))


def write_sources(dest: Path, found: Source, entries: Sequence[Entry]) -> None:
    """`SOURCES` of what the store holds, in the order of the source."""
    with atomic_write(dest / SOURCES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in sorted(entries, key=lambda entry: int(entry.record_id)):
            if entry.rows is not None:
                record = found.records[int(entry.record_id)]
                note = json.dumps(entry.note, ensure_ascii=True)
                writer.writerow([*identity(record), entry.offset, entry.rows, note])


def set_aside(dest: Path) -> None:
    """What `dest` is becomes its folder `BEFORE`, whole or not at all; `dest` itself stays as it is."""
    if not (dest / SOURCES).exists():
        raise UserError(
            f"{dest} does not say what it was made from (an older version made it): use --overwrite once"
        )
    partial = dest / f"{BEFORE}.partial"
    for folder in (partial, dest / BEFORE):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    for name in FILES:
        try:
            os.link(dest / name, partial / name)
        except OSError:
            shutil.copy2(dest / name, partial / name)
    os.replace(partial, dest / BEFORE)


def open_before(dest: Path, plan: Mapping[str, Any]) -> Before | None:
    """What was set aside, where it was made with the same options; None otherwise."""
    folder = dest / BEFORE
    try:
        then = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError):
        return None
    return Before(folder) if adds_to(plan, then) else None


def adds_to(plan: Mapping[str, Any], then: Mapping[str, Any] | None) -> bool:
    """Whether two plans differ in the recordings only."""
    return then is not None and {**plan, "recordings": ""} == {**then, "recordings": ""}


def forget(dest: Path) -> None:
    """Delete what was set aside."""
    for name in (BEFORE, f"{BEFORE}.partial"):
        shutil.rmtree(dest / name, ignore_errors=True)
