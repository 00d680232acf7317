"""The folder that `generate` wrote, read line by line, and what its synthetic text becomes.

A synthetic line is a source of training; with the mode noised-beam the word FILLER in it stands for a word
that was taken away. Filters see such a gap as one character that is no letter, training as the id of <unk>.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from ext_common.cli import UserError
from ext_common.manifest import MANIFEST_NAME
from fairseq_ext.backtranslation.modes import FILLER
from fairseq_ext.translation.text.normalise import normalise, read_lines
from fairseq_ext.translation.text.spm import UNK, Codec

KIND = "synthetic"
WORK = ".work"
WITH_FILLERS = "noised-beam"
GAP = "\ufffc"
"""OBJECT REPLACEMENT CHARACTER: a word for `length` in every language, and a letter in none."""
_REMEDY = "run fairseq_ext.backtranslation.generate again with the same arguments"
_FIELDS = {
    "real_lang": str,
    "synthetic_lang": str,
    "lines": int,
    "nbest": int,
    "round": int,
    "real_sha256": str,
    "model": dict,
    "mode": dict,
}


class Pair(NamedTuple):
    """A real line and one of the synthetic lines for it, both as they stand in the files.

    line: from 1; rank: from 1, which of the n best; score: of the reverse model, or None; reason: why
    `synthetic` is empty, None where it is not.
    """

    line: int
    rank: int
    real: str
    synthetic: str
    score: float | None
    reason: str | None


@dataclass(frozen=True)
class Synthetic:
    """What manifest.json says of the folder `path`; made by :meth:`open`.

    model: "source_lang" and "target_lang" of the reverse model beside what else is known of it; fillers:
    whether FILLER in its synthetic text stands for a missing word, else it is text like any other.
    """

    path: Path
    real_lang: str
    synthetic_lang: str
    lines: int
    nbest: int
    round: int
    real_sha256: str
    model: dict[str, Any]
    mode: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Synthetic":
        """The finished folder at `path`; UserError where there is none."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: give a folder of fairseq_ext.backtranslation.generate")
        if (path / WORK).exists():
            raise UserError(f"{path} is not finished (it has {WORK}): {_REMEDY}")
        meta = _read_manifest(path / MANIFEST_NAME)
        found = cls(path, **{name: meta[name] for name in _FIELDS})
        missing = [file for file in found.files if not file.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]} is missing, though {path / MANIFEST_NAME} names these languages: restore "
                f"it, or {_REMEDY}"
            )
        return found

    @property
    def real(self) -> Path:
        return self.path / f"real.{self.real_lang}"

    @property
    def outputs(self) -> list[Path]:
        """The files of synthetic lines, best first."""
        more = (f"synthetic.{rank}." for rank in range(2, self.nbest + 1))
        return [self.path / f"{name}{self.synthetic_lang}" for name in ("synthetic.", *more)]

    @property
    def files(self) -> list[Path]:
        """All files but the manifest."""
        records = [self.path / f"{name}.jsonl" for name in ("provenance", "rejects")]
        return [self.real, *self.outputs, *records]

    @property
    def fillers(self) -> bool:
        return bool(self.mode["name"] == WITH_FILLERS)

    def pairs(self) -> Iterator[Pair]:
        """Every line with each of its synthetic ones, in order: `lines` · `nbest` pairs.

        UserError where the files differ in their number of lines or speak of other lines.
        """
        provenance = self.path / "provenance.jsonl"
        names = [self.real, *self.outputs, provenance]
        columns: list[Iterable[Any]] = [*map(read_lines, names[:-1]), _records(provenance)]
        rows = zip_longest(*columns)
        reasons = _Reasons(self.path / "rejects.jsonl")
        number = 0
        for number, row in enumerate(rows, 1):
            if None in row or number > self.lines:
                raise self._uneven(names, row, number)
            real, *outputs, record = row
            if record.get("line") != number:
                raise UserError(
                    f"{provenance}, line {number} is about line {record.get('line')}: {_REMEDY}"
                )
            why = reasons.of(number)
            for rank, text in enumerate(outputs, 1):
                known = why.get(rank) or why.get(None) or "the synthetic line is empty"
                reason = None if text else known
                yield Pair(number, rank, real, text, _score(record, rank), reason)
        if number < self.lines:
            raise self._uneven(names, (None, *names[1:]), number + 1)

    def _uneven(self, names: list[Path], row: tuple[Any, ...], number: int) -> UserError:
        ended = [name for name, cell in zip(names, row, strict=True) if cell is None]
        if ended and number <= self.lines:
            what = f"{ended[0]} has only {number - 1:,} lines"
        else:
            longer = next(n for n, cell in zip(names, row, strict=True) if cell is not None)
            what = f"{longer} has more than {number - 1:,} lines"
        return UserError(f"{what}, {self.path / MANIFEST_NAME} says {self.lines:,}: {_REMEDY}")


