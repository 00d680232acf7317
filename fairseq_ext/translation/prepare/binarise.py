"""Lines of text to fairseq's memory-mapped ids, in parallel, through a SentencePiece model.

The line is read, encoded and written by fairseq's own interfaces (Binarizer, its mmap builder and index).
Only its FileBinarizer is not used: it waits for all other processes before it starts its own part, so that
two processes take turns, and finds its parts by TextIOWrapper.tell(), which may be no byte position.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ext_common.cli import UserError, progress
from ext_common.compat.imports import heavy_modules_later
from ext_common.manifest import atomic_write
from ext_common.parallel import in_order
from fairseq_ext.translation.text.spm import EOS, SPECIALS, UNK, Codec

with heavy_modules_later():
    from fairseq.binarizer import Binarizer, BinarizeSummary
    from fairseq.data import Dictionary, indexed_dataset

PART_BYTES = 4 << 20


class SpmBinarizer(Binarizer):
    """A line to the int32 ids that its SentencePiece model gives it, `</s>` behind them.

    encode: what turns a line into ids of the model instead of `codec.encode`; picklable.
    """

    def __init__(self, codec: Codec, encode: Callable[[str], list[int]] | None = None):
        self.codec, self.encode = codec, encode

    def binarize_line(self, line: str, summary: BinarizeSummary) -> torch.IntTensor:
        ids = (self.encode or self.codec.encode)(line.removesuffix("\n"))
        if summary.replaced is None:
            summary.replaced = Counter()
        unknown = ids.count(UNK)
        if unknown:
            summary.replaced["<unk>"] += unknown
        ids.append(EOS)
        summary.num_seq += 1
        summary.num_tok += len(ids)
        return torch.IntTensor(ids)


def binarise(
    text: Path,
    codec: Codec,
    stem: Path,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    *,
    encode: Callable[[str], list[int]] | None = None,
) -> BinarizeSummary:
    """Write `stem`.bin and .idx (uint16 or uint32 ids of each line); the same for any `workers`.

    encode: as for :class:`SpmBinarizer`.
    Returns fairseq's summary: sentences, tokens with `</s>`, how often `<unk>` was written.
    Raises UserError where fewer or more sentences were written than there are lines.
    """
    binarizer = SpmBinarizer(codec, encode)
    kind = indexed_dataset.best_fitting_int_dtype(codec.size)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(data_file(stem), dtype=kind)
    total = BinarizeSummary()
    parts = line_parts(text, part_bytes)
    jobs = [
        (binarizer, text, start, end, f"{stem}.part{number}")
        for number, (start, end) in enumerate(parts)
    ]
    with progress(os.path.getsize(text), f"binarise {text.name}", "bytes") as bar:
        for job, summary in zip(
            jobs, in_order(_binarise_part, jobs, min(workers, len(jobs))), strict=True
        ):
            _append(builder, job[-1])
            total.merge(summary)
            for file in (data_file(job[-1]), index_file(job[-1])):
                os.remove(file)
            bar.update(job[3] - job[2])
    builder.finalize(index_file(stem))
    check_counts(text, stem)
    return total


def concatenate(stems: Sequence[Path], size: int, stem: Path) -> None:
    """Write `stem`.bin and .idx with the sentences of `stems` in a row; one may come repeatedly.

    size: of the vocabulary that all of them are ids of.
    """
    kind = indexed_dataset.best_fitting_int_dtype(size)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(data_file(stem), dtype=kind)
    for one in stems:
        _append(builder, one)
    builder.finalize(index_file(stem))


def check_counts(text: Path, stem: Path) -> None:
    """UserError where the ids under `stem` are not as many sentences as `text` has lines."""
    lines = count_lines(text)
    sentences = len(sentence_lengths(stem))
    if lines != sentences:
        raise UserError(
            f"{stem} has {sentences:,} sentences, {text} {lines:,} lines: please report this, nothing "
            "was kept"
        )


def write_dictionary(codec: Codec, path: Path) -> None:
    """fairseq's dictionary of the model's pieces, in the order of their ids.

    Raises UserError where fairseq would read another id for a piece than the model has.
    """
    pieces = codec.pieces(range(SPECIALS, codec.size))
    with atomic_write(path) as file:
        file.writelines(f"{piece} 1\n" for piece in pieces)
    check_dictionary(codec, path)


def check_dictionary(codec: Codec, path: Path) -> None:
    """UserError where the dictionary, as fairseq reads it, is not that of the model."""
    try:
        symbols = Dictionary.load(str(path)).symbols
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no dictionary that fairseq can read ({error})") from error
    # the four specials are fairseq's own names for the ids that Codec has checked
    pieces = codec.pieces(range(SPECIALS, codec.size))
    if symbols[SPECIALS:] != pieces:
        differing = next(
            (a for a, b in zip(pieces, symbols[SPECIALS:], strict=False) if a != b), "its length"
        )
        raise UserError(
            f"{path} does not give the ids of the SentencePiece model (first at {differing!r}): use "
            "the dictionary that was made with the model"
        )


def line_parts(path: Path, size: int) -> list[tuple[int, int]]:
    """(start, end) byte offsets of consecutive parts of whole lines, of about `size` bytes."""
    end_of_file = os.path.getsize(path)
    parts, start = [], 0
    with open(path, "rb") as file:
        while start < end_of_file:
            file.seek(min(start + size, end_of_file) - 1)
            file.readline()
            parts.append((start, file.tell()))
            start = file.tell()
    return parts


def read_part(path: Path, start: int, end: int) -> Iterator[str]:
    r"""The lines between two byte offsets; only "\n" ends one."""
    with open(path, "rb") as file:
        file.seek(start)
        while file.tell() < end:
            yield file.readline().decode("utf-8")


def count_lines(path: Path) -> int:
    count = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
    return count


def data_file(stem: Path | str) -> str:
    return indexed_dataset.data_file_path(str(stem))


def index_file(stem: Path | str) -> str:
    return indexed_dataset.index_file_path(str(stem))


def sentence_lengths(stem: Path | str) -> np.ndarray:
    """Number of ids of each sentence, `</s>` included, int32 (N,)."""
    index = indexed_dataset.MMapIndexedDataset.Index(index_file(stem))
    # a copy, made while the index that owns the memory map lives
    return index.sizes.copy()


def _append(builder: indexed_dataset.MMapIndexedDatasetBuilder, stem: Path | str) -> None:
    before = len(builder._sizes)
    builder.merge_file_(str(stem))
    # merge_file_ appends numpy's int32, in which the index's byte offsets would overflow
    builder._sizes[before:] = map(int, builder._sizes[before:])


def _binarise_part(job: tuple[Binarizer, Path, int, int, str]) -> BinarizeSummary:
    binarizer, text, start, end, stem = job
    kind = indexed_dataset.best_fitting_int_dtype(binarizer.codec.size)
    builder = indexed_dataset.MMapIndexedDatasetBuilder(data_file(stem), dtype=kind)
    summary = BinarizeSummary()
    for line in read_part(text, start, end):
        builder.add_item(binarizer.binarize_line(line, summary))
    builder.finalize(index_file(stem))
    return summary
