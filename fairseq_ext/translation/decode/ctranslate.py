"""CTranslate2: a fairseq Transformer converted once, checked, and kept beside its checkpoint.

What is converted is found again by the SHA-256 of the checkpoint's content, and using it needs neither torch
nor fairseq.
"""

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import known_sha256, user_cache
from fairseq_ext.translation.decode.checkpoint import Vocabulary, lines_of
from fairseq_ext.translation.decode.ctranslate_backend import (
    DESCRIPTION,
    CTranslate2Backend,
    import_ctranslate2,
    token,
)
from fairseq_ext.translation.decode.ctranslate_folder import (
    converted_once,
    is_whole,
    read_description,
)
from fairseq_ext.translation.decode.shortlist import with_shortlist
from fairseq_ext.translation.text.spm import Codec

COMPUTE_TYPES = ("float32", "int8", "float16", "bfloat16", "int8_float16", "int8_bfloat16")


def open_model(
    paths: Sequence[str],
    device: str = "cpu",
    compute_type: str | None = None,
    user_dir: str | None = None,
    threads: int | None = None,
    ema: bool = False,
    shortlist: str | None = None,
) -> tuple[CTranslate2Backend, Vocabulary]:
    """A checkpoint as backend and vocabulary, converted where it was not yet.

    shortlist: a prepared bitext, by which a batch may become only what its pieces have been translated by.
    UserError for an ensemble, a device or type that CTranslate2 lacks here, and a model it does not
    support (all of the reasons in one).
    """
    if len(paths) > 1:
        raise UserError(
            "the backend ctranslate2 takes one checkpoint: average several with"
            " python -m fairseq_ext.translation.average, or use --backend fairseq"
        )
    ctranslate2 = import_ctranslate2()
    device, index = usable_device(device, ctranslate2)
    compute_type = usable_type(compute_type, device, ctranslate2)
    folder = converted(Path(paths[0]), compute_type, user_dir, ema)
    description = read_description(folder)
    vocabulary = read_vocabulary(folder, description)
    if shortlist:
        folder = with_shortlist(folder, shortlist, vocabulary, token)
    models = opener(folder, device, index, compute_type, threads)
    backend = CTranslate2Backend(
        models(), description["positions"], vocabulary.target.size, lambda: models(1)
    )
    backend.shortlist = bool(shortlist)
    return backend, vocabulary


def opener(
    folder: Path, device: str, index: int, compute_type: str, threads: int | None = None
) -> Callable[..., Any]:
    """What makes a ctranslate2.Translator of a folder, with so many workers (none: as many as sensible)."""
    # a batch for each thread: threads within one wait for each other, on a busy machine mostly
    usual = (threads or len(os.sched_getaffinity(0))) if device == "cpu" else 1
    make = functools.partial(
        import_ctranslate2().Translator,
        str(folder),
        device=device,
        device_index=index,
        compute_type=compute_type,
        intra_threads=1,
    )
    return lambda workers=usual: make(inter_threads=workers)


def usable_device(device: str, ctranslate2: Any) -> tuple[str, int]:
    """("cpu" or "cuda", number of the device)."""
    kind, _, index = device.partition(":")
    count = ctranslate2.get_cuda_device_count()
    if kind == "auto":
        return ("cuda" if count else "cpu"), 0
    if kind == "cpu" or (kind == "cuda" and (index or "0").isdigit() and int(index or 0) < count):
        return kind, int(index or 0) if kind == "cuda" else 0
    raise UserError(
        f"device {device!r} cannot be used by CTranslate2 (it sees {count} CUDA devices): try cpu"
    )


def usable_type(compute_type: str | None, device: str, ctranslate2: Any) -> str:
    """The compute type, float32 where none is given; UserError where the device has not got it."""
    compute_type = compute_type or "float32"
    known = ctranslate2.get_supported_compute_types(device)
    if compute_type not in COMPUTE_TYPES or compute_type not in known:
        there = ", ".join(name for name in COMPUTE_TYPES if name in known)
        raise UserError(
            f"compute type {compute_type!r} cannot be used by CTranslate2 on {device}: give {there}"
        )
    return compute_type


# --- the folder of a converted model ----------------------------------------------------------------


def converted(
    checkpoint: Path, compute_type: str, user_dir: str | None = None, ema: bool = False
) -> Path:
    """The folder of the converted model, made now or before; what it costs is said on stderr."""
    if not checkpoint.is_file():
        from fairseq_ext.translation.decode.checkpoint import read_state

        read_state(checkpoint)  # says why not
    found = already_converted(checkpoint, compute_type, ema)
    if found is not None:
        return found
    digest = known_sha256(checkpoint)
    name = _name(checkpoint, digest, compute_type, ema)

    def write(new: Path) -> str:
        from fairseq_ext.translation.decode.ctranslate_convert import convert

        report = convert(checkpoint, new, compute_type, digest, user_dir, ema)
        same = f"{_glob_safe(checkpoint.name)}.ctranslate2-*-{compute_type}{'-ema' * ema}"
        for old in new.parent.glob(same):
            # of a file of this name that is no more
            if old.name != name and (old / DESCRIPTION).is_file():
                for gone in (old, *old.parent.glob(f"{_glob_safe(old.name)}-shortlist-*")):
                    shutil.rmtree(gone, ignore_errors=True)
        return report

    return converted_once(
        _places(checkpoint), name, digest, f"{checkpoint} for CTranslate2 ({compute_type})", write
    )


def already_converted(checkpoint: Path, compute_type: str, ema: bool = False) -> Path | None:
    """The folder of the converted model where there is one."""
    digest = known_sha256(checkpoint)
    name = _name(checkpoint, digest, compute_type, ema)
    whole = (place / name for place in _places(checkpoint) if is_whole(place / name, digest))
    return next(whole, None)


def _name(checkpoint: Path, digest: str, compute_type: str, ema: bool) -> str:
    return f"{checkpoint.name}.ctranslate2-{digest[:8]}-{compute_type}{'-ema' * ema}"


def _places(checkpoint: Path) -> list[Path]:
    return [checkpoint.absolute().parent, user_cache("fairseq_ext")]


def read_vocabulary(folder: Path, description: dict[str, Any]) -> Vocabulary:
    saved = description["vocabulary"]
    source, target = (
        Codec.from_file(folder / f"spm.{side}.model", saved["extra_symbols"])
        for side in ("source", "target")
    )
    return Vocabulary(
        source,
        target,
        saved["source_lang"],
        saved["target_lang"],
        saved["convention"],
        lines_of(saved),
    )


def _glob_safe(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
