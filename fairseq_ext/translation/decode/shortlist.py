"""Which pieces a source may become, learnt from a bitext, so that CTranslate2 looks at no others.

The product with the output embedding is half of a small decoder's work, and a batch of lines needs few of
its rows: for each source piece those that it was most often translated by, by IBM Model 1 (Brown et al.
1993, "The Mathematics of Statistical Machine Translation"), the piece itself, and those that are frequent.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ext_common.manifest import atomic_json, known_sha256, user_cache
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.decode.ctranslate_backend import DESCRIPTION, VERSION
from fairseq_ext.translation.decode.ctranslate_folder import converted_once, read_description
from fairseq_ext.translation.text.normalise import read_lines

MAP = "vmap.txt"  # as CTranslate2 looks for it
BEST, FREQUENT = 50, 100  # pieces for a source piece, and pieces for every line
PASSES = 5
# Lines that are read, drawn evenly, and (source, target) positions of which Model 1 learns at the most.
LINES, CELLS = 200_000, 20_000_000
Ids = np.ndarray[Any, np.dtype[np.int64]]
Pair = tuple[Ids, Ids]


def with_shortlist(folder: Path, bitext: str, vocabulary: Any, name: Callable[[int], str]) -> Path:
    """A converted model's folder with a map learnt from a prepared bitext, made now or before.

    vocabulary: encodes both languages, as `decode.checkpoint.Vocabulary`. name: a piece's name in the model.
    UserError where the bitext is not of the vocabulary's two languages.
    """
    corpus = Corpus.open(bitext)
    files = [
        corpus.text("train", lang) for lang in (vocabulary.source_lang, vocabulary.target_lang)
    ]
    whole = [known_sha256(folder / "model.bin"), *map(known_sha256, files), str((BEST, FREQUENT))]
    digest = hashlib.sha256(" ".join(whole).encode()).hexdigest()

    def write(new: Path) -> str:
        step = -(-corpus.splits["train"] // LINES)
        pairs = list(encoded(files, vocabulary, step))
        total = sum(len(source) * len(target) for source, target in pairs)
        pairs = pairs[:: -(-total // CELLS) or 1]
        lines = list(map_lines(pairs, name))
        (new / MAP).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for path in folder.iterdir():
            if path.name not in (DESCRIPTION, MAP):
                (new / path.name).symlink_to(path.absolute())
        sizes = {path.name: path.stat().st_size for path in new.iterdir() if path.is_file()}
        about = read_description(folder) if (folder / DESCRIPTION).exists() else {}
        about |= {"version": VERSION, "checkpoint_sha256": digest, "files": sizes}
        atomic_json(new / DESCRIPTION, about)
        return f"learnt from {len(pairs):,} of {corpus.splits['train']:,} pairs"

    called = f"{folder.name}-shortlist-{digest[:8]}"
    places = [folder.absolute().parent, user_cache("fairseq_ext")]
    return converted_once(places, called, digest, f"a shortlist of {bitext}", write)


def encoded(files: Sequence[Path], vocabulary: Any, step: int) -> Iterator[Pair]:
    """(source, target) ids of every `step`-th pair, both ending with `</s>`."""
    both = zip(*map(read_lines, files), strict=True)
    for source, target in islice(both, 0, None, step):
        ids = vocabulary.encode(vocabulary.clean(source)), vocabulary.encode_target(target)
        yield np.asarray(ids[0]), np.asarray(ids[1])


def map_lines(pairs: Sequence[Pair], name: Callable[[int], str]) -> Iterator[str]:
    """Lines of CTranslate2's map: a source piece, a tab, the target pieces; those of no piece are for all."""
    counts = np.bincount(np.concatenate([target for _, target in pairs]))
    usual = np.argsort(-counts, kind="stable")[:FREQUENT]
    yield "\t" + " ".join(name(int(piece)) for piece in usual if counts[piece])
    sources, targets, likely = lexical_probabilities(pairs)
    order = np.lexsort((targets, -likely, sources))
    sources, targets = sources[order], targets[order]
    starts = np.flatnonzero(np.diff(sources, prepend=-2))
    for start, end in zip(starts, [*starts[1:], len(sources)], strict=True):
        piece = int(sources[start])
        best = map(int, targets[start : min(end, start + BEST)])
        if piece >= 0:
            yield f"{name(piece)}\t{' '.join(map(name, dict.fromkeys([piece, *best])))}"


def lexical_probabilities(
    pairs: Sequence[Pair], passes: int = PASSES
) -> tuple[Ids, Ids, np.ndarray[Any, np.dtype[np.float64]]]:
    """(source piece, target piece, t(target | source)) of all that stand in one pair, by IBM Model 1.

    Every source has an empty word besides, -1. The probabilities of a source piece add up to 1.
    """
    size = 1 + max(int(ids.max(initial=0)) for pair in pairs for ids in pair)
    cells, lengths = [], []
    for source, target in pairs:
        rows = np.append(source, -1) + 1
        cells.append((rows[None, :] * size + target[:, None]).ravel())
        lengths.append(np.full(len(target), len(rows)))
    keys, cell = np.unique(np.concatenate(cells), return_inverse=True)
    row, column = keys // size, keys % size
    length = np.concatenate(lengths)
    begins = np.cumsum(length) - length
    likely = np.ones(len(keys))
    for _ in range(passes):
        share = likely[cell]
        share /= np.repeat(np.add.reduceat(share, begins), length)
        counts = np.bincount(cell, share, len(keys))
        likely = counts / np.bincount(row, counts)[row]
    return row - 1, column, likely
