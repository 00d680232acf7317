"""Files that are translated in place: a column of a table, a field of JSON Lines, a PO catalogue.

A document gives its texts as lines, and takes as many translations to be written as what it was. In a
catalogue placeholders and markup stay what they are: where a translation of the whole text has lost one, what
stands between them is translated by itself, and what even so is not intact stays in the source language.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import regex

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation.text.tables import (
    delimiter_of,
    field_of,
    kind_of,
    named_columns,
    open_po,
    read_records,
    read_rows,
)

_PRINTF = r"%(?:\d+\$)?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|[Lqjzt])?[diouxXeEfFgGcrsaA%]"
# Without a name or a number of its own, the order of these is their meaning.
_ORDERED = regex.compile(_PRINTF.replace(r"(?:\d+\$)?", "", 1))
KEPT = regex.compile(
    rf"""
      https?://[^\s<>"'`]+
    | %\(\w+\)[-+#0]*\d*(?:\.\d+)?[diouxXeEfFgGcrsaA] | {_PRINTF}
    | \$\{{\w+\}} | \{{[^{{}}\s]*\}}
    | </?[A-Za-z][^<>]*> | &(?:\#\w+|\w+);
    | :[\w:+-]+:`[^`]*` | ``[^`]+`` | `[^`]+`_{{0,2}} | \|[^|\s](?:[^|]*[^|\s])?\|_?
    | \*\*[^*]+\*\* | \\.
    """,
    regex.VERBOSE,
)
"""Placeholders of C, Python and shell, tags, entities, roles and literals of reStructuredText, addresses."""


class Document(Protocol):
    """texts: lines to translate, in order."""

    texts: list[str]

    def render(self, translations: Sequence[str]) -> tuple[bytes, dict[str, int]]:
        """The file with as many translations as there are texts, and what became of its entries."""


def open_document(
    path: str | os.PathLike[str], column: str | None = None, field: str | None = None
) -> Document | None:
    """What to translate in a file; None for lines of text.

    column: number from 1, or name in the first row; field: name in JSON Lines; either FROM:TO to leave what
    is translated. UserError where it has none of the kind.
    """
    kind = kind_of(path)
    if column is not None and field is not None:
        raise UsageError("give --column for a table or --field for JSON Lines, not both")
    if field is not None:
        return Records(path, *_from_to(field))
    if column is not None:
        if kind in ("jsonl", "po", "tmx"):
            raise UsageError(f"--column is for tables, and {path} is .{kind}: leave it out")
        return Table(path, *_from_to(column))
    return Catalogue(path) if kind == "po" else None


def _from_to(name: str) -> tuple[str, str]:
    first, _, second = name.partition(":")
    return first, second or first


class Cells:
    """Texts that may have several lines each."""

    def __init__(self, cells: Sequence[str]) -> None:
        self._lines = [cell.split("\n") for cell in cells]
        self.texts = [line for lines in self._lines for line in lines]

    def joined(self, translations: Sequence[str]) -> list[str]:
        """The translation of each cell."""
        rest = iter(translations)
        return ["\n".join(next(rest) for _ in lines) for lines in self._lines]


class Table:
    """A column of a table with tabs, or a CSV."""

    def __init__(self, path: str | os.PathLike[str], source: str, target: str) -> None:
        self.rows, self.delimiter = list(read_rows(path)), delimiter_of(path)
        header = not source.isdigit()
        names = self.rows[0] if self.rows else []
        self.first = int(header)
        if header:
            self.source = named_columns(path, names, [source])[0]
            self.target = names.index(target) if target in names else len(names)
            if self.target == len(names):
                names.append(target)
        else:
            self.source, self.target = int(source) - 1, int(target) - 1
        if self.source < 0 or not any(len(row) > self.source for row in self.rows):
            raise UserError(f"{path} has no column {source}: columns are counted from 1")
        body = self.rows[self.first :]
        self.cells = Cells([row[self.source] if len(row) > self.source else "" for row in body])
        self.texts = self.cells.texts

    def render(self, translations: Sequence[str]) -> tuple[bytes, dict[str, int]]:
        rows = self.rows[self.first :]
        for row, text in zip(rows, self.cells.joined(translations), strict=True):
            row += [""] * (self.target + 1 - len(row))
            row[self.target] = text
        file = io.StringIO()
        if self.delimiter is None:
            file.writelines("\t".join(row) + "\n" for row in self.rows)
        else:
            csv.writer(file, delimiter=self.delimiter, lineterminator="\n").writerows(self.rows)
        return file.getvalue().encode(), {"cells": len(rows)}


class Records:
    """A field of JSON Lines."""

    def __init__(self, path: str | os.PathLike[str], source: str, target: str) -> None:
        self.records = list(read_records(path))
        self.source, self.target = source, target
        texts = [field_of(r, source, f"{path}, record {n}") for n, r in enumerate(self.records, 1)]
        self.cells = Cells(texts)
        self.texts = self.cells.texts

    def render(self, translations: Sequence[str]) -> tuple[bytes, dict[str, int]]:
        rows = []
        for record, text in zip(self.records, self.cells.joined(translations), strict=True):
            new: dict[str, Any] = {self.target: text}
            if self.source not in record:
                new = {"translation": {**record["translation"], **new}}
            rows.append(json.dumps({**record, **new}, ensure_ascii=False))
        return "".join(row + "\n" for row in rows).encode(), {"records": len(rows)}


class Catalogue:
    """The entries of a PO catalogue that are not translated, or fuzzy."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.catalogue = open_po(path)
        live = [entry for entry in self.catalogue if not entry.obsolete]
        self.entries = [entry for entry in live if not entry.translated()]
        self.there = len(live) - len(self.entries)
        self.texts: list[str] = []
        # of each text of each entry
        self._messages = [list(map(self._message, _texts_of(entry))) for entry in self.entries]

    def _message(self, text: str) -> "list[Line]":
        lines = []
        for line in text.split("\n"):
            pieces = _pieces(line)
            places = [len(self.texts)]
            self.texts.append(line)
            if len(pieces) > 1:
                # the text between what is kept, in case the whole loses some of it
                for piece in pieces[::2]:
                    places.append(len(self.texts))
                    self.texts.append(piece.strip())
            lines.append(Line(line, pieces, places))
        return lines

    def render(self, translations: Sequence[str]) -> tuple[bytes, dict[str, int]]:
        counts: Counter[str] = Counter(entries=len(self.entries), there_before=self.there)
        forms = _forms(self.catalogue.metadata.get("Plural-Forms", ""))
        for entry, messages in zip(self.entries, self._messages, strict=True):
            made = [[line.translated(translations) for line in message] for message in messages]
            ways = [way for message in made for _, way in message]
            way = max(ways, key=WAYS.index)
            counts[way] += 1
            texts = _texts_of(entry)
            if way != LOST:
                texts = ["\n".join(text for text, _ in message) for message in made]
            if entry.msgid_plural:
                singular, plural = texts
                rest = {n: plural for n in range(1, forms)}
                entry.msgstr_plural = {0: plural if forms == 1 else singular, **rest}
            else:
                entry.msgstr = texts[0]
            entry.flags = [flag for flag in entry.flags if flag != "fuzzy"]
        return str(self.catalogue).encode(), dict(counts)


WHOLE, PIECES, LOST = WAYS = ("whole", "in_pieces", "left_as_source")
"""How an entry was translated: as it is, by what stands between placeholders, or not at all."""


class Line:
    """A line of a message: its pieces (text and what is kept, in turn), and where their translations are."""

    def __init__(self, text: str, pieces: list[str], places: list[int]) -> None:
        self.text, self.pieces, self.places = text, pieces, places

    def translated(self, translations: Sequence[str]) -> tuple[str, str]:
        """(translation with everything intact, how it came about)."""
        whole, *between = (translations[place] for place in self.places)
        # the white space around a message is part of it
        whole = _spaced(whole, self.text)
        if is_intact(self.text, whole):
            return whole, WHOLE
        if between:
            pieces = list(self.pieces)
            pieces[::2] = [_spaced(new, old) for new, old in zip(between, pieces[::2], strict=True)]
            glued = _spaced("".join(pieces), self.text)
            if is_intact(self.text, glued):
                return glued, PIECES
        return self.text, LOST


def is_intact(source: str, translation: str) -> bool:
    """Whether a translation has the placeholders and the markup of the source, each as often."""
    found = [KEPT.findall(text) for text in (source, translation)]
    ordered = [[one for one in kept if _ORDERED.fullmatch(one)] for kept in found]
    empty = bool(source.strip()) and not translation.strip()
    return not empty and Counter(found[0]) == Counter(found[1]) and ordered[0] == ordered[1]


def _pieces(text: str) -> list[str]:
    pieces, place = [], 0
    for found in KEPT.finditer(text):
        pieces += [text[place : found.start()], found[0]]
        place = found.end()
    return [*pieces, text[place:]]


def _spaced(new: str, old: str) -> str:
    """A translation with the white space around what it is the translation of."""
    if not any(map(str.isalpha, old)):
        return old
    return old[: len(old) - len(old.lstrip())] + new.strip() + old[len(old.rstrip()) :]


def _texts_of(entry: Any) -> list[str]:
    return [entry.msgid, entry.msgid_plural] if entry.msgid_plural else [entry.msgid]


def _forms(rule: str) -> int:
    found = regex.search(r"nplurals\s*=\s*(\d+)", rule)
    return int(found[1]) if found else 2
