"""A prepared bitext as training reads it, and how it is described.

corpus.json                      languages, convention, models with hashes, sizes of the splits
spm.LANG.model, dict.LANG.txt    SentencePiece model and the fairseq dictionary of the same pieces
SPLIT.SRC-TGT.LANG.{bin,idx}     ids (fairseq's mmap format)
text/SPLIT.LANG                  the normalised lines that were binarised, in the same order
text/SPLIT.ids                   the number of the input line that each of them was
rejects.tsv.gz, manifest.json    what was left out and why; how the folder came about
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.folders import partial_folder
from ext_common.manifest import atomic_json, sha256_file
from fairseq_ext.translation.text.spm import Codec

KIND, VERSION = "translation", 1
_REMEDY = "run fairseq_ext.translation.prepare"
_FIELDS = {
    "languages": list,
    "normalise": str,
    "joint": bool,
    "extra_symbols": list,
    "spm": dict,
    "splits": dict,
    "split_sha256": str,
}


def with_conversion(convention: str, opencc: str | None) -> str:
    return f"{convention}+{opencc}" if opencc else convention


@dataclass(frozen=True)
class Corpus:
    """What corpus.json says of the folder `path`.

    languages: (source, target) of the preparation; either direction can be trained, unless `one_way`: the
    sources are marked as synthetic. spm: language → {"file", "sha256"}; splits: name → number of pairs;
    opencc: conversion of the Chinese side or None.
    """

    path: Path
    languages: tuple[str, str]
    normalise: str
    joint: bool
    extra_symbols: tuple[str, ...]
    spm: dict[str, dict[str, str]]
    splits: dict[str, int]
    split_sha256: str
    opencc: str | None = None
    one_way: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Corpus":
        """The corpus in a folder; UserError where there is none, or not the one described."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path} {_what_is_wrong(path)}")
        meta = _read(path / "corpus.json")
        corpus = cls(
            path=path,
            languages=tuple(meta["languages"]),
            normalise=meta["normalise"],
            joint=meta["joint"],
            extra_symbols=tuple(meta["extra_symbols"]),
            spm=meta["spm"],
            splits=meta["splits"],
            split_sha256=meta["split_sha256"],
            opencc=meta.get("opencc"),
            one_way=bool(meta.get("one_way")),
        )
        corpus._check_files()
        return corpus

    def save(self) -> None:
        """Write corpus.json into the folder."""
        atomic_json(self.path / "corpus.json", self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of corpus.json."""
        return {
            "kind": KIND,
            "version": VERSION,
            "languages": list(self.languages),
            "normalise": self.normalise,
            "joint": self.joint,
            "extra_symbols": list(self.extra_symbols),
            "spm": self.spm,
            "splits": self.splits,
            "split_sha256": self.split_sha256,
            "opencc": self.opencc,
            "one_way": self.one_way,
        }

    @property
    def convention(self) -> str:
        """What :func:`text.normalise` is to be told: the convention with OpenCC's conversion."""
        return with_conversion(self.normalise, self.opencc)

    def codec(self, lang: str) -> Codec:
        """Text to ids and back for a language; one object where both languages have one model."""
        self._check_language(lang)
        digest = self.spm[lang]["sha256"]
        if digest not in self._codecs:
            name = self.path / self.spm[lang]["file"]
            self._codecs[digest] = Codec.from_file(name, self.extra_symbols)
        return self._codecs[digest]

    def dictionary_path(self, lang: str) -> Path:
        self._check_language(lang)
        return self.path / f"dict.{lang}.txt"

    def text(self, split: str, lang: str) -> Path:
        """The normalised lines of a split."""
        self._check_language(lang)
        self._check_split(split)
        return self.path / "text" / f"{split}.{lang}"

    def ids(self, split: str) -> Path:
        """The input line numbers (from 1) of a split, one a line."""
        self._check_split(split)
        return self.path / "text" / f"{split}.ids"

    def binarised(self, split: str, lang: str) -> Path:
        """Path of a split's ids without .bin and .idx."""
        self._check_language(lang)
        source, target = self.languages
        return self.path / f"{split}.{source}-{target}.{lang}"

    @cached_property
    def _codecs(self) -> dict[str, Codec]:
        return {}

    def _check_language(self, lang: str) -> None:
        if lang not in self.languages:
            raise UserError(f"{self.path} has no language {lang!r}: it has {self._pair()}")

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"{self.path} has no split {split!r}: it has {', '.join(self.splits) or 'none'}"
            )

    def _pair(self) -> str:
        return " and ".join(self.languages)

    def _check_files(self) -> None:
        for lang in self.languages:
            model = self.path / self.spm[lang]["file"]
            if not model.is_file() or sha256_file(model) != self.spm[lang]["sha256"]:
                raise UserError(
                    f"{model} is missing or is not the model that the data were made with: restore "
                    f"it, or {_REMEDY} again"
                )
            needed = [self.dictionary_path(lang)]
            for split in self.splits:
                stem = self.binarised(split, lang)
                needed += [stem.with_name(f"{stem.name}.{end}") for end in ("bin", "idx")]
            for file in needed:
                if not file.is_file():
                    raise UserError(f"{file} is missing: restore it, or {_REMEDY} again")


def _read(file: Path) -> dict[str, Any]:
    """corpus.json; UserError where it is absent, damaged, of another kind or version."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} {_what_is_wrong(file.parent)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): {_REMEDY} again") from error
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise UserError(f"{file.parent} holds another kind of data, no bitext: {_REMEDY} for it")
    if meta.get("version") != VERSION:
        raise UserError(
            f"{file} has version {meta.get('version')}, this program reads {VERSION}: {_REMEDY} again"
        )
    wrong = [key for key, kind in _FIELDS.items() if not isinstance(meta.get(key), kind)]
    if not wrong and not _models_named(meta):
        wrong = ["spm"]
    if wrong:
        raise UserError(f"{file} is damaged (no usable {', '.join(wrong)}): {_REMEDY} again")
    return meta


def _models_named(meta: dict[str, Any]) -> bool:
    languages, models = meta["languages"], meta["spm"]
    if len(set(map(str, languages))) != 2:
        return False
    entries = [models.get(lang) for lang in languages]
    return all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) and entry.get("sha256")
        for entry in entries
    )


def _what_is_wrong(path: Path) -> str:
    if partial_folder(path).is_dir():
        return "is being prepared, or its preparation was interrupted: run the same command again"
    if not path.exists():
        return f"does not exist: {_REMEDY} first"
    if not path.is_dir():
        return "is a file: give the folder that fairseq_ext.translation.prepare wrote"
    return f"is no prepared bitext (it has no corpus.json): {_REMEDY} first"
