"""Pooling over time: (B, T, C) and padding mask (B, T), True = pad, or None → (B, output_dim).

Every entry of POOLINGS is a module built as `entry(d_model, **options)` with an attribute `output_dim`.
Padded frames have no influence whatever they hold; an utterance without a valid frame raises ValueError.
Sums over time are computed in float32 or better.

One that has `statistics(x)` and `pooled(statistics)` besides, whose composition is itself, can be put
together from windows of a long recording (`chunks`). One that weighs frames has `frame_scores(x)`:
(B, T, K), whose softmax over time is the weight of each frame for each of K heads or channels.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from ext_common.registry import Registry
from fairseq_ext.speaker.conformer import MultiHeadAttention, zero_padding

POOLINGS = Registry("pooling")


class Statistics(NamedTuple):
    """What a pooling knows of a stretch of frames: how much each weighs is not yet divided by a sum.

    log_weight: logarithm of the sum of the weights, (B, C) or (B, 1); mean, variance: (B, C), weighted.
    """

    log_weight: Tensor
    mean: Tensor
    variance: Tensor

    def merge(self, other: "Statistics") -> "Statistics":
        """Those of both stretches together (Chan, Golub & LeVeque 1983, with weights)."""
        log_weight = torch.logaddexp(self.log_weight, other.log_weight)
        a, b = (self.log_weight - log_weight).exp(), (other.log_weight - log_weight).exp()
        mean = a * self.mean + b * other.mean
        between = a * b * (self.mean - other.mean).square()
        return Statistics(log_weight, mean, a * self.variance + b * other.variance + between)


def statistics_of(x: Tensor, scores: Optional[Tensor] = None) -> Statistics:
    """`Statistics` of x (B, T, C), weights e^scores, (B, T, C) or (B, T, 1), or 1; at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scores = x.new_zeros(len(x), x.shape[1], 1) if scores is None else scores.to(x.dtype)
    weights = scores.softmax(1)
    mean = weighted_mean(x, weights)
    variance = weighted_mean((x - mean.unsqueeze(1)).square(), weights)
    return Statistics(scores.logsumexp(1), mean, variance)


def mean_of(found: Statistics) -> Tensor:
    """What a pooling of means gives: (B, C)."""
    return found.mean


def mean_and_deviation(found: Statistics, eps: float = 1e-5) -> Tensor:
    """What a pooling of means and deviations gives, as `mean_and_std`: (B, 2 C)."""
    return torch.cat([found.mean, (found.variance + eps).sqrt()], -1)


@dataclass
class SelfAttentionOptions:
    nhead: int = field(default=4, metadata={"help": "attention heads"})


@dataclass
class SelfAttentiveOptions:
    nhead: int = field(
        default=1, metadata={"help": "learned queries; each pools its own share of the channels"}
    )
    hidden: int = field(default=64, metadata={"help": "width of the scoring layer"})


@dataclass
class AttentiveStatisticsOptions:
    hidden: int = field(default=64, metadata={"help": "width of the scoring layer"})
    per_channel: bool = field(
        default=True, metadata={"help": "one weight a channel (ECAPA-TDNN), else one a frame"}
    )


@POOLINGS.register("mean")
class MeanPooling(nn.Module):
    """Mean over the valid frames."""

    def __init__(self, d_model: int):
        super().__init__()
        self.output_dim = d_model

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        return weighted_mean(x, uniform_weights(x, padding_mask)).to(x.dtype)

    statistics, pooled = staticmethod(statistics_of), staticmethod(mean_of)


@POOLINGS.register("statistics")
class StatisticsPooling(nn.Module):
    """Mean and standard deviation (Snyder et al. 2018, "X-vectors"): C → 2 C."""

    def __init__(self, d_model: int):
        super().__init__()
        self.output_dim = 2 * d_model

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = zero_padding(x, padding_mask)
        return mean_and_std(x, uniform_weights(x, padding_mask)).to(x.dtype)

    statistics, pooled = staticmethod(statistics_of), staticmethod(mean_and_deviation)


