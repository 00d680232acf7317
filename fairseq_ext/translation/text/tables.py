"""Pairs and texts in what other programs write: CSV and quoted TSV, JSON Lines, TMX, PO.

By the ending of the file, before .gz or .zst: .csv, .tsv and .txt, .jsonl, .tmx, .po. Everything is read into
records, which are counted from 1 (a row that spans lines is one record).
"""

import csv
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from fairseq_ext.translation.text.files import blocks
from fairseq_ext.translation.text.languages import language
from fairseq_ext.translation.text.normalise import read_lines
from fairseq_ext.translation.text.normalise import read_pairs as read_parallel

Pair = tuple[str, str]
RECORDS = ("jsonl", "ndjson", "tmx", "po")
"""Endings of files that have no columns."""
# Rows that are looked at to see how a table is written.
_SEEN = 2000
_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
# polib drops a text whose quotes are not closed, or its last letter, without a word.
_PO_LINE = re.compile(r'(?:msg\w+(?:\[\d+\])?\s*)?"(?:[^"\\]|\\.)*"')
_CELL = re.compile(r'(?:"(?:[^"]|"")*"|[^"\t\n]*)(?=[\t\n]|\Z)')
csv.field_size_limit(1 << 24)


def kind_of(path: str | os.PathLike[str]) -> str:
    """The ending that says what a file is, without .gz and .zst: "tsv", "po"; "" for none."""
    name = Path(path).name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return Path(name).suffix.lstrip(".")


def read_rows(path: str | os.PathLike[str]) -> Iterator[list[str]]:
    """The rows of a table with tabs, or a CSV, as cells; how it is written, :func:`delimiter_of` says.

    UserError where quotes are not closed, or not where a cell begins and ends.
    """
    delimiter = delimiter_of(path)
    if delimiter is None:
        return (line.split("\t") for line in read_lines(path))
    return _quoted_rows(path, delimiter)


def _quoted_rows(path: str | os.PathLike[str], delimiter: str) -> Iterator[list[str]]:
    # with the newlines that read_lines takes off: a cell may have some
    lines = (line + "\n" for line in read_lines(path))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    first = 1
    try:
        for row in rows:
            yield row
            first = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, the row of line {first} is not quoted as a table is ({error}): close its quotes, and"
            " double those inside a cell"
        ) from error


def delimiter_of(path: str | os.PathLike[str]) -> str | None:
    """What separates the cells of a table that quotes some; None for one with tabs in which quotes are text.

    In a table with tabs, quotes are text unless all cells that begin with one are written as a spreadsheet
    writes them, which is said on stderr. A CSV is separated by , or ; or a tab, by its first lines.
    """
    if kind_of(path) == "csv":
        head = list(itertools.islice(read_lines(path), 20))
        try:
            return csv.Sniffer().sniff("\n".join(head), ",;\t").delimiter
        except csv.Error:
            return ","
    if is_quoted(itertools.islice(read_lines(path), _SEEN)):
        print(f"note: the cells of {path} are quoted as by a spreadsheet: read so", file=sys.stderr)
        return "\t"
    return None


def is_quoted(lines: Iterable[str]) -> bool:
    """Whether lines with tabs are quoted as a spreadsheet does it.

    It quotes every cell with a quotation mark, doubles those inside, and lets such a cell go over lines. A
    cell "Yes." is text, as it would be \"\"\"Yes.\"\"\".
    """
    text, place, sure = "\n".join(lines), 0, False
    while place <= len(text):
        cell = _CELL.match(text, place)
        if cell is None:
            return False
        sure = sure or (cell[0].startswith('"') and ('""' in cell[0][1:-1] or "\n" in cell[0]))
        place = cell.end() + 1
    return sure


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON Lines; UserError for a line that is none."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is no JSON ({error}): give one object a line"
            ) from error
        if not isinstance(found, dict):
            raise UserError(f"{path}, line {number} is no object of JSON: give one a line")
        yield found


def field_of(record: dict[str, Any], name: str, where: str) -> str:
    """The text under a name, or in its "translation"; UserError where there is none."""
    inner = record.get("translation")
    for one in (record, inner if isinstance(inner, dict) else {}):
        if isinstance(one.get(name), str):
            return str(one[name])
    raise UserError(
        f"{where} has no text {name!r} (it has {', '.join(map(str, record))}): give --fields"
    )


