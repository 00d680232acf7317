r"""MONO as bytes: unpacked, checked and copied as it is, so that what comes out can be compared with it.

`text.read_lines` gives lines without what ends them; here the bytes matter.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ext_common.cli import UsageError, UserError, progress
from fairseq_ext.translation.text.files import blocks, raw_lines

_BOM = b"\xef\xbb\xbf"


def check(source: str) -> None:
    """UserError where there is nothing to read."""
    if source == "-":
        return
    if os.path.isdir(source):
        raise UsageError(f"{source} is a folder: give a text file")
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: give a text file, or - for the standard input")


def content_hash(source: str) -> str:
    """SHA-256 of the unpacked bytes."""
    digest = hashlib.sha256()
    with _readable(source):
        for block in blocks(source):
            digest.update(block)
    return digest.hexdigest()


def copy(source: str, path: Path, add: Callable[[bytes], Any]) -> str:
    """Write the unpacked bytes to `path`, call `add` for each line; SHA-256 of them.

    Raises UserError for bytes that are not UTF-8 and where there are none.
    """
    digest = hashlib.sha256()
    number = 0
    with open(path, "wb") as file, progress(range(0), "copy", "lines", total=None) as bar:
        lines = raw_lines(source)
        while True:
            # what fails in writing is no fault of what is read
            with _readable(source):
                raw = next(lines, None)
            if raw is None:
                break
            number += 1
            _check_line(source, number, raw)
            digest.update(raw)
            file.write(raw)
            add(raw)
            bar.update(1)
        file.flush()
        os.fsync(file.fileno())
    if not number:
        raise UserError(f"{_named(source)} is empty: give a file with a sentence a line")
    return digest.hexdigest()


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{_named(source)} cannot be read: {reason}") from error


def _check_line(source: str, number: int, raw: bytes) -> None:
    try:
        (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        wide = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise UserError(
            f"{_named(source)}, line {number} {'is UTF-16' if wide else 'is not UTF-8'} (byte "
            f"{error.start + 1}: 0x{error.object[error.start]:02x}): convert the file with iconv -t UTF-8"
        ) from error


def _named(source: str) -> str:
    return "the standard input" if source == "-" else source