@POOLINGS.register("self_attentive", options=SelfAttentiveOptions)
class SelfAttentivePooling(nn.Module):
    """Weighted mean, weights from learned queries (Zhu et al. 2018; several heads: India et al. 2019).

    e = W2 tanh(W1 x + b1), (B, T, nhead); a = softmax of e over the valid frames; head h averages the h-th
    share of the C channels with a[..., h].
    """

    def __init__(self, d_model: int, nhead: int = 1, hidden: int = 64):
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"pooling width {d_model} is not a multiple of nhead {nhead}")
        self.output_dim = d_model
        self.score = scoring_layer(d_model, hidden, nhead)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = zero_padding(x, padding_mask)
        weights = softmax_over_time(self.score(x), padding_mask)
        weights = weights.repeat_interleave(x.shape[-1] // weights.shape[-1], -1)
        return weighted_mean(x, weights).to(x.dtype)

    pooled = staticmethod(mean_of)

    def frame_scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(x)
        return scores

    def statistics(self, x: Tensor) -> Statistics:
        scores = self.score(x)
        return statistics_of(x, scores.repeat_interleave(x.shape[-1] // scores.shape[-1], -1))


@POOLINGS.register("attentive_statistics", options=AttentiveStatisticsOptions)
class AttentiveStatisticsPooling(nn.Module):
    """Weighted mean and standard deviation (Okabe 2018; per channel: Desplanques 2020): C → 2 C."""

    def __init__(self, d_model: int, hidden: int = 64, per_channel: bool = True):
        super().__init__()
        self.output_dim = 2 * d_model
        self.score = scoring_layer(d_model, hidden, d_model if per_channel else 1)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = zero_padding(x, padding_mask)
        return mean_and_std(x, softmax_over_time(self.score(x), padding_mask)).to(x.dtype)

    pooled = staticmethod(mean_and_deviation)

    def frame_scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(x)
        return scores

    def statistics(self, x: Tensor) -> Statistics:
        return statistics_of(x, self.score(x))


@POOLINGS.register("self_attention", options=SelfAttentionOptions)
class SelfAttentionPooling(nn.Module):
    """Multi-head scaled dot-product self-attention over the valid frames, then their mean.

    (B, T, C) → (B, C).
    Vaswani et al. 2017, eq. (1), followed by the masked mean over time.
    """

    def __init__(self, d_model: int, nhead: int = 4):
        super().__init__()
        self.output_dim = d_model
        self.attention = MultiHeadAttention(d_model, nhead)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        weights = uniform_weights(x, padding_mask)
        y = self.attention(zero_padding(x, padding_mask), padding_mask)
        return weighted_mean(y, weights).to(x.dtype)

    pooled = staticmethod(mean_of)

    def statistics(self, x: Tensor) -> Statistics:
        """Of the attended frames; those beyond `x` are not attended to."""
        return statistics_of(self.attention(x, None))

    def frame_scores(self, x: Tensor) -> Tensor:
        """Logarithm of what the attended frames take from each, together."""
        return self.attention.weights(x).sum(2).log().transpose(1, 2)


def scoring_layer(d_model: int, hidden: int, outputs: int) -> nn.Module:
    """Two-layer scorer of frames, (B, T, d_model) → (B, T, outputs)."""
    return nn.Sequential(nn.Linear(d_model, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def uniform_weights(x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """1 / length at valid frames and 0 at padded ones: (B, T, 1), at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if padding_mask is None:
        return x.new_full((1, 1, 1), 1 / x.shape[1], dtype=dtype).expand(len(x), x.shape[1], 1)
    valid = (~padding_mask).to(dtype).unsqueeze(-1)
    return valid / _lengths(padding_mask)[:, None, None].to(dtype)


def softmax_over_time(scores: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """Softmax of (B, T, K) over the valid frames, exactly 0 at padded ones; at least float32."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if padding_mask is None:
        return scores.softmax(1)
    _lengths(padding_mask)
    return scores.masked_fill(padding_mask.unsqueeze(-1), float("-inf")).softmax(1)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_t weights · x over time: (B, T, C) and (B, T, C or 1) → (B, C); frames of weight 0 may hold NaN."""
    x = x.to(weights.dtype)
    # in a graph that is exported the network has filled them, and another pass over the frames is felt
    kept = x if torch.compiler.is_exporting() else x.masked_fill(weights == 0, 0)
    return (weights * kept).sum(1)


def mean_and_std(x: Tensor, weights: Tensor, eps: float = 1e-5) -> Tensor:
    """Weighted mean and standard deviation over time, concatenated: (B, T, C) → (B, 2 C).

    The deviation is computed around the mean (not as E[x²] − mean², which cancels), biased, with eps under
    the root, so that one frame gives a finite value and gradient.
    """
    mean = weighted_mean(x, weights)
    deviation = x.to(weights.dtype) - mean.unsqueeze(1)
    return torch.cat([mean, (weighted_mean(deviation.square(), weights) + eps).sqrt()], -1)


def _lengths(padding_mask: Tensor) -> Tensor:
    lengths = (~padding_mask).sum(1)
    # a graph that is exported cannot look at values
    if not torch.compiler.is_exporting() and (lengths == 0).any():
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"utterances {rows} of the batch have no valid frame to pool over")
    return lengths
