"""A memory-mapped store of variable-length records: written once, read in crops without opening
files.

On disk, for the name `features`: `features.bin` holds the rows of all records one after the
other, raw and little-endian; `features.json` holds dtype, row shape and the length of every
record. While it is being written they are called `features.bin.part` and `features.journal`:
one JSON line a record, written after its data, so that a writer killed at any moment is opened
again and goes on behind the last whole record.
"""

import json
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ext_common.cli import UserError, writing
from ext_common.folders import lock
from ext_common.manifest import atomic_json, clear_temporary, sync_folder

FORMAT = 1
SYNC_BYTES = 256 << 20


class Entry(NamedTuple):
    """One journal line: `rows` is None for a record that was looked at and left out."""

    record_id: str
    offset: int
    rows: int | None
    note: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A finished store, read-only.

    data: memory map (total_rows, *row_shape); offsets, lengths: int64 (N,) in rows, in the order of
    writing.
    """

    data: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Record `index` as a read-only view (length, *row_shape)."""
        start = self.offsets[index]
        return self.data[start : start + self.lengths[index]]


class JoinedRows:
    """The rows of several stores one behind the other, read as one array; a slice lies in one of them."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.first = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self.first[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        start = rows.start if isinstance(rows, slice) else rows
        part = int(np.searchsorted(self.first, start, side="right")) - 1
        before = int(self.first[part])
        if isinstance(rows, slice):
            rows = slice(start - before, rows.stop - before)
        else:
            rows -= before
        # as a plain array: slicing a memmap object takes longer than copying a few rows
        found: np.ndarray = np.asarray(self.parts[part])[rows]
        return found


def joined_rows(directories: Sequence[str], name: str = "features") -> np.ndarray | JoinedRows:
    """The data of finished stores, of several as one."""
    parts = [open_store(directory, name).data for directory in directories]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def expect_rows(data: np.ndarray | JoinedRows, firsts: np.ndarray, counts: np.ndarray) -> None:
    """Ask the disk for rows that are about to be read, of all places at once; reads nothing itself.

    firsts, counts: int64 (N,) in rows. Read one after the other, a cold disk is waited for at each place.
    """
    if isinstance(data, JoinedRows):
        part = np.searchsorted(data.first, firsts, side="right") - 1
        for number in np.unique(part):
            of_it = part == number
            expect_rows(data.parts[number], firsts[of_it] - data.first[number], counts[of_it])
    # what numpy maps is the base of its array; there is no such advice on Windows
    elif isinstance(data.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        starts = firsts * data.strides[0]
        ends = starts + counts * data.strides[0]
        starts -= starts % mmap.PAGESIZE
        for start, size in zip(starts.tolist(), (ends - starts).tolist(), strict=True):
            data.base.madvise(mmap.MADV_WILLNEED, start, size)


def parts_of(data: str | os.PathLike[str]) -> list[str]:
    """The folders of DATA, which may be several as DATA1:DATA2."""
    text = os.fspath(data)
    return [text] if os.path.exists(text) else text.split(":")


class StoreWriter:
    """Appends records to the store in `directory`; opened again after an interruption it
    continues.

    row_shape, dtype: of one row; key: any string that tells what is being written: a half-written
    store with another key is refused. `done` lists what is already written, in order. Raises
    UserError where the folder holds a finished store, another key, or another process is writing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        row_shape: Sequence[int] = (40,),
        dtype: str = "float32",
        *,
        name: str = "features",
        key: str = "",
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.row_shape = tuple(int(n) for n in row_shape)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.name = name
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))
        self.part, self.final, self.index, self.journal = store_paths(directory, name)
        self.done: list[Entry] = []
        self._ids: set[str] = set()
        self._rows = 0
        self._unsynced = 0
        self._header = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "row_shape": list(self.row_shape),
            "key": key,
        }
        self._open()

    @property
    def total_rows(self) -> int:
        return self._rows

    def append(self, record_id: str, array: np.ndarray, note: dict[str, Any] | None = None) -> int:
        """Write `array` (T, *row_shape) and return its offset in rows.

        Raises ValueError for another shape or dtype, or an id that is already there.
        """
        array = np.asarray(array)
        if array.shape[1:] != self.row_shape or array.ndim != len(self.row_shape) + 1:
            raise ValueError(f"{record_id}: shape {array.shape}, expected (T, *{self.row_shape})")
        if array.dtype.newbyteorder("<") != self.dtype:
            raise ValueError(f"{record_id}: dtype {array.dtype}, expected {self.dtype.name}")
        data = np.ascontiguousarray(array, dtype=self.dtype).tobytes()
        entry = Entry(record_id, self._rows, len(array), note or {})
        self._check_new(record_id)
        with writing(self.directory):
            write_all(self._data, data)
        self._log(entry, crc=zlib.crc32(data))
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            self.sync()
        return entry.offset

    def skip(self, record_id: str, note: dict[str, Any]) -> None:
        """Note that `record_id` was looked at and has no data."""
        self._check_new(record_id)
        self._log(Entry(record_id, self._rows, None, note))

    def sync(self) -> None:
        """Bring everything written so far to the disk; data before the line that vouches for it."""
        os.fsync(self._data.fileno())
        self._write_line({"sync": len(self.done)})
        os.fsync(self._lines.fileno())
        self._unsynced = 0

    def finish(self) -> None:
        """Write the index and rename the data into place; the rename of the data comes last."""
        self.sync()
        lengths = [entry.rows for entry in self.done if entry.rows is not None]
        index = {key: self._header[key] for key in ("format", "dtype", "row_shape")}
        atomic_json(self.index, index | {"rows": self._rows, "lengths": lengths})
        os.replace(self.part, self.final)
        sync_folder(self.directory)
        # while it is held: see _open
        self.journal.unlink()
        self.close()

    def close(self) -> None:
        """Release the files; what is written stays and a new writer continues behind it."""
        self._data.close()
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        if self.final.exists() and not self.journal.exists():
            raise self._finished()
        self._lines = os.fdopen(lock(self.journal, self.directory), "ab+", buffering=0)
        try:
            if self.final.exists() and not self.part.exists():
                # A journal without a line is the one that lock has just made: another process finished since
                # the question above. One with lines is of a run that was killed in finish, before its end.
                if not os.path.getsize(self.journal):
                    self.journal.unlink()
                    raise self._finished()
                os.replace(self.final, self.part)
            clear_temporary(self.index)
            self.part.touch()
            self._resume()
        except BaseException:
            self._lines.close()
            raise
        self._data = open(self.part, "ab", buffering=0)

    def _finished(self) -> UserError:
        return UserError(f"{self.final} is already finished: write to another folder or delete it")

    def _resume(self) -> None:
        self._lines.seek(0)
        lines = whole_lines(self._lines.read())
        if len(lines) < 2:
            os.truncate(self.journal, 0)
            os.truncate(self.part, 0)
            self._write_line(self._header)
            return
        if json.loads(lines[0]) != self._header:
            raise UserError(
                f"{self.journal} belongs to other data or options: delete it to start afresh"
            )
        entries, keep = self._trusted(lines[1:])
        for entry in entries:
            self.done.append(entry)
            self._ids.add(entry.record_id)
            self._rows += entry.rows or 0
        os.truncate(self.journal, sum(len(line) for line in lines[: keep + 1]))
        os.truncate(self.part, self._rows * self.row_bytes)

    def _trusted(self, lines: list[bytes]) -> tuple[list[Entry], int]:
        """Entries whose data is really there: what a sync line covers, then as far as the checksums
        agree.
        """
        parsed = [json.loads(line) for line in lines]
        last_sync = max((i for i, line in enumerate(parsed) if "sync" in line), default=-1)
        entries, offset, keep = [], 0, 0
        size = self.part.stat().st_size
        with open(self.part, "rb") as data:
            for i, line in enumerate(parsed):
                if "sync" not in line:
                    rows = line["rows"]
                    end = (offset + (rows or 0)) * self.row_bytes
                    if end > size:
                        break
                    if rows is not None and i > last_sync:
                        data.seek(offset * self.row_bytes)
                        if zlib.crc32(data.read(rows * self.row_bytes)) != line["crc"]:
                            break
                    entries.append(Entry(line["id"], offset, rows, line["note"]))
                    offset += rows or 0
                keep = i + 1
        return entries, keep

    def _check_new(self, record_id: str) -> None:
        if record_id in self._ids:
            raise ValueError(f"{record_id} is already in the store")

    def _log(self, entry: Entry, crc: int | None = None) -> None:
        line = {"id": entry.record_id, "rows": entry.rows, "note": entry.note}
        if crc is not None:
            line["crc"] = crc
        self._write_line(line)
        self.done.append(entry)
        self._ids.add(entry.record_id)
        self._rows += entry.rows or 0

    def _write_line(self, line: dict[str, Any]) -> None:
        with writing(self.directory):
            write_all(self._lines, json.dumps(line, ensure_ascii=True).encode() + b"\n")


