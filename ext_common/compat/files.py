"""Checkpoint files without fairseq: are they whole, what do they name, how are they written."""

import argparse
import codecs
import contextlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import torch

from ext_common.cli import UserError, why_full
from ext_common.manifest import sync_folder

# How files written by torch.save before PyTorch 1.6 begin (they are no zip archives).
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def allow_namespace() -> None:
    """Let torch.load read under weights_only what fairseq-train itself writes beside tensors.

    argparse.Namespace, the options of a legacy architecture, and arrays of numbers, which
    `--eval-bleu` logs. The one only carries attributes, of the others only bytes are read: building or
    filling them calls nothing.
    """
    numbers = [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
    array = [np.ndarray, np.dtype, *numbers, codecs.encode]
    # what numpy writes is `numpy.core` up to 1.26 and `numpy._core` since
    rebuild = np.zeros(0).__reduce__()[0]
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    torch.serialization.add_safe_globals([argparse.Namespace, *array, *names])


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a file has the beginning and the end of a checkpoint; its weights are not read.

    An archive's directory is its last part, so one cut short anywhere has none.
    """
    with open(path, "rb") as file:
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            return True
        try:
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
        except zipfile.BadZipFile:
            return False


def why_unreadable(path: str, error: Exception) -> str | None:
    """One sentence on why reading `path` ended in `error`; None where the file is innocent."""
    if isinstance(error, UserError):
        return None
    if os.path.isdir(path):
        return f"{path} is a folder: give one checkpoint in it"
    if not os.path.isfile(path):
        return f"{path} does not exist: give the path of a checkpoint"
    if not is_whole(path):
        size = os.path.getsize(path)
        return f"{path} is truncated or no checkpoint at all ({size:,} bytes): give a whole one"
    foreign = foreign_globals(path, error)
    if foreign:
        return (
            f"{path} holds {', '.join(foreign)}, which no checkpoint needs and which loading would "
            "run, so it is refused unread: only weights, numbers, text and options are allowed"
        )
    if isinstance(error, KeyError):
        return f"{path} is no fairseq checkpoint (it has no {error}): give one fairseq-train wrote"
    if isinstance(error, pickle.UnpicklingError | EOFError) or "PytorchStreamReader" in str(error):
        return f"{path} is damaged ({first_line(error)}): give another checkpoint"
    return None


def why_misfit(path: str, error: BaseException | None) -> str | None:
    """One sentence where `error`, or one behind it, is of weights that do not fit a model; else None."""
    while error is not None and "loading state_dict" not in str(error):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    detail = "; ".join(line if len(line) < 200 else line[:200] + "…" for line in lines[:2])
    return (
        f"{path} does not fit this model ({detail}): use the --arch and options it was trained "
        "with, or another --save-dir"
    )


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file begins as what torch.save writes since PyTorch 1.6, a zip archive; False for none."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def foreign_globals(path: str, error: Exception | None = None) -> list[str]:
    """What a checkpoint names that is not allowed to be read, found without loading it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        # A file of before 1.6 cannot be listed; the loader names the first one it refuses.
        return sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error)))) if error else []


def first_line(error: Exception) -> str:
    """The first line that says something, shortened to a clause."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file that replaces `path`, synced, when the block ends well; else `path` stays.

    The name written aside is always the same, so that killed runs do not pile up gigabytes.
    """
    path = os.path.realpath(path)
    aside = path + ".tmp"
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(aside)
        full = why_full(error)
        if full:
            raise UserError(
                f"cannot write {path}: {full}; make room and start the same command "
                "again, it continues from the last whole checkpoint"
            ) from error
        raise
    sync_folder(os.path.dirname(path))


def plain_numbers(obj: Any) -> Any:
    """`obj` with numpy scalars as Python numbers; containers without any are not copied."""
    if isinstance(obj, np.generic):
        return obj.item()
    if isinstance(obj, dict):
        pairs = [(plain_numbers(key), plain_numbers(value)) for key, value in obj.items()]
        if all(k is k0 and v is v0 for (k, v), (k0, v0) in zip(pairs, obj.items(), strict=True)):
            return obj
        if type(obj) not in (dict, OrderedDict):
            return obj
        new = type(obj)(pairs)
        # A state_dict keeps the versions of its modules as an attribute.
        if isinstance(obj, OrderedDict):
            new.__dict__.update(obj.__dict__)
        return new
    if type(obj) in (list, tuple, set):
        items = [plain_numbers(item) for item in obj]
        return obj if all(a is b for a, b in zip(items, obj, strict=True)) else type(obj)(items)
    return obj
