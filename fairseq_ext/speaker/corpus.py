"""A prepared folder as training and prediction read it, and how it is written.

features.bin      float32 log-mel frames of all utterances (ext_common.store)
features.json     their index
utterances.csv    id,speaker,split,group,offset,length: one utterance a line, in source order
corpus.json       speakers by label id, feature specification, mean and std, sizes, hashes
manifest.json     how it came about: inputs, options, what was left out and why
"""

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ext_common.cli import UserError, progress
from ext_common.manifest import atomic_json, atomic_write, sha256_file
from ext_common.store import JoinedRows, expect_rows, joined_rows, open_store, parts_of, store_paths
from fairseq_ext.speaker.features import FeatureSpec

FORMAT = 1
COLUMNS = ("id", "speaker", "split", "group", "offset", "length")
CHUNK_BYTES = 8 << 20
# 0.1 nat is 0.4 dB, less than the smallest difference of loudness that is heard; speech moves a band by
# 10 dB and more, so a band below this holds nothing (above the limit of a codec, say).
CONSTANT_STD = 0.1


@dataclass
class Corpus:
    """Utterances with speakers and splits; N utterances, C speakers.

    ids: N strings; labels: int64 (N,), index into `speakers`, -1 without a label; splits: str
    (N,); groups: N strings; offsets, lengths: int64 (N,) in frames; spec: FeatureSpec; mean, std:
    float32 (n_mels,); features: read-only memory map, float32 (total_frames, n_mels).
    """

    path: Path
    ids: list
    labels: np.ndarray
    splits: np.ndarray
    groups: list
    offsets: np.ndarray
    lengths: np.ndarray
    speakers: list
    spec: FeatureSpec
    mean: np.ndarray
    std: np.ndarray
    features: np.ndarray

    @classmethod
    def open(cls, path):
        """The corpus in the folder `path`, or of several as "A:B"; UserError for one that is not prepared."""
        if len(parts := parts_of(path)) > 1:
            return joined([cls.open(part) for part in parts], Path(path))
        path = Path(path)
        meta = described(path)
        store = open_store(path)
        table = path / "utterances.csv"
        if not table.exists() or sha256_file(table) != meta["utterances_sha256"]:
            raise UserError(f"{table} is missing or was changed: prepare it again with --overwrite")
        columns = read_table(table)
        index = {name: label for label, name in enumerate(meta["speakers"])}
        corpus = cls(
            path=path,
            ids=columns["id"],
            labels=np.array([index[s] if s else -1 for s in columns["speaker"]], dtype=np.int64),
            splits=np.array(columns["split"], dtype=str),
            groups=columns["group"],
            offsets=np.array(columns["offset"], dtype=np.int64),
            lengths=np.array(columns["length"], dtype=np.int64),
            speakers=meta["speakers"],
            spec=FeatureSpec.from_dict(meta["spec"]),
            mean=np.array(meta["mean"], dtype=np.float32),
            # folders of version 0.1 have 1e-5 for a band that is constant
            std=usable_std(np.array(meta["std"], dtype=np.float32)),
            features=store.data,
        )
        if len(store.data) != meta["frames"] or store.data.shape[1:] != (corpus.spec.n_mels,):
            raise UserError(
                f"{path / 'corpus.json'} belongs to other features: prepare again with --overwrite"
            )
        return corpus

    def __getstate__(self):
        # A pickled memory map is all it maps, and a spawned loading worker gets its dataset pickled.
        return {**self.__dict__, "features": None}

    def __setstate__(self, state):
        self.__dict__.update(state, features=joined_rows(parts_of(state["path"])))

    def __len__(self):
        return len(self.ids)

    def rows(self, split):
        """Row numbers of `split` in source order, int64; UserError where there are none."""
        rows = np.flatnonzero(self.splits == split)
        if not len(rows):
            there = ", ".join(dict.fromkeys(self.splits.tolist()))
            remedy = f": prepare it with --{split}-fraction" if split in ("valid", "test") else ""
            raise UserError(f"{self.path} has no split {split!r}; it has: {there}{remedy}")
        return rows

    def read(self, row, start=0, length=None):
        """Frames `start` to `start + length` (default: the end) of an utterance.

        Returns a writable copy, float32 (T, n_mels). Raises ValueError for frames it does not have.
        """
        available = int(self.lengths[row])
        length = available - start if length is None else length
        if start < 0 or length < 0 or start + length > available:
            raise ValueError(
                f"{self.ids[row]}: frames {start} to {start + length} of {available} do not exist"
            )
        first = int(self.offsets[row]) + start
        if isinstance(self.features, JoinedRows):
            return self.features[first : first + length].copy()
        # as a plain array: slicing a memmap object takes longer than copying a crop
        return np.asarray(self.features)[first : first + length].copy()

    def read_together(self, rows, starts, lengths):
        """What `read` gives of several places, int64 (N,) each: a list of N.

        The disk is told of all places before the first of them is waited for.
        """
        over = np.flatnonzero(
            (starts < 0) | (lengths < 0) | (starts + lengths > self.lengths[rows])
        )
        if len(over):
            n = over[0]
            # which says so
            self.read(int(rows[n]), int(starts[n]), int(lengths[n]))
        firsts = self.offsets[rows] + starts
        expect_rows(self.features, firsts, lengths)
        joined_parts = isinstance(self.features, JoinedRows)
        features = self.features if joined_parts else np.asarray(self.features)
        ends = (firsts + lengths).tolist()
        return [features[a:b].copy() for a, b in zip(firsts.tolist(), ends, strict=True)]


