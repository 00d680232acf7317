r"""MONO as bytes: unpacked, checked and copied as it is, so that what comes out can be compared with it.

`text.read_lines` gives lines without what ends them; here the bytes matter.
"""

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ext_common.cli import UsageError, UserError, progress

_BLOCK = 1 << 20
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
    for block in blocks(source):
        digest.update(block)
    return digest.hexdigest()


def copy(source: str, path: Path, add: Callable[[bytes], Any]) -> str:
    """Write the unpacked bytes to ``path``, call ``add`` for each line; SHA-256 of them.

    Raises UserError for bytes that are not UTF-8 and where there are none.
    """
    digest = hashlib.sha256()
    number = 0
    with open(path, "wb") as file, progress(range(0), "copy", "lines", total=None) as bar:
        for number, raw in enumerate(raw_lines(source), 1):
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


def raw_lines(source: str) -> Iterator[bytes]:
    r"""The lines with their "\n", which the last may lack."""
    rest = b""
    for block in blocks(source):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def blocks(source: str) -> Iterator[bytes]:
    """The unpacked bytes of a file, "-" for the standard input; UserError where they cannot be read."""
    try:
        if source == "-":
            yield from _pieces(sys.stdin.buffer)
        elif source.endswith(".zst"):
            yield from _unpack_zst(source)
        else:
            with (gzip.open if source.endswith(".gz") else open)(source, "rb") as file:
                yield from _pieces(file)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{_named(source)} cannot be read: {reason}") from error


def _pieces(file) -> Iterator[bytes]:
    while data := file.read(_BLOCK):
        yield data


def _unpack_zst(source: str) -> Iterator[bytes]:
    # zstandard's own reader takes a truncated file for a whole one
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{source}: install zstandard (pip) to read .zst files") from error
    frame = None
    with open(source, "rb") as file:
        for data in _pieces(file):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    unpacked = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(f"it is no whole Zstandard file ({error})") from error
                if unpacked:
                    yield unpacked
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it is truncated")


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
