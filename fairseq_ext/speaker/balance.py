"""How training crops are divided among speakers who have more and less speech."""

from collections.abc import Sequence

import numpy as np

# A speaker with this many times the median, or the median with that many times a speaker's, is a lot.
UNEVEN = 8.0
WORDS = {"none": 1.0, "speaker": 0.0}


def power_of(balance: str) -> float:
    """The exponent p of `--balance`: crops of a speaker are in proportion to frames^p.

    "none" is 1 (in proportion), "speaker" 0 (as many of each); a number between is a compromise.
    ValueError for anything else.
    """
    try:
        power = WORDS[balance] if balance in WORDS else float(balance)
    except ValueError:
        power = -1.0
    if not 0 <= power <= 1:
        raise ValueError(f"balance {balance!r} is none, speaker, or a number from 0 to 1")
    return power


def speaker_frames(lengths: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64: frames of each speaker that occurs, by ascending label."""
    _, index = np.unique(labels, return_inverse=True)
    return np.bincount(index, weights=lengths).astype(np.int64)


def is_uneven(frames: Sequence[int] | np.ndarray) -> bool:
    """Whether somebody has much more or much less than most (`UNEVEN`)."""
    middle = float(np.median(frames)) if len(frames) else 0.0
    return bool(middle) and bool(max(frames) >= UNEVEN * middle or min(frames) * UNEVEN <= middle)


def allocate(weights: np.ndarray, total: int) -> np.ndarray:
    """int64 (N,): `total` over N by float weights, at least one each, the rest by largest remainder."""
    total = max(total, len(weights))
    share = weights / weights.sum() * (total - len(weights))
    counts = np.floor(share).astype(np.int64)
    missing = total - len(weights) - counts.sum()
    order = np.argsort(counts - share, kind="stable")
    counts[order[:missing]] += 1
    return np.asarray(counts + 1)


def balanced(
    lengths: np.ndarray, labels: np.ndarray, total: int, power: float, turn: int = 0
) -> np.ndarray:
    """int64 (total,): the utterance of each crop, ascending; crops of a speaker by frames^power.

    lengths, labels: int (N,), frames and speakers of N utterances. A speaker's crops go over the
    utterances by length, at least one each; where there are fewer crops than utterances it is these in
    turn, from one `turn` (0, 1, …) to the next.
    """
    speakers = np.unique(labels)
    crops = allocate(speaker_frames(lengths, labels).astype(np.float64) ** power, total)
    found = []
    for speaker, count in zip(speakers, crops, strict=True):
        rows = np.flatnonzero(labels == speaker)
        if count < len(rows):
            found.append(rows[(turn * count + np.arange(count)) % len(rows)])
        else:
            found.append(np.repeat(rows, allocate(lengths[rows], int(count))))
    return np.sort(np.concatenate(found))
