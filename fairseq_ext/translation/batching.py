"""Batches of sentence pairs in which every sentence has its place."""

from typing import Any

import numpy as np
from fairseq.data import data_utils

from ext_common.cli import UserError


def batches(
    dataset,
    indices: np.ndarray,
    max_tokens: int | None,
    max_sentences: int | None,
    multiple: int = 1,
) -> list[np.ndarray]:
    """Consecutive `indices` in batches of at most so many sentences and padded pieces (of a side).

    None is no limit. A sentence longer than `max_tokens` is a batch of its own; where fairseq drops the
    rest of a division by --required-batch-size-multiple, the last batch is smaller here. multiple: to which
    the collater pads both sides; above 1 sentences are first put in the order of their padded lengths, so
    that all but a few batches have one of few shapes.
    """
    if multiple > 1:
        padded = -(-np.asarray(dataset.sizes)[indices].reshape(len(indices), -1) // multiple)
        indices = indices[np.lexsort(padded.T[::-1])]
    tokens = -(-dataset.num_tokens_vec(indices).astype(np.int64) // multiple) * multiple
    if max_tokens:
        tokens = np.minimum(tokens, max_tokens)
    return data_utils.batch_by_size(
        indices,
        num_tokens_fn=None,
        num_tokens_vec=tokens,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=1,
    )


def fitting(dataset, indices: np.ndarray, limits: Any) -> tuple[np.ndarray, str | None]:
    """Indices of the pairs that are at most `limits` long, and a sentence's beginning about the others.

    limits: (source, target) or one number for both, in pieces; None is no limit.
    """
    if limits is None:
        return indices, None
    kept, ignored = dataset.filter_indices_by_size(indices, limits)
    if not len(ignored):
        return kept, None
    source, target = limits if isinstance(limits, tuple) else (limits, limits)
    longest = max(ignored, key=lambda i: max(dataset.size(i)))
    sizes = " and ".join(f"{size:,}" for size in dataset.size(longest) if size)
    about = (
        f"{len(ignored):,} of {len(indices):,} sentence pairs are longer than {source:,} source or"
        f" {target:,} target pieces (the longest, number {longest + 1:,}, has {sizes})"
    )
    return kept, about


def too_long(about: str) -> UserError:
    """What to do where no sentence may be left out."""
    return UserError(
        f"{about}, which this model cannot hold: split them, or translate with"
        " python -m fairseq_ext.translation.translate, which does; a model that is trained with larger"
        " --max-source-positions and --max-target-positions holds them"
    )
