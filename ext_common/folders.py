"""Folders that are whole or absent, made by one process at a time, whatever moment it is killed at.

`.NAME.partial` beside a folder is what is being written, `.NAME.lock` says that somebody does, and
`.NAME.replaced` is there for a moment while a finished one takes the place of another.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ext_common.cli import UserError, writing
from ext_common.manifest import sync_folder

StrPath = str | os.PathLike[str]

_EXCHANGE = 2
_HERE = -100
_FEW = 16  # files; so many are synced one by one, whatever else is being written


@contextlib.contextmanager
def making(
    dest: StrPath,
    made: Callable[[], bool] = lambda: False,
    *,
    wait: bool = False,
    continues: Callable[[Path], bool] | None = None,
) -> Iterator[Path | None]:
    """The folder to write; it becomes `dest`, in the place of what is there, when the block ends well.

    None where `made()` says that `dest` is what would be made; it is asked again once no other process is
    at it. An exception removes the folder, unless `continues` is given, which says whether what an earlier
    run left in it may be gone on with. Another process that makes `dest`: UserError, or with `wait` it is
    waited for.
    """
    place = Path(os.path.realpath(dest))
    partial, replaced = partial_folder(place), _replaced(place)
    # asked without a lock first: a folder that is ready may be one that cannot be written
    if not replaced.exists() and made():
        yield None
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock_file(place), dest, wait=wait):
        _undo_interrupted(place)
        if made():
            yield None
            return
        if continues is None or not continues(partial):
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        kept = "what is done is kept" if continues else "nothing of it is kept"
        try:
            with writing(dest, f"{kept}; make room, and run the same command again"):
                yield partial
                make_durable(partial)
        except BaseException:
            if continues is None:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _put(partial, place)


@contextlib.contextmanager
def exclusive(path: StrPath, what: StrPath, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards; `what` is being written meanwhile."""
    handle = lock(path, what, wait=wait)
    try:
        yield
    finally:
        # while it is held: nobody can be in possession of another file of this name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def lock(path: StrPath, what: StrPath, *, wait: bool = False) -> int:
    """A descriptor of the file `path` (made where there is none) that no other process holds.

    Closing it lets go, and so does being killed. UserError, which says that `what` is being written, where
    another process has it; with `wait` that is said on stderr and it is waited for.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(
                        f"{what} is being written by another process: wait for it, or give another place"
                    ) from None
                print(
                    f"waiting for another process that writes {what}", file=sys.stderr, flush=True
                )
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_still(handle: int, path: StrPath) -> bool:
    """Whether the file is what it was: who held it before may have removed or replaced it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def lock_file(dest: StrPath) -> Path:
    """What is locked while `dest` is being made."""
    return _beside(Path(os.path.realpath(dest)), "lock")


def partial_folder(dest: StrPath) -> Path:
    """Where `dest` is while it is being made."""
    return _beside(Path(os.path.realpath(dest)), "partial")


def is_made(
    dest: Path,
    plan: Mapping[str, Any],
    read: Callable[[Path], Mapping[str, Any] | None],
    *,
    overwrite: bool = False,
    words: Mapping[str, str] | None = None,
) -> bool:
    """Whether `dest` is what `plan` would make; UserError where it is anything that may not be replaced.

    read(dest): the plan that it was made by, None where it is not from this command. `overwrite`: one that
    is from this command may be replaced. words: as of :func:`difference`.
    """
    if not dest.exists():
        return False
    refuse_file(dest)
    before = read(dest)
    if before is None:
        refuse_strangers(dest)
        return False
    if overwrite:
        return False
    if before != plan:
        raise UserError(
            f"{dest} was prepared with {difference(before, plan, words)}: use --overwrite to replace it, or"
            " another folder"
        )
    return True


def refuse_file(dest: Path) -> None:
    """UserError where a folder cannot be made because there is a file."""
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file: give a folder to write")


def refuse_strangers(dest: Path, ours: Iterable[str] = ()) -> None:
    """UserError where `dest` is a file, or holds any that no earlier run of the command can have left."""
    refuse_file(dest)
    strangers = sorted({path.name for path in dest.iterdir()} - set(ours)) if dest.exists() else []
    if strangers:
        raise UserError(
            f"{dest} holds other files ({strangers[0]}) and is not from this command: give a new folder to"
            " write"
        )


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], words: Mapping[str, str] | None = None
) -> str:
    """The first thing that two plans differ in, for a message: `--seed 1, not 2`.

    words: what to say of a key instead; {before} and {now} are its values.
    """
    words = words or {}
    for key in {**new, **old}:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key in words:
            return words[key].format(before=_shown(before), now=_shown(now))
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            return difference(before, now, words)
        return f"--{key.replace('_', '-')} {_shown(before)}, not {_shown(now)}"
    return "other options"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value)


def _beside(place: Path, ending: str) -> Path:
    return place.parent / f".{place.name}.{ending}"


def _replaced(place: Path) -> Path:
    return _beside(place, "replaced")


def _is_there(place: Path) -> bool:
    return place.exists() and not (place.is_dir() and not any(place.iterdir()))


def _put(partial: Path, place: Path) -> None:
    """Rename a whole folder into place. At no moment is there neither the old nor the new one, where the
    file system can exchange two; elsewhere the next start puts the old one back."""
    replaced = _replaced(place)
    if not _is_there(place):
        os.rename(partial, place)
    else:
        os.rename(partial, replaced)
        try:
            _exchange(replaced, place)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.rename(replaced, partial)
            os.rename(place, replaced)
            os.rename(partial, place)
    sync_folder(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _undo_interrupted(place: Path) -> None:
    """What :func:`_put` left that was killed: the old folder keeps or gets back its name."""
    replaced = _replaced(place)
    if not replaced.exists():
        return
    if _is_there(place):
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, place)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _exchange(one: Path, other: Path) -> None:
    """Two paths get each other's names at once; OSError where system or file system cannot."""
    try:
        renameat2 = _libc().renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def make_durable(folder: StrPath) -> None:
    """Make all files of a folder survive a power cut.

    Of many the file system is synced once, where that can be asked: a sync of each waits for the disk.
    """
    count = sum(len(files) for _, _, files in os.walk(folder))
    if count <= _FEW or not _syncs_at_once(folder):
        _sync_each(Path(folder))


def _syncs_at_once(folder: StrPath) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        return not _libc().syncfs(handle)
    except AttributeError:
        return False
    finally:
        os.close(handle)


def _sync_each(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                continue
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(parent)
