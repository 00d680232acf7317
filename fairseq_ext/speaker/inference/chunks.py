"""Long recordings in overlapping windows whose statistics are pooled: time in proportion to length.

Self-attention over a whole recording costs the square of its length, and no training crop was as long. A
window sees what is around its own frames; every frame counts once, in the window where it lies most inward,
and the pooling merges what it knows of each window (`Statistics`), so that the weights of attention are those
over the whole recording. A pooling that does not say how gives embeddings, which are averaged by length.
"""

from typing import Any, Dict, List, Optional

import numpy as np
import torch
from torch import Tensor

from fairseq_ext.speaker.batching import CHUNK_FRAMES
from fairseq_ext.speaker.batching import windows as windows
from fairseq_ext.speaker.network import SpeakerNetwork, normalise
from fairseq_ext.speaker.pooling import Statistics


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
    mean = None
    if plain.feature_norm == "utterance":
        mean = (mean_frame(features, chunk) - plain.feature_mean.cpu()) / plain.feature_std.cpu()
    kind = "none" if plain.feature_norm == "none" else "global"
    merged: Optional[Statistics] = None
    embeddings, weights = [], []
    for window in windows(len(features), chunk, plain.step):
        seen = torch.as_tensor(features[window.start : window.end])
        x = normalise(seen[None].to(device), None, kind, plain.feature_mean, plain.feature_std)
        x, _ = plain.frames(x if mean is None else x - mean.to(device), None)
        first, last = ((n - window.start) / plain.step for n in (window.first, window.last))
        x = x[:, int(first) : -int(-last // 1)]
        if getattr(plain.pooling, "statistics", None):
            found = plain.pooling.statistics(x)
            merged = found if merged is None else merged.merge(found)
        else:
            embeddings.append(plain.embed(plain.pooling(x, None)))
            weights.append(window.last - window.first)
    if merged is not None:
        embedding = plain.embed(plain.pooling.pooled(merged).to(seen.dtype))
    else:
        embedding = mean_of(embeddings, weights)
    return {"embedding": embedding, "logits": plain.head(embedding)}


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
