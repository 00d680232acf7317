"""How a folder of decoded images comes about, whole or not at all.

images.bin        uint8 pixels of all images (ext_common.store), one row (C, H, W) an image
images.json       their index
images.meta.json  size, names, labels, hashes, what was skipped and why; the fingerprint of the source
manifest.json     how it came about

It is written beside its place and renamed. Killed half-way, the same call continues there.
"""

import contextlib
import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from diffusion_ext.prepare.images import POLICY, BadImage
from ext_common.cli import UserError, progress, why_full
from ext_common.folders import making, refuse_strangers
from ext_common.manifest import MANIFEST_NAME, atomic_json, write_manifest
from ext_common.parallel import cpus, in_order
from ext_common.store import StoreWriter, interrupted_key, store_paths

FORMAT = 1
NAME = "images"
META_NAME = "images.meta.json"
OWN_FILES = {f"{NAME}.bin", f"{NAME}.json", META_NAME, MANIFEST_NAME}
# What a process decodes at a time, in images and in bytes.
BLOCK, BLOCK_BYTES = 64, 1 << 20
SHOWN = 20


@dataclass
class Recipe:
    """What to write: N images of (channels, height, width) and where each comes from.

    load(n) gives image n as uint8 (C, H, W) or raises BadImage; labels index `classes`, -1 is none.
    """

    source: str
    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    height: int
    width: int
    channels: int
    load: Callable[[int], np.ndarray]
    state: str  # changes when the source does
    left_out: str = ""  # a clause on files that are no images, or empty

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides what is written, without reading an image."""
        text = json.dumps([FORMAT, POLICY, self.shape, self.state, list(self.classes)])
        return hashlib.sha256(text.encode()).hexdigest()


def build(dest, recipe: Recipe, max_bad: float, workers: int | None = None) -> None:
    """Write `recipe` to the folder `dest` where it is not there yet.

    max_bad: share of images that may be unusable. Waits while another process writes the same.
    UserError where `dest` holds anything else than a store, or too few images can be used.
    """
    fingerprint = recipe.fingerprint

    def made() -> bool:
        if fingerprint_of(dest) == fingerprint:
            return True
        check_replaceable(dest)
        return False

    def continues(part: Path) -> bool:
        return _continues(part, fingerprint)

    try:
        with making(dest, made, wait=True, continues=continues) as part:
            if part and (fingerprint_of(part) != fingerprint or not _is_finished(part)):
                _write(part, recipe, max_bad, workers)
    except OSError as error:
        if why_full(error):
            raise
        raise UserError(
            f"{error.filename or dest} cannot be written ({error.strerror}): name another place"
        ) from error


def is_prepared(folder) -> bool:
    """Whether a folder is a store, whole or damaged; nothing of it is read."""
    return (Path(folder) / META_NAME).is_file()


def read_meta(folder) -> dict | None:
    """images.meta.json of a folder, None where there is none; UserError where it is unusable."""
    path = Path(folder) / META_NAME
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{path} is damaged: delete {folder} and prepare it again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(
            f"{path} is not of format {FORMAT}, which this version reads: prepare it again"
        )
    return meta


def fingerprint_of(folder) -> str | None:
    """The fingerprint a store was written with, None where it is not whole."""
    with contextlib.suppress(UserError):
        meta = read_meta(folder)
        if meta and (Path(folder) / f"{NAME}.bin").exists():
            return meta["fingerprint"]
    return None


def check_replaceable(dest) -> None:
    """UserError where a store written to `dest` would take the place of somebody's files."""
    refuse_strangers(Path(dest), OWN_FILES)


def image_hash(pixels: np.ndarray) -> str:
    """First 16 hex digits of SHA-256 over shape and pixels, uint8 (C, H, W)."""
    digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + b":")
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()[:16]


def content_hash(shape: Sequence[int], hashes: Sequence[str], labels: Sequence[int]) -> str:
    """Hex SHA-256 over the images and their labels, in order; shape is (C, H, W)."""
    lines = "".join(f"{h} {label}\n" for h, label in zip(hashes, labels, strict=True))
    return hashlib.sha256(f"{list(shape)}\n{lines}".encode()).hexdigest()


def check_bad(source: str, skipped: Sequence, total: int, max_bad: float) -> None:
    """UserError where more than the share `max_bad` of `total` images was skipped.

    skipped: (name, reason) each.
    """
    if not skipped or len(skipped) < total and len(skipped) <= max_bad * total:
        return
    name, reason = skipped[0]
    files = "file" if total == 1 else "files"
    text = f"{source}: {len(skipped)} of {total} {files} cannot be used ({name}: {reason})"
    if len(skipped) == total:
        raise UserError(f"{text}: give a folder of images")
    raise UserError(
        f"{text}, more than --max-bad {max_bad:g} allows: repair or delete them, or raise it"
    )


