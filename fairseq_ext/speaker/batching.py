"""Utterances side by side: which share a batch, how shorter ones are padded, where long ones are cut."""

from typing import TYPE_CHECKING, List, NamedTuple, Optional, Tuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# 30 s: what is not longer is computed whole, the rest in windows (`chunks`).
CHUNK_FRAMES = 3000
# What a window sees on either side of the frames that count, at least: 1 s.
MARGIN_FRAMES = 100


def pad(features: List["Tensor"]) -> Tuple["Tensor", Optional["Tensor"]]:
    """[(T_i, F)] → (B, max T, F) filled with zeros, and the padding mask (B, max T) or None."""
    import torch

    lengths = [f.shape[0] for f in features]
    if len(set(lengths)) == 1:
        return torch.stack(list(features)), None
    source = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return source, torch.arange(source.shape[1]) >= torch.tensor(lengths)[:, None]


def batches_by_frames(
    sizes: np.ndarray, max_frames: int, max_utterances: Optional[int] = None
) -> List[List[int]]:
    """Indices in batches of similar length, each of at most `max_frames` padded frames.

    Every index is in exactly one batch; an utterance longer than `max_frames` is a batch of its own.
    """
    batches: List[List[int]] = []
    for index in np.argsort(sizes, kind="stable").tolist():
        full = not batches or (
            (len(batches[-1]) + 1) * sizes[index] > max_frames
            or (max_utterances and len(batches[-1]) >= max_utterances)
        )
        if full:
            batches.append([])
        batches[-1].append(index)
    return batches


class Window(NamedTuple):
    """Frames `start` to `end` are seen, `first` to `last` count."""

    start: int
    end: int
    first: int
    last: int


def windows(frames: int, chunk: int = CHUNK_FRAMES, step: int = 1) -> List[Window]:
    """Windows of `chunk` frames over a recording, evenly spaced; all begin at multiples of `step`.

    step: frames that the network takes as one. A recording of one frame more than a window has two, which
    see nearly all of it each: nothing changes abruptly with length.
    """
    chunk -= chunk % step
    if frames <= chunk:
        return [Window(0, frames, 0, frames)]
    margin = min(MARGIN_FRAMES, chunk // 4)
    count = 1 + -(-(frames - chunk) // (chunk - 2 * margin))
    places = [i * (frames - chunk) / (count - 1) for i in range(count)]
    starts = [int(-(-place // step)) * step for place in places]
    ends = [*(start + chunk for start in starts[:-1]), frames]
    cuts = [
        (end + start) // (2 * step) * step for end, start in zip(ends, starts[1:], strict=False)
    ]
    return [Window(*each) for each in zip(starts, ends, [0, *cuts], [*cuts, frames], strict=True)]
