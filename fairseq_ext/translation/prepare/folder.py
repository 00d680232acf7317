"""A folder that appears whole: written beside its place, locked while it is, renamed at the end."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import MANIFEST_NAME, sync_folder
from fairseq_ext.translation.corpus import Corpus, partial_folder

# Below the folder while it is made; not part of what remains.
WORK = "work"


def already_made(dest: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``dest`` is what ``plan`` would make; UserError where it is anything else.

    With ``overwrite`` an earlier preparation may be there. Undoes a replacement that was interrupted.
    """
    old = _old_folder(dest)
    if old.exists():
        if dest.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, dest)
    if not dest.exists():
        return False
    if not dest.is_dir():
        raise UserError(f"{dest} is a file: give a folder to write")
    before = _plan_of(dest)
    if before is None:
        strangers = sorted(path.name for path in dest.iterdir())
        if strangers:
            raise UserError(
                f"{dest} holds other files ({strangers[0]}) and is not from this command: give a new "
                "folder"
            )
        return False
    if overwrite:
        return False
    if before != plan:
        raise UserError(
            f"{dest} was prepared with {difference(before, plan)}: use --overwrite to replace it, or "
            "another folder"
        )
    Corpus.open(dest)
    return True


@contextlib.contextmanager
def making(dest: Path) -> Iterator[Path]:
    """A new folder that becomes ``dest`` when the block ends well, and else is removed.

    It has a folder "work" for temporary files. What a killed run left is cleared first. UserError
    where another process is making ``dest``.
    """
    partial = partial_folder(dest)
    handle = _lock(partial, dest)
    try:
        _empty(partial)
        (partial / WORK).mkdir()
        try:
            yield partial
            shutil.rmtree(partial / WORK)
            _sync(partial)
            _replace(partial, dest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing that two plans differ in, for a message."""
    for key in new:
        if old.get(key) == new[key]:
            continue
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            return difference(old[key], new[key])
        if key in ("inputs", "given", "vocabulary"):
            return f"other {'models' if key == 'vocabulary' else 'files or other content of files'}"
        return f"--{key.replace('_', '-')} {_shown(old.get(key))}, not {_shown(new[key])}"
    return "other options"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value)


def _plan_of(dest: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8")).get("plan")
        kind = json.loads((dest / "corpus.json").read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return plan if kind == "translation" and isinstance(plan, dict) else None


def _old_folder(dest: Path) -> Path:
    partial = partial_folder(dest)
    return partial.with_name(partial.name.removesuffix("partial") + "replaced")


def _lock(partial: Path, dest: Path) -> int:
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who held it may have renamed the folder since it was opened here
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{dest} is being prepared by another process: wait for it, or give another folder"
            ) from None
        except FileNotFoundError:
            pass
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """Make all files of a folder survive a power cut, before it gets its name."""
    for parent, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(parent)


def _replace(partial: Path, dest: Path) -> None:
    # a link to a folder stays one
    dest = Path(os.path.realpath(dest))
    old = _old_folder(dest)
    replaced = dest.exists() and any(dest.iterdir())
    if replaced:
        os.rename(dest, old)
    os.rename(partial, dest)
    sync_folder(dest.parent)
    if replaced:
        shutil.rmtree(old)