def read_tmx(path: str | os.PathLike[str], languages: Sequence[str]) -> Iterator[Pair]:
    """The translation units of a TMX file that have both languages; the others are ("", "")."""
    from xml.etree import ElementTree

    wanted = [language(lang) for lang in languages]
    try:
        for _, unit in ElementTree.iterparse(io.BufferedReader(_Stream(blocks(path)))):
            if unit.tag.rpartition("}")[2] != "tu":
                continue
            texts = {}
            for variant in unit.iter():
                lang = variant.get(_XML_LANG) or variant.get("lang")
                segment = variant.find("{*}seg") if lang else None
                if lang and segment is not None:
                    texts[language(lang)] = " ".join("".join(segment.itertext()).split())
            yield texts.get(wanted[0], ""), texts.get(wanted[1], "")
            unit.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is no whole TMX file ({error}): export it again") from error


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest = parts, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._parts, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def read_po(path: str | os.PathLike[str]) -> Iterator[Pair]:
    """The translated entries of a PO catalogue, (msgid, msgstr); fuzzy and obsolete ones are ("", "")."""
    for entry in open_po(path):
        good = entry.translated() and not entry.obsolete
        yield (entry.msgid, entry.msgstr) if good else ("", "")


def open_po(path: str | os.PathLike[str]) -> Any:
    """The catalogue, as polib has it; UserError where it is none."""
    try:
        import polib
    except ImportError as error:
        raise UserError(
            f"{path} needs the package polib: install it with pip install 'fairseq-ext[po]'"
        ) from error
    lines = list(read_lines(path))
    if not any(line.startswith("msgid") for line in lines):
        raise UserError(f"{path} is no PO catalogue (it has no msgid): give one")
    for number, line in enumerate(lines, 1):
        text = line.removeprefix("#~").strip()
        if text.startswith(("msg", '"')) and not _PO_LINE.fullmatch(text):
            raise UserError(
                f"{path}, line {number} has no text in quotes that are closed: mend it with msgfmt -c"
            )
    try:
        return polib.pofile("\n".join(lines), wrapwidth=78)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no whole PO catalogue ({error}): mend it with msgfmt -c"
        ) from error


@dataclass(frozen=True)
class Layout:
    """Where source and target are in a file: columns from 1, or fields by name; and their languages."""

    columns: Sequence[int]
    languages: Sequence[str]
    fields: Sequence[str] | None = None


def read_pairs(
    inputs: Sequence[str | os.PathLike[str]], layout: Layout
) -> Iterator[tuple[int, str, str]]:
    """(number of the record from 1, source, target), raw, of one file or two parallel ones.

    A cell that is not there is "". UserError for what cannot be read.
    """
    if len(inputs) == 2:
        yield from read_parallel(inputs)
        return
    for number, pair in enumerate(_pairs_of(inputs[0], layout), 1):
        yield number, *pair


def _pairs_of(path: str | os.PathLike[str], layout: Layout) -> Iterator[Pair]:
    kind = kind_of(path)
    if kind == "tmx":
        yield from read_tmx(path, layout.languages)
    elif kind == "po":
        yield from read_po(path)
    elif kind in ("jsonl", "ndjson"):
        names = layout.fields or layout.languages
        for number, record in enumerate(read_records(path), 1):
            source, target = (field_of(record, n, f"{path}, record {number}") for n in names)
            yield source, target
    else:
        rows = read_rows(path)
        places = [column - 1 for column in layout.columns]
        if layout.fields:
            places = named_columns(path, next(rows, []), layout.fields)
        for row in rows:
            source, target = (row[place] if place < len(row) else "" for place in places)
            yield source, target


def named_columns(
    path: str | os.PathLike[str], header: Sequence[str], names: Sequence[str]
) -> list[int]:
    """Places (from 0) of the columns that a table's first row calls so; UserError where it has none."""
    heads = [cell.strip() for cell in header]
    for name in names:
        if name not in heads:
            raise UserError(f"{path} has no column {name!r}: its first row has {', '.join(heads)}")
    return [heads.index(name) for name in names]
