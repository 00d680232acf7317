"""Monolingual text cut into chunks of whole lines, and what became of each, below DEST/.work.

plan.json               what decides the bytes of DEST; number of lines
real                    the unpacked copy of the text
offsets                 where each chunk begins in it: uint64, little-endian, one more than chunks
todo, claimed, scratch  see claims.py; a chunk is called by its number, 000000
done/NNNNNN.jsonl       a JSON list for each line of the chunk: [text, score, reason] of each of nbest
merge                   the claim to put it all together

Memory holds one chunk, whatever the size of the text.
"""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from fairseq_ext.backtranslation.generate.claims import Claim, if_there
from fairseq_ext.backtranslation.models.backends import Line

WORK = ".work"
MERGE = "merge"
_OFFSET = struct.Struct("<Q")
_BOM = b"\xef\xbb\xbf"


class Chunks:
    """The chunks of a folder that :func:`set_up` filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.plan: dict[str, Any] = described["plan"]
        self.lines: int = described["lines"]
        self.size: int = self.plan["chunk_lines"]
        self.real = folder / "real"
        self.done = folder / "done"

    @property
    def count(self) -> int:
        return -(-self.lines // self.size)

    def numbers(self, chunk: int) -> range:
        """Numbers, from 1, of the lines of a chunk."""
        return range(chunk * self.size + 1, min((chunk + 1) * self.size, self.lines) + 1)

    def read(self, chunk: int) -> list[str]:
        """The lines of a chunk as `text.read_lines` reads them."""
        with open(self.folder / "offsets", "rb") as file:
            file.seek(chunk * _OFFSET.size)
            start, end = (_OFFSET.unpack(file.read(_OFFSET.size))[0] for _ in range(2))
        with open(self.real, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if chunk == 0:
            data = data.removeprefix(_BOM)
        rows = data.removesuffix(b"\n").split(b"\n")
        return [row.removesuffix(b"\r").decode("utf-8") for row in rows]

    def write(self, chunk: int, found: Sequence[Sequence[Line]], claim: Claim) -> None:
        """Keep what became of the lines of a chunk; `claim` names a file that no other process has."""
        path = self.folder / "scratch" / f"{claim.path.name}.part"
        # not by atomic_write: it would make the folder anew that another process has just removed
        with open(path, "w", encoding="utf-8", newline="") as file:
            for several in found:
                file.write(json.dumps(several, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(path, self._path(chunk))

    def is_done(self, chunk: int) -> bool:
        return self._path(chunk).exists()

    def done_lines(self) -> int:
        """Lines of all chunks that are done, by whomever."""
        names = os.listdir(self.done)
        last = self.count - 1
        missing = self.size - len(self.numbers(last))
        return len(names) * self.size - missing * (self._path(last).name in names)

    def results(self) -> Iterator[tuple[int, list[Line]]]:
        """(number, what became of it) of each line, in order; UserError where that is not so."""
        for chunk in range(self.count):
            numbers, path = self.numbers(chunk), self._path(chunk)
            count = 0
            with open(path, encoding="utf-8", newline="\n") as file:
                for count, row in enumerate(file, 1):
                    try:
                        number = numbers[count - 1]
                        several = [Line(*one) for one in json.loads(row)]
                    except (ValueError, TypeError, IndexError):
                        raise _damaged(path) from None
                    yield number, several
            if count != len(numbers):
                raise _damaged(path)

    def _path(self, chunk: int) -> Path:
        return self.done / f"{name_of(chunk)}.jsonl"


class Offsets:
    """Writes where chunks begin, while lines go by."""

    def __init__(self, path: Path, chunk_lines: int) -> None:
        self.chunk_lines, self.lines, self.position = chunk_lines, 0, 0
        self._file = open(path, "wb")

    def add(self, raw: bytes) -> None:
        """A line with its newline."""
        if self.lines % self.chunk_lines == 0:
            self._file.write(_OFFSET.pack(self.position))
        self.lines += 1
        self.position += len(raw)

    def close(self) -> int:
        """Number of chunks."""
        self._file.write(_OFFSET.pack(self.position))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return -(-self.lines // self.chunk_lines)


def name_of(chunk: int) -> str:
    return f"{chunk:06d}"


def sweep(folder: Path) -> None:
    """Remove a folder that other processes may still look into, and write to."""
    away = folder.with_name(f"{WORK}-old@{secrets.token_hex(4)}")
    # as it has another name, nothing can be added to it while it is emptied
    with if_there():
        os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: delete {path.parent.parent}, and run the command again")
