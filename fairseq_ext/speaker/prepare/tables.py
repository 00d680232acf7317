"""Reading the tables and trees that layouts are made of; errors name the line."""

import codecs
import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from ext_common.cli import UserError

# what libsndfile reads
AUDIO_ENDINGS = (
    *(".wav", ".flac", ".ogg", ".mp3", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".au", ".snd"),
    *(".caf", ".w64", ".rf64", ".voc", ".nist", ".sph"),
)
# what it does not, though sound may be in it
OTHER_AUDIO = (
    *(".m4a", ".aac", ".mp4", ".wma", ".amr", ".3gp", ".webm", ".mkv", ".mka", ".mov", ".avi"),
    *(".ac3", ".ape", ".wv", ".mp2", ".dsf", ".spx", ".tta", ".m4b"),
)
DELIMITERS = (",", ";", "\t")
# letters and signs of Windows-1252 that are likely; what an UTF-16 file or a picture begins with is not
WESTERN = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüŠšŽžŒœ‘’“”–—…€°")
SPLIT_WORDS = {
    **{
        "train": "train",
        "training": "train",
        "valid": "valid",
        "validation": "valid",
        "val": "valid",
    },
    **{"dev": "valid", "development": "valid", "test": "test", "testing": "test"},
}
Table = dict[str, tuple[int, tuple[str, ...]]]


def audio_files(source: Path) -> list[str]:
    """Relative paths (with /) of the audio files below `source`, sorted, without hidden ones."""
    return [name for name in files_below(source) if name.lower().endswith(AUDIO_ENDINGS)]


def files_below(source: Path) -> list[str]:
    """Relative paths (with /) of all files below `source`, sorted, without hidden ones."""
    files: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = Path(folder).relative_to(source)
        files += [(prefix / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def passed_over(files: Sequence[str]) -> str | None:
    """A sentence on the files that are not read, by ending, with the remedy for audio; None for none."""
    others = [name for name in files if not name.lower().endswith(AUDIO_ENDINGS)]
    if not others:
        return None
    endings = Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in others)
    text = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    audio = [name for name in others if name.lower().endswith(OTHER_AUDIO)]
    remedy = f": convert audio first (ffmpeg -i {Path(audio[0]).name} NEW.flac)" if audio else ""
    return f"{len(others)} files are no audio that is read and were passed over: {text}{remedy}"


def csv_rows(
    table: Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: stripped text}) of each row; absent optional columns are empty.

    Also as Excel writes it: with semicolons or tabs, UTF-16 or Windows-1252, other capitals in the names of
    the columns, and rows without text, which are passed over.
    """
    text = table_text(table)
    try:
        delimiter = delimiter_of(text.partition("\n")[0], required)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        known = {*required, *optional}
        columns = [name if name in known else name.lower() for name in header]
        missing = [name for name in required if name not in columns]
        if missing:
            raise UserError(
                f"{table} line 1: no column {missing[0]!r}; needed: {', '.join(required)}; "
                f"optional: {', '.join(optional)}; found: {', '.join(header) or 'nothing'}"
            )
        twice = [name for name in known if columns.count(name) > 1]
        if twice:
            raise UserError(f"{table} line 1: the column {twice[0]!r} is there twice")
        for fields in reader:
            if not any(text.strip() for text in fields):
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{table} line {reader.line_num}: {len(fields)} fields, the header has "
                    f"{len(header)}: put quotes around a field with a comma"
                )
            row = dict(zip(columns, (text.strip() for text in fields), strict=True))
            yield reader.line_num, {name: row.get(name, "") for name in (*required, *optional)}
    except csv.Error as error:
        raise UserError(f"{table}: cannot be read as a UTF-8 CSV file ({error})") from None


def table_text(table: Path) -> str:
    """The text of a table: UTF-8, UTF-16 where it says so, Windows-1252 where its letters are Western.

    UserError for any other.
    """
    try:
        content = table.read_bytes()
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({cause(error)})") from None
    try:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = content.decode("cp1252", errors="replace")
        if all(letter.isascii() or letter in WESTERN for letter in text):
            return text
        raise UserError(
            f"{table}: cannot be read as a UTF-8 CSV file ({cause(error)}): save it as UTF-8"
        ) from None


def delimiter_of(header: str, required: Sequence[str]) -> str:
    """What divides the columns: the first of comma, semicolon and tab that gives those that are needed."""
    for delimiter in DELIMITERS:
        names = {name.strip().strip('"').lower() for name in header.split(delimiter)}
        if names.issuperset(required):
            return delimiter
    return DELIMITERS[0]


def split_names(splits: Iterable[str]) -> dict[str, str]:
    """{name in a table: split}: Train, VALID, dev are train, valid, valid; unless two names would be one."""
    names = sorted(set(splits))
    found = {name: SPLIT_WORDS.get(name.lower(), name) for name in names}
    clear = Counter(found.values())
    return {name: split if clear[split] == 1 else name for name, split in found.items()}


def existing(source: Path, path: str) -> str:
    """`path` as its file is called below `source`: / for backslashes, letters composed or not.

    As it was, where there is no such file.
    """
    for slashes in (path, path.replace("\\", "/")):
        for name in (slashes, normalize("NFC", slashes), normalize("NFD", slashes)):
            if (source / name).is_file():
                return name
    return path


def kaldi_table(path: Path, columns: int, last_has_spaces: bool = False) -> Table:
    """{key: (line number, other columns)} of a Kaldi text table."""
    table: Table = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({cause(error)})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.split(None, columns - 1) if last_has_spaces else line.split()
        if len(parts) != columns:
            raise UserError(f"{path} line {number}: {len(parts)} columns, expected {columns}")
        if parts[0] in table:
            raise UserError(f"{path} line {number}: {parts[0]} is there twice")
        table[parts[0]] = (number, tuple(part.strip() for part in parts[1:]))
    return table


def json_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has `keys`; UserError otherwise."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({cause(error)})") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path}: no key {key!r}: is this the course's data?")
    return dict(content)


def seconds(text: str, name: str, where: str, negative: bool = False) -> float | None:
    """A time in seconds, None for an empty text; UserError where it is no such number."""
    if not text:
        return None
    try:
        # 3,5 is Excel's 3.5 in half of the world
        value = float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (value < 0 and not negative):
        raise UserError(f"{where}: {name} is {text!r}, expected seconds from 0")
    return value


def check_cut(start: float | None, end: float | None, where: str) -> None:
    """UserError unless a cut starts before it ends."""
    if (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise UserError(f"{where}: start {start or 0} is not before end {end}")


def cause(error: Exception) -> str:
    """What went wrong, without the path that the sentence has already named."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
