"""The speaker network as a plain module: features → encoder → pooling → embedding → class scores."""

from dataclasses import asdict, dataclass, field
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_ext.speaker.conformer import ENCODERS, EncoderOptions, zero_padding
from fairseq_ext.speaker.pooling import POOLINGS

FEATURE_NORMS = ("none", "global", "utterance")


@dataclass
class NetworkOptions(EncoderOptions):
    encoder: str = field(
        default="conformer", metadata={"help": f"encoder: {', '.join(ENCODERS.names())}"}
    )
    pooling: str = field(
        default="attentive_statistics",
        metadata={"help": f"pooling over time: {', '.join(POOLINGS.names())}"},
    )
    pooling_options: str = field(
        default="", metadata={"help": "options of the pooling, as key=value,key=value"}
    )
    aggregate_layers: bool = field(
        default=False,
        metadata={
            "help": "pool the outputs of all blocks side by side (MFA-Conformer), not the last"
        },
    )
    feature_norm: str = field(
        default="global",
        metadata={
            "help": "normalisation of the features: none; global (mean and deviation of the training"
            " data); utterance (as global, less the mean of the frames at hand)",
            "choices": list(FEATURE_NORMS),
        },
    )
    frame_stack: int = field(
        default=1, metadata={"help": "neighbouring frames the encoder takes as one"}
    )
    embedding_dim: int = field(default=128, metadata={"help": "width of the speaker embedding"})
    embedding_dropout: float = field(default=0.0, metadata={"help": "dropout on the embedding"})
    subcenters: int = field(
        default=1, metadata={"help": "class weights a speaker, the nearest counts (cosine head)"}
    )


class SpeakerNetwork(nn.Module):
    """Features (B, T, F) float32 and padding mask (B, T), True = pad, or None → embedding and logits.

    `head` is "cosine" (logits are cosines in [-1, 1], no bias) or "linear".
    """

    def __init__(self, options: NetworkOptions, n_mels: int, classes: int, head: str = "cosine"):
        super().__init__()
        o = options
        if o.feature_norm not in FEATURE_NORMS:
            known = ", ".join(FEATURE_NORMS)
            raise ValueError(f"unknown feature_norm {o.feature_norm!r}: known are {known}")
        if o.frame_stack < 1 or o.subcenters < 1 or o.layers < 1:
            raise ValueError("frame_stack, subcenters and layers are at least 1")
        self.feature_norm, self.frame_stack = o.feature_norm, o.frame_stack
        self.aggregate_layers = o.aggregate_layers
        # the statistics of the training data, set by the task and kept in the checkpoint
        self.register_buffer("feature_mean", torch.zeros(n_mels))
        self.register_buffer("feature_std", torch.ones(n_mels))
        self.input = nn.Linear(n_mels * o.frame_stack, o.d_model)
        encoder_fields = {
            k: v for k, v in asdict(o).items() if k in EncoderOptions.__dataclass_fields__
        }
        self.encoder = ENCODERS.get(o.encoder)(**encoder_fields)
        width = o.d_model * (o.layers if o.aggregate_layers else 1)
        self.encoder_norm = nn.LayerNorm(width)
        self.pooling = POOLINGS.build(o.pooling, width, options=o.pooling_options)
        self.embedding = nn.Linear(self.pooling.output_dim, o.embedding_dim)
        self.embedding_norm = nn.LayerNorm(self.pooling.output_dim)
        self.dropout = nn.Dropout(o.embedding_dropout)
        self.head = Head(o.embedding_dim, classes, head, o.subcenters)

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        x = normalise(source, padding_mask, self.feature_norm, self.feature_mean, self.feature_std)
        x, padding_mask = stack_frames(x, padding_mask, self.frame_stack)
        layers = self.encoder(self.input(x), padding_mask)
        x = self.encoder_norm(torch.cat(layers, -1) if self.aggregate_layers else layers[-1])
        pooled = self.pooling(x, padding_mask)
        embedding = self.embedding(self.embedding_norm(pooled))
        return {"embedding": embedding, "logits": self.head(self.dropout(embedding))}


class Head(nn.Module):
    """Class weights: (B, D) → (B, classes).

    cosine: max over a class's sub-centres (Deng et al. 2020) of cos(x, w), in float32, no bias;
    linear: W x + b.
    """

    def __init__(self, dim: int, classes: int, kind: str = "cosine", subcenters: int = 1):
        super().__init__()
        if kind not in ("cosine", "linear"):
            raise ValueError(f"unknown head {kind!r}: known are cosine, linear")
        if kind == "linear" and subcenters != 1:
            raise ValueError("sub-centres need the cosine head, which softmax does not use")
        self.kind, self.subcenters = kind, subcenters
        self.weight = nn.Parameter(torch.empty(classes * subcenters, dim))
        self.bias = nn.Parameter(torch.zeros(classes)) if kind == "linear" else None
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            cosines = F.linear(
                F.normalize(x.to(dtype), dim=1), F.normalize(self.weight.to(dtype), dim=1)
            )
        if self.subcenters > 1:
            cosines = cosines.view(len(x), -1, self.subcenters).amax(-1)
        return cosines


def normalise(
    x: Tensor, padding_mask: Optional[Tensor], kind: str, mean: Tensor, std: Tensor
) -> Tensor:
    """Features (B, T, F) normalised, 0 at padded frames; see `NetworkOptions.feature_norm`."""
    x = zero_padding(x, padding_mask)
    if kind == "none":
        return x
    x = zero_padding((x - mean) / std, padding_mask)
    if kind == "global":
        return x
    frames = x.shape[1] if padding_mask is None else (~padding_mask).sum(1)[:, None, None]
    return zero_padding(x - x.sum(1, keepdim=True) / frames, padding_mask)


def stack_frames(
    x: Tensor, padding_mask: Optional[Tensor], n: int
) -> Tuple[Tensor, Optional[Tensor]]:
    """(B, T, F) → (B, ⌈T/n⌉, n F): the last stack of an utterance is filled with zeros, as past its end."""
    if n == 1:
        return x, padding_mask
    B, T, C = x.shape
    x = F.pad(x, (0, 0, 0, -T % n)).reshape(B, -1, n * C)
    return x, None if padding_mask is None else padding_mask[:, ::n]
