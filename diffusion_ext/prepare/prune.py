"""Taking decoded images out of the cache, which keeps one copy of a folder for each size it was asked in."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_ext.prepare.build import NAME, read_meta
from diffusion_ext.prepare.images import ImageFiles
from ext_common.cli import UserError
from ext_common.folders import exclusive, lock_file


class Removed(NamedTuple):
    """A store that was taken out: where it lay, why, and its size in bytes."""

    store: Path
    why: str
    size: int


def prune(cache: str | os.PathLike[str], source: str | os.PathLike[str] | None) -> list[Removed]:
    """Remove from `cache` the stores of `source`, or of sources that are gone or empty where it is None.

    One that another process is writing stays. Nothing but stores is touched: a training that reads one goes
    on, as its file is there until it is closed.
    """
    removed = []
    wanted = None if source is None else str(Path(source).resolve())
    for store in sorted(Path(cache).glob("*")):
        meta = _meta(store)
        if meta is None:
            continue
        why = f"of {wanted}" if meta["source"] == wanted else ""
        if wanted is None:
            why = _why_useless(meta["source"])
        if not why:
            continue
        try:
            with exclusive(lock_file(store), store):
                size = sum(path.stat().st_size for path in store.glob("*"))
                shutil.rmtree(store)
        except UserError:
            continue
        removed.append(Removed(store, why, size))
    return removed


def _meta(store: Path) -> dict[str, Any] | None:
    try:
        meta = read_meta(store) if (store / f"{NAME}.bin").is_file() else None
    except UserError:
        return None
    return meta if meta and isinstance(meta.get("source"), str) else None


def _why_useless(source: str) -> str:
    if not os.path.exists(source):
        return f"{source} is gone"
    if os.path.isdir(source) and not ImageFiles(source).sources:
        return f"{source} holds no images any more"
    return ""
