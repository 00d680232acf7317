"""The layouts that recordings come in, each a function from a folder to a list of records.

A layout opens tables and lists files; it decodes nothing. What is wrong with a table as a whole (a
missing column, a line that cannot be read) is a UserError naming the line; what is wrong with one
record is reported and left out. Someone's own layout is one decorated function:

    @LAYOUTS.register("mine")
    def read_mine(source, options):
        '''One sentence for --help.'''
        return Source(records=[Record("a.wav", source / "a.wav", speaker="alice")])
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ext_common.cli import UsageError, UserError
from ext_common.registry import Registry
from fairseq_ext.speaker.prepare.tables import (
    AUDIO_ENDINGS,
    check_cut,
    csv_rows,
    existing,
    files_below,
    json_object,
    kaldi_table,
    passed_over,
    seconds,
    split_names,
)

LAYOUTS = Registry("layout")
SPLIT_GROUPS = ("train", "valid", "test")


class Record(NamedTuple):
    """One utterance as the source describes it.

    record_id: path as the source has it, `path#start-end` for a cut; path: the file; start, end:
    seconds; frames: the length the source promises (features only); where: place in the source, for
    messages; recording: path of the file as the source has it, where the id is another.
    """

    record_id: str
    path: Path
    speaker: str | None = None
    split: str | None = None
    start: float | None = None
    end: float | None = None
    group: str | None = None
    frames: int | None = None
    where: str | None = None
    recording: str | None = None


class Bad(NamedTuple):
    """A record that cannot be used: `reason` is what they are counted by."""

    path: str
    reason: str
    detail: str


@dataclass
class Source:
    """What a layout found. `n_mels` is set where the files hold features, not audio."""

    records: list[Record]
    bad: list[Bad] = field(default_factory=list)
    speakers: list[str] | None = None
    n_mels: int | None = None
    inputs: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@LAYOUTS.register("folder")
def read_folder(source: Path, options: Any) -> Source:
    """SRC/<speaker>/**/*.{wav,flac,ogg,opus,mp3,aiff,caf …}, or any tree with --pattern."""
    pattern = compile_pattern(options.pattern) if options.pattern else None
    found = Source([])
    files = files_below(source)
    others = passed_over(files)
    if others:
        found.warnings.append(others)
    for relative in files:
        if not relative.lower().endswith(AUDIO_ENDINGS):
            continue
        try:
            relative.encode()
        except UnicodeEncodeError:
            name = relative.encode(errors="backslashreplace").decode()
            found.bad.append(Bad(name, "file name", "the name is not UTF-8: rename the file"))
            continue
        if pattern is None:
            speaker, slash, _ = relative.partition("/")
            if not slash:
                detail = f"lies directly in {source}: expected SPEAKER/FILE, or give a --pattern"
                found.bad.append(Bad(relative, "no speaker", detail))
                continue
            found.records.append(Record(relative, source / relative, speaker))
            continue
        match = pattern.fullmatch(relative)
        if not match:
            found.bad.append(Bad(relative, "no match", "does not match --pattern"))
            continue
        names = match.groupdict()
        split = names.get("split") or next((s for s in SPLIT_GROUPS if names.get(s)), None)
        known, group = names["speaker"] or None, names.get("group")
        found.records.append(Record(relative, source / relative, known, split, group=group))
    if not found.records and not found.bad:
        raise UserError(
            f"{source} holds no audio: expected {source}/SPEAKER/*.wav, .flac, .ogg, .mp3 …"
            + (f"; {others}" if others else "")
        )
    return found


@LAYOUTS.register("csv")
def read_csv(source: Path, options: Any) -> Source:
    """A table (--csv) with the columns path, speaker and optional split, start, end, group."""
    table = Path(options.csv) if options.csv else source / "metadata.csv"
    if not table.is_file():
        raise UserError(f"{table}: no such file: name the table with --csv")
    found = Source([], inputs=[table])
    rows = list(csv_rows(table, ("path", "speaker"), ("split", "start", "end", "group")))
    splits = split_names(row["split"] for _, row in rows)
    for line, row in rows:
        where = f"{table} line {line}"
        path = existing(source, row["path"])
        if not path:
            raise UserError(f"{where}: the path is empty")
        start, end = (seconds(row[name], name, where) for name in ("start", "end"))
        if start is not None or end is not None:
            check_cut(start, end, where)
            name = f"{path}#{row['start'] or 0}-{row['end'] or ''}"
        else:
            name = path
        found.records.append(
            Record(
                name,
                source / path,
                row["speaker"] or None,
                splits[row["split"]] or None,
                start,
                end,
                row["group"] or None,
                where=where,
            )
        )
    if not found.records:
        raise UserError(f"{table} has no rows: expected one utterance a line")
    return found


@LAYOUTS.register("kaldi")
def read_kaldi(source: Path, options: Any) -> Source:
    """A Kaldi data folder: wav.scp, utt2spk and optional segments."""
    files = [source / name for name in ("wav.scp", "utt2spk", "segments")]
    wavs = kaldi_table(files[0], 2, last_has_spaces=True)
    for key, (line, (value,)) in wavs.items():
        if value.endswith("|"):
            raise UserError(
                f"{files[0]} line {line}: {key} is the command `{value}`, which is never run: "
                "write its output to a file and name that file"
            )
    speakers = kaldi_table(files[1], 2)
    has_segments = files[2].exists()
    found = Source([], inputs=files[:2] + ([files[2]] if has_segments else []))
    cuts = kaldi_table(files[2], 4) if has_segments else {}
    rows = (
        cuts.items() if has_segments else [(key, (line, (key,))) for key, (line, _) in wavs.items()]
    )
    for utterance, (line, (recording, *times)) in rows:
        where = f"{files[2] if has_segments else files[0]} line {line}"
        if recording not in wavs:
            raise UserError(f"{where}: the recording {recording} is not in {files[0]}")
        path = existing(source, wavs[recording][1][0])
        start = end = None
        if times:
            start, end = (seconds(text, "time", where, negative=True) for text in times)
            # Kaldi writes -1 for "to the end".
            end = None if (end or 0) < 0 else end
            check_cut(start, end, where)
        if utterance not in speakers:
            found.bad.append(Bad(utterance, "no speaker", f"{utterance} is not in {files[1]}"))
            continue
        speaker = speakers[utterance][1][0]
        found.records.append(
            Record(utterance, source / path, speaker, None, start, end, None, None, where, path)
        )
    if not found.records and not found.bad:
        raise UserError(f"{files[0]} has no lines: expected `UTTERANCE PATH`")
    return found


@LAYOUTS.register("hw4")
def read_hw4(source: Path, options: Any) -> Source:
    """The course's data: mapping.json, metadata.json, testdata.json and uttr-*.pt features."""
    mapping = json_object(source / "mapping.json", ("speaker2id", "id2speaker"))
    metadata = json_object(source / "metadata.json", ("n_mels", "speakers"))
    speakers = check_mapping(mapping, source / "mapping.json")
    n_mels = metadata["n_mels"]
    if not isinstance(n_mels, int) or isinstance(n_mels, bool) or n_mels < 1:
        raise UserError(
            f"{source / 'metadata.json'}: n_mels is {n_mels!r}, expected a whole number"
        )
    if not isinstance(metadata["speakers"], dict):
        raise UserError(f"{source / 'metadata.json'}: speakers is not an object of lists")
    found = Source([], speakers=speakers, n_mels=n_mels)
    found.inputs = [source / "mapping.json", source / "metadata.json"]
    known = set(speakers)
    for speaker, utterances in metadata["speakers"].items():
        if not isinstance(utterances, list):
            raise UserError(f"{source / 'metadata.json'}: speaker {speaker} is not a list")
        place = f"metadata.json speaker {speaker}"
        records, bad = hw4_records(source, place, utterances, speaker, None)
        if speaker not in known:
            detail = f"{place} is not in mapping.json"
            bad += [Bad(record.record_id, "unknown speaker", detail) for record in records]
            records = []
        found.records += records
        found.bad += bad
    missing = [name for name in speakers if name not in metadata["speakers"]]
    if missing:
        found.warnings.append(
            f"{len(missing)} speakers of mapping.json have no utterance in metadata.json, "
            f"e.g. {missing[0]}"
        )
    test = source / "testdata.json"
    if test.exists():
        content = json_object(test, ("n_mels", "utterances"))
        if content["n_mels"] != n_mels:
            raise UserError(f"{test}: n_mels is {content['n_mels']!r}, metadata.json says {n_mels}")
        if not isinstance(content["utterances"], list):
            raise UserError(f"{test}: utterances is not a list")
        records, bad = hw4_records(source, "testdata.json", content["utterances"], None, "test")
        found.records += records
        found.bad += bad
        found.inputs.append(test)
    if not found.records and not found.bad:
        raise UserError(f"{source / 'metadata.json'} names no utterances")
    return found


