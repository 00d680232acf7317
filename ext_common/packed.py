"""A packed model: one zip file with weights, configuration and what a reader wants to know, each part hashed.

    pack.json             what it is, and the SHA-256 of every other part; the first part of the file
    state.json            the checkpoint but for its tensors and the optimizer's state
    weights.safetensors   its tensors
    README.md             the model card
    …                     what the wing of the model and who packed it added

Hashes find damage. They are no protection against somebody who changes a part and its hash. Reading runs
nothing that is in the file; torch is imported for the weights only.
"""

import argparse
import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import atomic_write

FORMAT, VERSION = "ext_common.pack", 1
ABOUT, STATE, WEIGHTS, CARD = "pack.json", "state.json", "weights.safetensors", "README.md"
# of the checkpoint's parts, what only a training that goes on needs
LEFT_OUT = ("last_optimizer_state",)
_MARK = "$"
# the same bytes whenever it is packed: the earliest date that a zip file has
_DATE = (1980, 1, 1, 0, 0, 0)


def is_pack(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a pack does; False where there is none."""
    try:
        with open(path, "rb") as file:
            start = file.read(30 + len(ABOUT))
    except OSError:
        return False
    return start[:4] == b"PK\x03\x04" and start[30:] == ABOUT.encode()


class Pack:
    """An open pack. UserError, in one sentence, where it is damaged or of a newer version."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self.about = json.loads(self._bytes(ABOUT))
            found = self.about["format"], self.about["version"]
            self.files: dict[str, str] = {n: str(h) for n, h in self.about["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(ABOUT) from error
        if found != (FORMAT, VERSION):
            raise UserError(
                f"{self.path} is a pack of version {found[1]}, this program reads {VERSION}: use a newer one"
            )

    def read(self, name: str) -> bytes:
        """The bytes of a part, which are what was packed."""
        if name not in self.files:
            raise UserError(f"{self.path} has no {name}: it has {', '.join(self.files)}")
        data = self._bytes(name)
        if hashlib.sha256(data).hexdigest() != self.files[name]:
            raise self._damaged(name)
        return data

    def state(self) -> dict[str, Any]:
        """The checkpoint, as `ext_common.checkpoints.read_state` gives it."""
        tensors = import_safetensors().load(self.read(WEIGHTS))
        state = decoded(json.loads(self.read(STATE)), tensors)
        assert isinstance(state, dict)
        return state

    def _bytes(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist: give a pack") from None
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError) as error:
            raise self._damaged(name) from error
        except (
            NotImplementedError,
            RuntimeError,
        ) as error:  # methods or passwords that a pack has not
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> UserError:
        return UserError(
            f"{self.path} is damaged (its part {name} is not what was packed): get it once more"
        )


def write(
    path: str | os.PathLike[str],
    about: Mapping[str, Any],
    state: Mapping[str, Any],
    files: Mapping[str, bytes | Path],
) -> None:
    """Write a pack; about: what pack.json says beside format and hashes; files: name → content or file."""
    tensors: dict[str, Any] = {}
    kept = {key: value for key, value in state.items() if key not in LEFT_OUT}
    text = json.dumps(encoded(kept, "", tensors, {}), ensure_ascii=False, allow_nan=False)
    parts: dict[str, bytes | Path] = {
        STATE: text.encode(),
        WEIGHTS: import_safetensors().save(tensors),
        **files,
    }
    hashes = {name: _sha256(content) for name, content in parts.items()}
    head = {"format": FORMAT, "version": VERSION, **about, "files": hashes}
    first = json.dumps(head, indent=2, ensure_ascii=False).encode()
    with atomic_write(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in {ABOUT: first, **parts}.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            entry = zipfile.ZipInfo(name, _DATE)
            # weights hardly shrink
            entry.compress_type = (
                zipfile.ZIP_STORED if name.endswith(_STORED) else zipfile.ZIP_DEFLATED
            )
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


_STORED = (".safetensors", ".onnx", ".npz", ABOUT)


def encoded(value: Any, place: str, tensors: dict[str, Any], known: dict[Any, str]) -> Any:
    """`value` as JSON; tensors go to `tensors` under their place, one that is there twice once.

    known: storage, shape and strides of those that are there. UserError for what it cannot hold.
    """

    def inside(item: Any, key: Any) -> Any:
        return encoded(item, f"{place}{key}", tensors, known)

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_MARK: "float", "of": repr(value)}
    if isinstance(value, list):
        return [inside(item, f".{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple | set):
        items = sorted(value) if isinstance(value, set) else value
        return {
            _MARK: type(value).__name__ if isinstance(value, set) else "tuple",
            "of": [inside(item, f".{i}") for i, item in enumerate(items)],
        }
    if isinstance(value, argparse.Namespace):
        return {_MARK: "namespace", "of": inside(vars(value), "")}
    if isinstance(value, Mapping):
        dot = "." if place else ""
        if all(isinstance(key, str) and key != _MARK for key in value):
            return {key: inside(item, f"{dot}{key}") for key, item in value.items()}
        if all(key is None or isinstance(key, bool | int | str) for key in value):
            pairs = [[key, inside(item, f"{dot}{key}")] for key, item in value.items()]
            return {_MARK: "dict", "of": pairs}
    if hasattr(value, "untyped_storage"):
        storage = value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype
        this = (*storage, tuple(value.shape), value.stride())
        if value.numel() == 0 or this not in known:
            known[this] = place
            tensors[place] = value.detach().cpu().contiguous().clone()
        return {_MARK: "tensor", "of": known[this]}
    raise UserError(
        f"the checkpoint's {place} is a {type(value).__name__}, which a pack cannot hold"
    )


def decoded(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The reverse of `encoded`."""
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {key: decoded(item, tensors) for key, item in value.items()}
    kind, of = value[_MARK], value["of"]
    if kind == "tensor":
        return tensors[of]
    if kind == "float":
        return float(of)
    if kind == "dict":
        return {key: decoded(item, tensors) for key, item in of}
    if kind == "namespace":
        return argparse.Namespace(**decoded(of, tensors))
    return {"tuple": tuple, "set": set}[kind](decoded(of, tensors))


def import_safetensors() -> Any:
    """safetensors.torch, or a sentence on how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "a pack needs the package safetensors: pip install 'fairseq-ext[pack]'"
        ) from None
    return safetensors.torch


def _sha256(content: bytes | Path) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest()
