"""Utterances side by side: which share a batch, and how shorter ones are padded."""

from typing import TYPE_CHECKING, List, Optional, Tuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# 30 s: what is not longer is computed whole, the rest in windows (`chunks`).
CHUNK_FRAMES = 3000


def pad(features: List["Tensor"]) -> Tuple["Tensor", Optional["Tensor"]]:
    """[(T_i, F)] → (B, max T, F) filled with zeros, and the padding mask (B, max T) or None."""
    import torch

    lengths = torch.tensor([len(f) for f in features])
    if bool((lengths == lengths[0]).all()):
        return torch.stack(list(features)), None
    source = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return source, torch.arange(source.shape[1]) >= lengths[:, None]


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