def open_store(directory: str | os.PathLike[str], name: str = "features") -> Store:
    """The finished store in `directory` as a Store; UserError where it is missing, unfinished or
    cut short.
    """
    part, final, index, journal = store_paths(directory, name)
    if not final.exists() or not index.exists():
        if journal.exists() or part.exists():
            raise UserError(f"{directory} is not finished: run the command that writes it again")
        raise UserError(f"{directory} holds no {final.name}: it is not a prepared folder")
    try:
        meta = json.loads(index.read_text())
        dtype, row_shape = np.dtype(meta["dtype"]), tuple(meta["row_shape"])
        lengths = np.asarray(meta["lengths"], dtype=np.int64)
        if meta["format"] != FORMAT:
            raise UserError(
                f"{index} has format {meta['format']}, this version reads {FORMAT}: write it again"
            )
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: write the store again") from None
    rows = int(lengths.sum())
    expected = rows * dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
    if final.stat().st_size != expected:
        raise UserError(
            f"{final} has {final.stat().st_size} bytes, its index says {expected}: write it again"
        )
    shape = (rows, *row_shape)
    data = np.memmap(final, dtype, "r", shape=shape) if expected else np.zeros(shape, dtype)
    return Store(data, np.cumsum(lengths) - lengths, lengths)


