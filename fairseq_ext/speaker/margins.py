"""Margin losses over cosines, as pure functions: cosines (N, C) in [-1, 1], labels (N,) int64 → loss.

Computed in float32 (float64 where the input is), whatever the autocast. Every entry of MARGINS is
called as `entry(logits, labels, reduction=…, **options)`.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ext_common.registry import Registry

MARGINS = Registry("margin")


@dataclass
class MarginOptions:
    s: float = field(default=30.0, metadata={"help": "scale of the cosines before the softmax"})
    m: float = field(
        default=0.2, metadata={"help": "margin taken from the target (AM: cosine, AAM: radians)"}
    )
    inter_topk: int = field(
        default=0, metadata={"help": "how many of the nearest others get a margin too; 0: none"}
    )
    inter_m: float = field(
        default=0.06, metadata={"help": "their margin, by which they count as nearer than they are"}
    )

    def __post_init__(self) -> None:
        if self.inter_topk < 0:
            raise ValueError(f"inter_topk must not be negative, got {self.inter_topk}")


@dataclass
class AdditiveMarginOptions(MarginOptions):
    m: float = field(default=0.35, metadata={"help": "margin taken from the target's cosine"})


@MARGINS.register("am_softmax", options=AdditiveMarginOptions)
def am_softmax(
    logits: Tensor,
    labels: Tensor,
    s: float = AdditiveMarginOptions.s,
    m: float = AdditiveMarginOptions.m,
    reduction: str = "mean",
    inter_topk: int = MarginOptions.inter_topk,
    inter_m: float = MarginOptions.inter_m,
) -> Tensor:
    """Additive-margin softmax (Wang et al. 2018, "Additive Margin Softmax for Face Verification", eq. 5).

    loss = −log softmax(s · (cos − m · onehot(label)))[label]. `logits` are cosines (N, C); `reduction` is
    mean, sum or none. The `inter_topk` largest cosines of others become cos + inter_m (Zhao et al. 2021, "The
    SpeakIn System for VoxCeleb Speaker Recognition Challenge 2021", inter-topk).
    """
    logits = _full_precision(logits)
    target = logits.gather(1, labels[:, None])
    if inter_topk:
        places = _nearest_others(logits, labels, inter_topk)
        logits = logits.scatter(1, places, logits.gather(1, places) + inter_m)
    return _scaled_cross_entropy(logits, labels, target - m, s, reduction)


@MARGINS.register("aam_softmax", options=MarginOptions)
def aam_softmax(
    logits: Tensor,
    labels: Tensor,
    s: float = MarginOptions.s,
    m: float = MarginOptions.m,
    reduction: str = "mean",
    inter_topk: int = MarginOptions.inter_topk,
    inter_m: float = MarginOptions.inter_m,
) -> Tensor:
    """Additive-angular-margin softmax (Deng et al. 2019, "ArcFace", eq. 3).

    The target's cos θ becomes cos(θ + m) while θ + m ≤ π and cos θ − (1 − cos m) beyond: continuous at
    θ = π − m and decreasing on the whole of [0, π]. The `inter_topk` largest cosines of others become
    cos(θ − inter_m), see `am_softmax`.
    """
    logits = _full_precision(logits)
    cos = logits.gather(1, labels[:, None])
    shifted = _turned(cos, m)
    shifted = torch.where(cos >= -math.cos(m), shifted, cos - (1 - math.cos(m)))
    if inter_topk:
        places = _nearest_others(logits, labels, inter_topk)
        logits = logits.scatter(1, places, _turned(logits.gather(1, places), -inter_m))
    return _scaled_cross_entropy(logits, labels, shifted, s, reduction)


@MARGINS.register("softmax")
def softmax(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of linear class scores (N, C), without margin or scale: the baseline."""
    return F.cross_entropy(_full_precision(logits), labels, reduction=reduction)


def margin_at(update: int, m: float, start: int, end: int) -> float:
    """The margin after `update` updates: 0 up to `start`, m from `end` on, linear between.

    A pure function of the update count, so that resuming and several processes agree. Where `end` is not
    after `start` the margin has its full size from `start` on.
    """
    if update >= max(start, end):
        return m
    return m * max(0.0, (update - start) / max(1, end - start))


def _turned(cos: Tensor, m: float) -> Tensor:
    """cos(θ + m) of cos θ."""
    # at |cos| = 1 the gradient of the root is infinite; below the clamp it is 0
    sin = (1 - cos.square()).clamp_min(1e-7).sqrt()
    return cos * math.cos(m) - sin * math.sin(m)


def _nearest_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """int64 (N, min(count, C − 1)): columns of the largest logits (N, C) but the label's."""
    others = logits.detach().scatter(1, labels[:, None], -math.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scaled_cross_entropy(
    logits: Tensor, labels: Tensor, target: Tensor, s: float, reduction: str
) -> Tensor:
    return F.cross_entropy(
        s * logits.scatter(1, labels[:, None], target), labels, reduction=reduction
    )