def joined(parts, path):
    """Several corpora as one: utterances one behind the other, speakers of one name are one.

    Mean and deviation are over the training frames of all. UserError where features differ.
    """
    spec = parts[0].spec
    for part in parts[1:]:
        if part.spec != spec:
            raise UserError(
                f"{part.path} has features {part.spec.to_dict()}, {parts[0].path} has {spec.to_dict()}:"
                " prepare them with the same options"
            )
    speakers = sorted({name for part in parts for name in part.speakers})
    number = {name: label for label, name in enumerate(speakers)}
    # label −1, of no known speaker, is the last
    maps = [np.array([*map(number.get, part.speakers), -1], dtype=np.int64) for part in parts]
    first = np.cumsum([0, *(len(part.features) for part in parts)])
    frames = [part.lengths[(part.splits == "train") & (part.labels >= 0)].sum() for part in parts]
    weights = np.array(frames, dtype=np.float64) / max(1, sum(frames))
    means = np.stack([part.mean.astype(np.float64) for part in parts])
    squares = np.stack([part.std.astype(np.float64) ** 2 for part in parts]) + means**2
    mean = weights @ means
    std = np.sqrt(np.maximum(weights @ squares - mean**2, 0))
    return Corpus(
        path=path,
        ids=[name for part in parts for name in part.ids],
        labels=np.concatenate([m[part.labels] for m, part in zip(maps, parts, strict=True)]),
        splits=np.concatenate([part.splits for part in parts]),
        groups=[group for part in parts for group in part.groups],
        offsets=np.concatenate([p.offsets + n for p, n in zip(parts, first, strict=False)]),
        lengths=np.concatenate([part.lengths for part in parts]),
        speakers=speakers,
        spec=spec,
        mean=mean.astype(np.float32),
        std=usable_std(std.astype(np.float32)),
        features=JoinedRows([part.features for part in parts]),
    )


