"""Outputs that are whole or absent, and the record of how they came about (manifest.json)."""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from ext_common.cli import UsageError, UserError

MANIFEST_NAME = "manifest.json"
_DISTRIBUTIONS = (
    "fairseq-ext",
    "ve-fairseq",
    "fairseq",
    "torch",
    "torchaudio",
    "numpy",
    "soundfile",
    "pillow",
    "hydra-core",
    "omegaconf",
    "sentencepiece",
    "sacrebleu",
    "ctranslate2",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
)


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "w", durable: bool = True
) -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an exception.

    `mode` is "w" (UTF-8, newlines as written) or "wb". The temporary file lies in the same
    folder (made when absent), is synced before the rename and removed on failure. A path that is
    no regular file (/dev/stdout, a pipe) is written directly: there is nothing to rename over.
    durable: False for one of many files, which `folders.make_durable` then brings to the disk together.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", os.fspath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **text) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name another place"
        ) from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # a write that fails names no file
        error.filename = error.filename if error.filename is not None else os.fspath(path)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def clear_temporary(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of `path` left; only where nobody can be writing it now."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync a folder; the rename itself still holds
    finally:
        os.close(descriptor)


def atomic_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all.

    Paths, dataclasses, numpy scalars and arrays become plain JSON; a number that is not finite
    becomes null, because JSON has no NaN and strict readers refuse the file.
    """
    text = json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


def check_writable(output: str | os.PathLike[str]) -> None:
    """UsageError, before the work is done, where no file can be written to `output`."""
    path = Path(os.path.realpath(output))
    if path.is_dir():
        raise UsageError(f"{output} is a folder: give the file to write")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir():
        raise UsageError(f"{output} cannot be written: {above} is a file")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise UserError(f"{output} cannot be written: there is no permission to write in {above}")


def beside(output: str | os.PathLike[str], what: str) -> Path:
    """Where what belongs to an output lies: `predictions.csv`, "metrics.json" → `predictions.metrics.json`.

    Only .csv and .npz are left out, so that `test.en` and `test.zh`, or two runs in one folder, keep theirs.
    """
    path = Path(output)
    name = path.stem if path.suffix in (".csv", ".npz") else path.name
    return path.with_name(f"{name}.{what}")


def user_cache(*parts: str) -> Path:
    """The folder, or one below it, for what a user's programs can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, *parts)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: str | os.PathLike[str]) -> str:
    """As :func:`sha256_file`, but what has not changed is read once, and a large file once for all programs.

    Unchanged is a file of the same :func:`identity`; digests of large ones are kept in the user's cache.
    """
    this = identity(path)
    if this in _DIGESTS:
        return _DIGESTS[this]
    name = hashlib.sha256(repr(this).encode()).hexdigest()
    note = user_cache("fairseq_ext", "sha256", name) if this.size >= _LARGE else None
    digest = ""
    if note is not None:
        with contextlib.suppress(OSError, ValueError):
            digest = note.read_text(encoding="ascii")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        digest = sha256_file(path)
        # a file that changed just now may do so again within the same tick of the clock
        settled = time.time_ns() - max(this.modified, this.changed) > _SETTLED
        if note is not None and settled and identity(path) == this:
            with contextlib.suppress(OSError), atomic_write(note) as file:
                file.write(digest)
    _DIGESTS[this] = digest
    return digest


class Identity(NamedTuple):
    """What tells a file, and each content of it, from every other; times in ns."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def identity(path: str | os.PathLike[str]) -> Identity:
    """Which file and content a path leads to at this moment. OSError where there is none."""
    s = os.stat(path)
    return Identity(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


_DIGESTS: dict[Identity, str] = {}
_LARGE = 1 << 24  # bytes; smaller files are read in a few hundredths of a second
_SETTLED = 2 * 10**9  # ns


def versions() -> dict[str, str]:
    """Installed versions of what can change a result; packages that are absent are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Any] | Iterable[str | os.PathLike[str]],
    counts: Mapping[str, Any],
    options: Any,
    seed: int | None,
    **extra: Any,
) -> Path:
    """Write `folder/manifest.json` and return its path.

    inputs: {name: hash or record}, or file paths, hashed here. counts: in, out, and out by reason.
    options: mapping or dataclass. It holds no time and no host, so equal runs give equal bytes.
    """
    if not isinstance(inputs, Mapping):
        inputs = {os.fspath(path): sha256_file(path) for path in inputs}
    record = {
        "inputs": inputs,
        "counts": counts,
        "options": options,
        "seed": seed,
        "versions": versions(),
    }
    path = Path(folder) / MANIFEST_NAME
    atomic_json(path, {**record, **extra})
    return path


def _plain(obj: Any) -> Any:
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: _plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {_key(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):  # numpy scalars and arrays, tensors: no import needed to know them
        return _plain(obj.tolist())
    if isinstance(obj, set | frozenset):
        return [_plain(item) for item in sorted(obj)]
    if isinstance(obj, Iterable):
        return [_plain(item) for item in obj]
    raise TypeError(f"{type(obj).__name__} cannot be written as JSON")


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(_plain(key))