@dataclass(frozen=True)
class SourceEncoder:
    """Normalised synthetic text to ids, without `</s>`.

    tag: id in front, None for none; fillers: whether the word FILLER is `<unk>`. A tag or a special
    symbol that stands in the text stays text.
    """

    codec: Codec
    tag: int | None = None
    fillers: bool = False

    def __call__(self, text: str) -> list[int]:
        ids = [] if self.tag is None else [self.tag]
        for part in split_fillers(text) if self.fillers else [text]:
            ids += [UNK] if part is None else self.codec.encode(part)
        return ids


def split_fillers(text: str) -> list[str | None]:
    """Text between the words FILLER, and None for each of these."""
    parts: list[str | None] = []
    words: list[str] = []
    for word in text.split(" "):
        if word != FILLER:
            words.append(word)
            continue
        parts += [" ".join(words), None]
        words = []
    parts.append(" ".join(words))
    return [part for part in parts if part is None or part.strip()]


def clean_synthetic(text: str, lang: str, convention: str, fillers: bool) -> str:
    """Synthetic text as it is trained on; whatever the convention does, a FILLER stays one."""
    if not fillers:
        return normalise(text, lang, convention).strip()
    parts = split_fillers(text)
    cleaned = (FILLER if p is None else normalise(p, lang, convention).strip() for p in parts)
    return " ".join(filter(None, cleaned))


def with_gaps(text: str) -> str:
    """Text as filters see it: GAP for FILLER."""
    return " ".join(GAP if part is None else part for part in split_fillers(text))


def without_gaps(text: str) -> str:
    """What is left of :func:`with_gaps` without them."""
    return " ".join(word for word in text.split(" ") if word != GAP)


class _Reasons:
    """Why lines are unusable, from rejects.jsonl read beside the lines."""

    def __init__(self, path: Path):
        self.path, self.records = path, _records(path)
        self.line, self.next = 0, next(self.records, None)

    def of(self, number: int) -> dict[int | None, str]:
        """rank → reason, None for all ranks of the line; to be asked for in ascending order."""
        found: dict[int | None, str] = {}
        while self.next is not None:
            line = self.next.get("line")
            if not isinstance(line, int) or line < self.line:
                raise UserError(f"{self.path} is not in the order of the lines: {_REMEDY}")
            if line > number:
                break
            self.line = line
            if line == number:
                found.setdefault(self.next.get("rank"), str(self.next.get("reason")))
            self.next = next(self.records, None)
        return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is no JSON object: {_REMEDY}")
        yield record


def _score(record: dict[str, Any], rank: int) -> float | None:
    score = record.get("score")
    if isinstance(score, list):
        score = score[rank - 1] if rank <= len(score) else None
    return float(score) if isinstance(score, int | float) else None


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} is not finished (no {MANIFEST_NAME}): {_REMEDY}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): {_REMEDY}") from error
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise UserError(
            f"{file.parent} holds no synthetic text: give a folder of "
            "fairseq_ext.backtranslation.generate"
        )
    wrong = [key for key, kind in _FIELDS.items() if not isinstance(meta.get(key), kind)]
    if not wrong and not isinstance(meta["mode"].get("name"), str):
        wrong = ["mode"]
    if not wrong and meta["nbest"] < 1:
        wrong = ["nbest"]
    if wrong:
        raise UserError(f"{file} is damaged (no usable {', '.join(wrong)}): {_REMEDY}")
    return meta