def by_reason(skipped: Sequence) -> dict[str, int]:
    """How many of the (name, reason) pairs have each reason, the most frequent first."""
    return dict(Counter(reason for _, reason in skipped).most_common())


def _write(part: Path, recipe: Recipe, max_bad: float, workers: int | None) -> None:
    with StoreWriter(part, recipe.shape, "uint8", name=NAME, key=recipe.fingerprint) as writer:
        done = {int(entry.record_id) for entry in writer.done}
        left = [n for n in range(len(recipe.names)) if n not in done]
        _decode(left, recipe, writer, workers or cpus())
        names = [printable(name) for name in recipe.names]
        kept, skipped = [], []
        for entry in writer.done:
            number = int(entry.record_id)
            if entry.rows is None:
                skipped.append((names[number], entry.note["bad"]))
            else:
                kept.append((names[number], recipe.labels[number], entry.note["hash"]))
        check_bad(recipe.source, skipped, len(names), max_bad)
        if len(kept) < 2:
            raise UserError(
                f"{recipe.source} holds {len(kept)} image, at least 2 are needed: one of them is "
                "to validate on"
            )
        columns = [list(column) for column in zip(*kept, strict=True)]
        gray = sum(entry.note.get("gray", False) for entry in writer.done)
        _write_meta(part, recipe, *columns, skipped, gray)
        writer.finish()


def _decode(numbers: list[int], recipe: Recipe, writer: StoreWriter, workers: int) -> None:
    def outcome(number: int) -> tuple[np.ndarray | None, dict]:
        try:
            pixels = recipe.load(number)
            gray = len(pixels) == 3 and bool((pixels == pixels[:1]).all())
            return pixels, {"hash": image_hash(pixels), "gray": gray}
        except BadImage as error:
            return None, {"bad": str(error)}

    def outcomes(block: list[int]) -> list[tuple[np.ndarray | None, dict]]:
        return [outcome(number) for number in block]

    size = max(1, min(BLOCK, BLOCK_BYTES // int(np.prod(recipe.shape))))
    blocks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    bad = 0
    # Processes: small images are mostly Python's work, for which threads wait for each other.
    found = in_order(outcomes, blocks, min(workers, len(blocks)), near=lambda b: recipe.names[b[0]])
    with (
        warnings.catch_warnings(),
        contextlib.closing(found),
        progress(len(numbers), "decoding", "images") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files
        for block, decoded in zip(blocks, found, strict=True):
            for number, (pixels, note) in zip(block, decoded, strict=True):
                if pixels is not None:
                    writer.append(str(number), pixels[None], note)
                    continue
                writer.skip(str(number), note)
                bad += 1
                if bad <= SHOWN:
                    _say(f"skipped {printable(recipe.names[number])}: {note['bad']}")
            bar.update(len(block))
    if bad > SHOWN:
        _say(f"skipped {bad - SHOWN} more")


def _write_meta(part: Path, recipe: Recipe, names, labels, hashes, skipped, gray) -> None:
    source, shape = printable(recipe.source), list(recipe.shape)
    digest = content_hash(shape, hashes, labels)
    atomic_json(
        part / META_NAME,
        {
            "format": FORMAT,
            "shape": shape,
            "images": len(names),
            "content_hash": digest,
            "fingerprint": recipe.fingerprint,
            "source": source,
            "classes": [printable(name) for name in recipe.classes],
            "skipped": skipped,
            "gray": gray,
            "names": names,
            "labels": labels,
            "hashes": hashes,
        },
    )
    write_manifest(
        part,
        inputs={source: recipe.state},
        counts={
            "in": len(recipe.names),
            "out": len(names),
            "skipped": by_reason(skipped),
            "duplicates": len(hashes) - len(set(hashes)),
        },
        options={"channels": shape[0], "height": shape[1], "width": shape[2]},
        seed=None,
        decoder={"pillow": PIL.__version__, "policy": POLICY},
        content_hash=digest,
    )


def _continues(part: Path, fingerprint: str) -> bool:
    if interrupted_key(part, NAME) is not None:
        return interrupted_key(part, NAME) == fingerprint
    return fingerprint_of(part) == fingerprint


def _is_finished(folder: Path) -> bool:
    unfinished, final, index, journal = store_paths(folder, NAME)
    return final.exists() and index.exists() and not journal.exists()


def printable(name: str) -> str:
    """A file name as text that can be written as UTF-8, whatever bytes it is made of."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
