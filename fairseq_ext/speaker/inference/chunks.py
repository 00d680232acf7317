"""Long recordings in overlapping windows whose statistics are pooled: time in proportion to length.

Self-attention over a whole recording costs the square of its length, and no training crop was as long. A
window sees what is around its own frames; every frame counts once, in the window where it lies most inward,
and the pooling merges what it knows of each window (`Statistics`), so that the weights of attention are those
over the whole recording. A pooling that does not say how gives embeddings, which are averaged by length.
"""

from collections.abc import Iterator
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_ext.speaker.batching import CHUNK_FRAMES, Window
from fairseq_ext.speaker.batching import windows as windows
from fairseq_ext.speaker.network import SpeakerNetwork, normalise
from fairseq_ext.speaker.pooling import Statistics, softmax_over_time


def forward_long(
    network: Any, features: Any, chunk: int = CHUNK_FRAMES, device: Any = "cpu"
) -> Dict[str, Tensor]:
    """`network` over features (T, F) of any length: embedding (1, D) and logits (1, C).

    features: an array or what gives stretches of one (`LongFeatures`), so that no more is held than a window.
    network: a `SpeakerNetwork`, also under another name (`NamedNetwork`), or any module with its interface.
    """
    plain = getattr(network, "network", network)
    if not isinstance(plain, SpeakerNetwork):
        return averaged(network, features, chunk, device)
    merged: Optional[Statistics] = None
    embeddings, weights = [], []
    for window, x in counted_frames(plain, features, chunk, device):
        if getattr(plain.pooling, "statistics", None):
            found = plain.pooling.statistics(x)
            merged = found if merged is None else merged.merge(found)
        else:
            embeddings.append(plain.embed(plain.pooling(x, None)))
            weights.append(window.last - window.first)
    if merged is not None:
        embedding = plain.embed(plain.pooling.pooled(merged).to(x.dtype))
    else:
        embedding = mean_of(embeddings, weights)
    return {"embedding": embedding, "logits": plain.head(embedding)}


def counted_frames(
    network: SpeakerNetwork, features: Any, chunk: int, device: Any
) -> Iterator[Tuple[Window, Tensor]]:
    """Of each window of features (T, F) the frames that count, as they are pooled: (1, n, C)."""
    mean = None
    if network.feature_norm == "utterance":
        over_time = mean_frame(features, chunk)
        mean = (over_time - network.feature_mean.cpu()) / network.feature_std.cpu()
    kind = "none" if network.feature_norm == "none" else "global"
    for window in windows(len(features), chunk, network.step):
        x = torch.as_tensor(features[window.start : window.end])
        x = normalise(x[None].to(device), None, kind, network.feature_mean, network.feature_std)
        x, _ = network.frames(x if mean is None else x - mean.to(device), None)
        first, last = ((n - window.start) / network.step for n in (window.first, window.last))
        yield window, x[:, int(first) : -int(-last // 1)]


def frame_weights(
    network: Any, features: Any, chunk: int = CHUNK_FRAMES, device: Any = "cpu"
) -> Optional[Tensor]:
    """How much each frame of features (T, F) counts in what is pooled: float32 (T,), whose sum is 1.

    The mean over the heads or channels that the pooling has weights for. None where it weighs all frames
    alike, and for a network whose inside is unknown.
    """
    plain = getattr(network, "network", network)
    if not isinstance(plain, SpeakerNetwork) or not hasattr(plain.pooling, "frame_scores"):
        return None
    parts = counted_frames(plain, features, chunk, device)
    scores = torch.cat([plain.pooling.frame_scores(x) for _, x in parts], 1)
    weights = softmax_over_time(scores, None).mean(-1)[0].float().cpu()
    # what is pooled stands for `step` frames, the last of a recording for what is left
    owner = torch.arange(len(features)) // plain.step
    return weights[owner] / owner.bincount()[owner]


def mean_frame(features: Any, size: int) -> Tensor:
    """float32 (F,): the mean of features (T, F) over time, summed in float64 a piece at a time."""
    pieces = (features[i : i + size] for i in range(0, len(features), size))
    total = sum(np.asarray(piece).sum(0, dtype=np.float64) for piece in pieces)
    return torch.as_tensor(total / len(features)).float()


def averaged(network: Any, features: Any, chunk: int, device: Any) -> Dict[str, Tensor]:
    """As `forward_long` for a network whose inside is unknown: its outputs, averaged by length."""
    parts = windows(len(features), chunk)
    weights = [part.last - part.first for part in parts]
    cuts = (torch.as_tensor(features[part.first : part.last])[None].to(device) for part in parts)
    found = [network(cut, None) for cut in cuts]
    return {key: mean_of([out[key] for out in found], weights) for key in ("embedding", "logits")}


def mean_of(values: List[Tensor], weights: List[int]) -> Tensor:
    """Σ w x / Σ w."""
    share = torch.tensor(weights, dtype=values[0].dtype, device=values[0].device) / sum(weights)
    return (torch.cat(values) * share[:, None]).sum(0, keepdim=True)
