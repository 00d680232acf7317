"""A gallery: people by their embeddings, in one file with all that naming them takes.

    with changing("people.npz", model.sha256) as gallery:
        gallery.enrol("anna", embeddings)

The bytes of the file follow from who is in it, not from how they came there.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ext_common.cli import UserError, did_you_mean
from ext_common.folders import exclusive
from fairseq_ext.speaker.verify.backend import Backend, Side, read_arrays, write_arrays

FORMAT = 1
UNKNOWN = "unknown"  # who is nobody of the gallery
WHOLE = "whole"  # the key of the threshold for recordings as they are


@dataclass
class Gallery:
    """People with what compares them.

    model: SHA-256 of weights and feature specification; members: name → float32 (n, D), rows in the order of
    their values; thresholds: WHOLE or seconds of a window → what `calibrate` found for it.
    """

    model: str
    backend: Backend
    members: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Who is enrolled, in the order of columns of scores."""
        return sorted(self.members)

    @property
    def sha256(self) -> str:
        """Of the members and of the score: what a threshold is good for."""
        digest = hashlib.sha256()
        for name in self.names:
            rows = self.members[name]
            digest.update(f"{name!r} {rows.shape}\n".encode())
            digest.update(rows.tobytes())
        for name, value in sorted(self.backend.arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def enrol(self, name: str, embeddings: np.ndarray) -> None:
        """Add recordings of a person, float (n, D); one that is there already is not added again."""
        if name.split() != [name] or name == UNKNOWN:
            raise UserError(
                f"a person needs a name without white space, other than {UNKNOWN!r}, got {name!r}"
            )
        new = np.asarray(embeddings, dtype=np.float32)
        before = self.members.get(name, new[:0])
        self.members[name] = np.unique(np.concatenate([before, new]), axis=0)

    def remove(self, name: str) -> None:
        """Forget a person; UserError where there is none of the name."""
        if name not in self.members:
            near = did_you_mean(name, self.members) or ": show lists who is"
            raise UserError(f"nobody called {name!r} is enrolled{near}")
        del self.members[name]

    def scores(self, tests: Side) -> np.ndarray:
        """float32 (T, N) of T recordings against `names`: log-likelihood ratios where calibrated."""
        if not self.members:
            raise UserError("nobody is enrolled: gallery enrol adds people")
        # how long they were is not kept: measures that need it are refused at enrolment
        unknown = np.full(len(self.members), np.nan)
        people = Side([self.members[name] for name in self.names], unknown, unknown)
        grid = np.indices((len(self.members), len(tests.recordings))).reshape(2, -1)
        first, second = grid.astype(np.int32)
        found = self.backend.scores(people, tests, first, second)
        if self.backend.calibration is not None:
            found = self.backend.llr(found, people, tests, first, second)
        return found.reshape(len(self.members), -1).T

    def threshold(self, window: float | None) -> dict[str, Any] | None:
        """What `calibrate` found for windows of so many seconds (None: whole recordings)."""
        return self.thresholds.get(window_key(window))

    def is_stale(self, threshold: dict[str, Any]) -> bool:
        """Whether the gallery is another one than that the threshold was found on."""
        return bool(threshold["members"] != self.sha256)

    def check_model(self, model: str, path: str | os.PathLike[str]) -> None:
        """UserError where embeddings are of another model than those in the gallery."""
        if model != self.model:
            raise UserError(
                f"{path} was enrolled with another model ({self.model[:12]}…, not {model[:12]}…):"
                " embeddings of two models cannot be compared; give that checkpoint, or enrol anew"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        meta = {
            "format": FORMAT,
            "model": self.model,
            "names": self.names,
            "counts": [len(self.members[name]) for name in self.names],
            "thresholds": dict(sorted(self.thresholds.items())),
        }
        rows = [self.members[name] for name in self.names]
        arrays = {f"backend_{name}": value for name, value in self.backend.arrays().items()}
        arrays["gallery"] = np.array(json.dumps(meta, ensure_ascii=False, sort_keys=True))
        if rows:
            arrays["members"] = np.concatenate(rows)
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The gallery in a file; UserError where it is none."""
        arrays = read_arrays(path, "a gallery: gallery enrol makes one")
        try:
            meta = json.loads(str(arrays["gallery"]))
            if meta["format"] != FORMAT:
                raise ValueError(f"it has format {meta['format']}, this version reads {FORMAT}")
            fitted = {
                name.removeprefix("backend_"): value
                for name, value in arrays.items()
                if name.startswith("backend_")
            }
            edges = np.cumsum([0, *meta["counts"]])
            members = {
                name: arrays["members"][start:end]
                for name, start, end in zip(meta["names"], edges[:-1], edges[1:], strict=True)
            }
            backend = Backend.from_arrays(fitted)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path} is not a gallery ({error}): give one, or another name"
            ) from None
        return cls(meta["model"], backend, members, meta["thresholds"])


def window_key(window: float | None) -> str:
    """The key of a threshold."""
    return WHOLE if window is None else f"{window:g}"


@contextlib.contextmanager
def changing(path: str | os.PathLike[str], new: Gallery | None = None) -> Iterator[Gallery]:
    """The gallery in a file, written back when the block ends well; another process waits meanwhile.

    new: what to begin with where there is no file; None: UserError.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place.with_name(f".{place.name}.lock"), path, wait=True):
        gallery = new if new is not None and not place.exists() else Gallery.load(place)
        yield gallery
        gallery.save(place)