def write_corpus(path, features_file, rows, speakers, spec, narrow=None):
    """Write utterances.csv and corpus.json for features that lie in `features_file` (raw
    float32).

    rows: list of (id, speaker or None, split, group or None, offset, length); narrow: how many of the
    recordings have less than their rate could hold (`bandwidth`). The features themselves are renamed
    into place by the caller, last.
    """
    path = Path(path)
    with atomic_write(path / "utterances.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((i, s or "", split, g or "", o, n) for i, s, split, g, o, n in rows)
    used = [row for row in rows if row[2] == "train" and row[1]]
    used = used or [row for row in rows if row[1]] or rows
    spans = [(row[4], row[5]) for row in used]
    mean, std, digest, frames = frame_statistics(features_file, spec.n_mels, spans)
    splits = {}
    for row in rows:
        splits[row[2]] = splits.get(row[2], 0) + 1
    atomic_json(
        path / "corpus.json",
        {
            "format": FORMAT,
            "utterances": len(rows),
            "frames": frames,
            **({} if narrow is None else {"narrow": narrow}),
            "splits": splits,
            "spec": spec.to_dict(),
            "speakers": speakers,
            "mean": mean,
            "std": std,
            "features_sha256": digest,
            "utterances_sha256": sha256_file(path / "utterances.csv"),
        },
    )


def frame_statistics(features_file, n_mels, spans):
    """Mean and std of each band over `spans` (offset, length in frames), in one pass over the
    file.

    Returns (mean float32 (n_mels,), population std float32 (n_mels,) as `usable_std` gives it,
    SHA-256 of the whole file, its frames). Sums are float64, over deviations from the first frame so
    that a large mean costs no digits.
    """
    row_bytes = 4 * n_mels
    frames = os.path.getsize(features_file) // row_bytes
    # +1 where a span starts and -1 behind it: the running sum tells how often a frame counts.
    places = np.array([(o, o + n) for o, n in spans], dtype=np.int64).reshape(-1, 2)
    edges = np.concatenate([places[:, 0], places[:, 1]])
    steps = np.repeat([1, -1], len(places))
    order = np.argsort(edges, kind="stable")
    edges, steps = edges[order], steps[order]
    chunk_frames = max(1, CHUNK_BYTES // row_bytes)
    digest = hashlib.sha256()
    total, squares, weight, depth, shift = np.zeros(n_mels), np.zeros(n_mels), 0, 0, None
    with open(features_file, "rb") as file:
        for first in progress(range(0, frames, chunk_frames), "statistics", "pieces"):
            data = file.read(chunk_frames * row_bytes)
            digest.update(data)
            chunk = np.frombuffer(data, dtype="<f4").reshape(-1, n_mels)
            inside = slice(*np.searchsorted(edges, [first, first + len(chunk)]))
            times = np.zeros(len(chunk), dtype=np.int64)
            np.add.at(times, edges[inside] - first, steps[inside])
            times = depth + np.cumsum(times)
            depth = int(times[-1])
            if not times.any():
                continue
            shift = chunk[0].astype(np.float64) if shift is None else shift
            deviation = chunk[times > 0] - shift
            counts = times[times > 0].astype(np.float64)
            total += counts @ deviation
            squares += counts @ np.square(deviation)
            weight += int(counts.sum())
    if not weight:
        zero = np.zeros(n_mels, dtype=np.float32)
        return zero, zero + 1, digest.hexdigest(), frames
    mean = total / weight
    std = np.sqrt(np.maximum(squares / weight - np.square(mean), 0.0))
    std = usable_std(std.astype(np.float32))
    return (mean + shift).astype(np.float32), std, digest.hexdigest(), frames


def usable_std(std):
    """What a band is divided by: its std, 1 where it hardly changes (below `CONSTANT_STD`).

    Divided by next to nothing, the little that augmentation or another microphone adds would be all
    that the network sees.
    """
    return np.where(std < CONSTANT_STD, np.float32(1), std)


def described(path: Path) -> dict:
    """corpus.json of a prepared folder; UserError where `path` is none, or not a whole one."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: run fairseq_ext.speaker.prepare first")
    part, final, _, journal = store_paths(path)
    if not final.exists() and (part.exists() or journal.exists()):
        raise UserError(
            f"{path} is still being prepared, or its preparation was interrupted: "
            "run the same prepare command again, it continues"
        )
    if not (path / "corpus.json").exists() or not final.exists():
        raise UserError(
            f"{path} is not a prepared folder (no corpus.json and features.bin): "
            "run fairseq_ext.speaker.prepare first"
        )
    return read_meta(path / "corpus.json")


def read_meta(path):
    """corpus.json; UserError where it is damaged or of another format."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        wanted = ("speakers", "spec", "mean", "std", "frames", "utterances_sha256")
        if meta["format"] == FORMAT and all(key in meta for key in wanted):
            return meta
        found = meta["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: prepare it again with --overwrite") from None
    raise UserError(f"{path} has format {found}, this version reads {FORMAT}: prepare it again")


def read_table(path: str | Path) -> dict[str, list[str]]:
    """utterances.csv by column."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        rows = list(reader)
    columns: list[tuple[str, ...]] = list(zip(*rows, strict=True)) if rows else [()] * len(COLUMNS)
    return {name: list(column) for name, column in zip(COLUMNS, columns, strict=True)}
