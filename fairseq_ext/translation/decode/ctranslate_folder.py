"""The folder of a converted model: made once, whole or absent, in the first place that can be written to."""

import atexit
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ext_common.folders import making
from fairseq_ext.translation.decode.ctranslate_backend import DESCRIPTION, VERSION


def converted_once(
    places: Sequence[Path], name: str, digest: str, what: str, write: Callable[[Path], str]
) -> Path:
    """The folder `name` in the first of `places` that has it whole, else made by `write`.

    write(folder) returns a sentence about how it went; who makes it at the same time is waited for.
    """
    for place in places:
        if is_whole(place / name, digest):
            return place / name
    folder = writable(places) / name
    # one that is there already is damaged
    with making(folder, lambda: is_whole(folder, digest), wait=True) as new:
        if new:
            print(f"converting {what}; this happens once", file=sys.stderr)
            print(write(new), file=sys.stderr)
    return folder


def writable(places: Sequence[Path]) -> Path:
    """The first place that can be written to, made where it is absent.

    Where none can, a folder that lasts as long as the process.
    """
    for place in places:
        with contextlib.suppress(OSError):
            probe = place / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
            probe.mkdir(parents=True)
            probe.rmdir()
            return place
    place = Path(tempfile.mkdtemp(prefix="ctranslate2-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def is_whole(folder: Path, digest: str) -> bool:
    """Whether a folder holds what was converted from the checkpoint with this SHA-256."""
    try:
        description = read_description(folder)
        sizes = {name: (folder / name).stat().st_size for name in description["files"]}
        return bool(
            description["version"] == VERSION
            and description["checkpoint_sha256"] == digest
            and sizes == description["files"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    return found