def hw4_records(
    source: Path, place: str, utterances: list[Any], speaker: str | None, split: str | None
) -> tuple[list[Record], list[Bad]]:
    """(records, bad) of one list of {"feature_path": ..., "mel_len": ...}."""
    records: list[Record] = []
    bad: list[Bad] = []
    for number, entry in enumerate(utterances):
        where = f"{place} utterance {number}"
        keys = entry if isinstance(entry, dict) else {}
        absent = [key for key in ("feature_path", "mel_len") if key not in keys]
        path = keys.get("feature_path")
        if absent or not isinstance(path, str) or not isinstance(keys["mel_len"], int):
            detail = (
                f"no key {absent[0]!r}" if absent else "feature_path or mel_len has a wrong type"
            )
            bad.append(
                Bad(path if isinstance(path, str) else where, "json key", f"{where}: {detail}")
            )
            continue
        record = Record(path, source / path, speaker, split, frames=keys["mel_len"], where=where)
        records.append(record)
    return records, bad


def check_mapping(mapping: dict[str, Any], path: Path) -> list[str]:
    """The speakers by label id; UserError unless speaker2id is a numbering from 0 that id2speaker
    reverses.
    """
    forward, backward = mapping["speaker2id"], mapping["id2speaker"]
    if not isinstance(forward, dict) or not isinstance(backward, dict) or not forward:
        raise UserError(f"{path}: speaker2id and id2speaker must be objects that are not empty")
    speakers: list[Any] = [None] * len(forward)
    for name, label in forward.items():
        valid = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(forward)
        if not valid or speakers[label] is not None:
            raise UserError(
                f"{path}: speaker2id gives {name} the id {label!r}, expected the numbers 0 to "
                f"{len(forward) - 1}, each once"
            )
        speakers[label] = name
    for label, name in enumerate(speakers):
        if backward.get(str(label)) != name:
            raise UserError(
                f"{path}: id2speaker has {backward.get(str(label))!r} for {label}, "
                f"speaker2id says {name}"
            )
    if len(backward) != len(forward):
        raise UserError(
            f"{path}: id2speaker has {len(backward)} speakers, speaker2id {len(forward)}"
        )
    return speakers


def compile_pattern(text: str) -> re.Pattern[str]:
    """--pattern compiled; UsageError where it is no expression or has no `speaker` group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"--pattern is not a regular expression: {error}") from None
    if "speaker" not in pattern.groupindex:
        raise UsageError("--pattern has no group named speaker: write (?P<speaker>...) around it")
    return pattern
