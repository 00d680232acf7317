r"""Text files as bytes: unpacked, in blocks or in lines, of which only "\n" ends one."""

import gzip
import os
import sys
from collections.abc import Iterator
from typing import Any

from ext_common.cli import UserError

_BLOCK = 1 << 20


def blocks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The bytes of a file, "-" for the standard input; .gz and .zst are unpacked.

    OSError, EOFError and zlib.error where they cannot be read.
    """
    name = os.fspath(path)
    if name == "-":
        yield from _pieces(sys.stdin.buffer)
    elif name.endswith(".zst"):
        yield from _unpack_zst(name)
    else:
        with (gzip.open if name.endswith(".gz") else open)(name, "rb") as file:
            yield from _pieces(file)


def raw_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    r"""The lines of :func:`blocks` with their "\n", which the last may lack."""
    if os.fspath(path) == "-":
        # a line that is typed is wanted at once
        yield from sys.stdin.buffer
        return
    rest = b""
    for block in blocks(path):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _pieces(file: Any) -> Iterator[bytes]:
    # not read, which gives nothing of a damaged file
    while data := file.read1(_BLOCK):
        yield data


def _unpack_zst(path: str) -> Iterator[bytes]:
    # zstandard's own reader takes a truncated file for a whole one
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: install zstandard (pip) to read .zst files") from error
    frame = None
    with open(path, "rb") as file:
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