def discard(directory: str | os.PathLike[str], name: str = "features") -> None:
    """Delete the store in `directory`, finished or not; UserError while it is being written."""
    part, final, index, journal = store_paths(directory, name)
    if not any(path.exists() for path in (part, final, index, journal)):
        return
    handle = lock(journal, directory)
    try:
        for path in (part, final, index, journal):
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def interrupted_key(directory: str | os.PathLike[str], name: str = "features") -> str | None:
    """The `key` of the unfinished store in `directory`, None where nothing is written yet."""
    _, _, _, journal = store_paths(directory, name)
    try:
        with open(journal, "rb") as file:
            lines = whole_lines(file.readline() + file.readline())
    except FileNotFoundError:
        return None
    return json.loads(lines[0]).get("key") if len(lines) == 2 else None


def store_paths(
    directory: str | os.PathLike[str], name: str = "features"
) -> tuple[Path, Path, Path, Path]:
    """(unfinished data, finished data, index, journal) of the store `name` in `directory`."""
    directory = Path(directory)
    part, final, index, journal = (
        directory / f"{name}{end}" for end in (".bin.part", ".bin", ".json", ".journal")
    )
    return part, final, index, journal


def write_all(file: RawIOBase, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take it in pieces."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of `content` (bytes) that end in a line feed and hold one JSON object, up to the
    first torn one.
    """
    lines = []
    for line in content.split(b"\n")[:-1]:
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line + b"\n")
    return lines
