"""The speaker network as a plain module: features → encoder → pooling → embedding → class scores."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ext_common.checkpoints import name_of
from fairseq_ext.speaker.conformer import ENCODERS, EncoderOptions, zero_padding
from fairseq_ext.speaker.kernels import Linear
from fairseq_ext.speaker.pooling import POOLINGS

# Sizes by name; the recipes under configs/speaker_id say the same (a test compares them).
PRESETS: Dict[str, Dict[str, Any]] = {
    "conformer_speaker": {},
    "conformer_speaker_classroom": dict(
        d_model=80,
        nhead=2,
        d_ffn=256,
        layers=2,
        pooled_layers="last",
        front_end="linear",
        embedding_dim=128,
    ),
    "conformer_speaker_large": dict(d_model=256, nhead=4, d_ffn=1024, layers=6, embedding_dim=256),
    "transformer_speaker": dict(encoder="transformer"),
}

FEATURE_NORMS = ("none", "global", "utterance")
STATISTICS = ("feature_mean", "feature_std")
# In units of --speed-perturb, from 1: the speeds that have classes of their own; the first has the speakers'.
SPEEDS = (0, -1, 1)


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
    pooled_layers: str = field(
        default="all",
        metadata={
            "help": "whose outputs are pooled: all blocks' side by side (MFA-Conformer), or the last's",
            "choices": ["all", "last"],
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
        default=1,
        metadata={"help": "neighbouring frames the encoder takes as one (linear front end)"},
    )
    front_end: str = field(
        default="conv",
        metadata={
            "help": "what brings the features to d_model: linear, or conv (two 3 × 3 convolutions over"
            " time and frequency, which halve the frames)",
            "choices": ["linear", "conv"],
        },
    )
    front_channels: int = field(default=32, metadata={"help": "channels of the conv front end"})
    embedding_dim: int = field(default=192, metadata={"help": "width of the speaker embedding"})
    embedding_dropout: float = field(default=0.0, metadata={"help": "dropout on the embedding"})
    subcenters: int = field(
        default=1, metadata={"help": "class weights a speaker, the nearest counts (cosine head)"}
    )


class SpeakerNetwork(nn.Module):
    """Features (B, T, F) float32 and padding mask (B, T), True = pad, or None → embedding and logits.

    `head` is "cosine" (logits are cosines in [-1, 1], no bias) or "linear". speeds: as of `Head`.
    """

    def __init__(
        self,
        options: NetworkOptions,
        n_mels: int,
        classes: int,
        head: str = "cosine",
        speeds: int = 1,
    ):
        super().__init__()
        o = options
        if o.feature_norm not in FEATURE_NORMS:
            known = ", ".join(FEATURE_NORMS)
            raise ValueError(f"unknown feature_norm {o.feature_norm!r}: known are {known}")
        if o.frame_stack < 1 or o.subcenters < 1 or o.layers < 1:
            raise ValueError("frame_stack, subcenters and layers are at least 1")
        self.feature_norm = o.feature_norm
        if o.pooled_layers not in ("all", "last"):
            raise ValueError(f"unknown pooled_layers {o.pooled_layers!r}: known are all, last")
        self.pooled_layers = o.pooled_layers
        # the statistics of the training data, set by the task and kept in the checkpoint
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(n_mels))
        self.register_buffer("feature_std", torch.ones(n_mels))
        self.input = front_end(o, n_mels)
        encoder_fields = {
            k: v for k, v in asdict(o).items() if k in EncoderOptions.__dataclass_fields__
        }
        self.encoder = ENCODERS.get(o.encoder)(**encoder_fields)
        width = o.d_model * (o.layers if o.pooled_layers == "all" else 1)
        self.encoder_norm = nn.LayerNorm(width)
        self.pooling = POOLINGS.build(o.pooling, width, options=o.pooling_options)
        self.embedding = nn.Linear(self.pooling.output_dim, o.embedding_dim)
        self.embedding_norm = nn.LayerNorm(self.pooling.output_dim)
        self.dropout = nn.Dropout(o.embedding_dropout)
        self.head = Head(o.embedding_dim, classes, head, o.subcenters, speeds)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpeakerNetwork":
        """As any module; but --fp16 and --bf16 do not round the statistics, which are of the data."""
        exact = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(moved.device))
        return self

    @property
    def step(self) -> int:
        """Frames of the features that the encoder takes as one."""
        step: int = self.input.step  # type: ignore[assignment]
        return step

    def frames(
        self, x: Tensor, padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Normalised features (B, T, F) → what is pooled, (B, ⌈T / step⌉, C), and its padding mask."""
        # only now may it be in 16 bits: those of a log-mel value hold 0.06 nat
        x = x.to(self.embedding.weight.dtype)
        x, padding_mask = self.input(x, padding_mask)
        layers = self.encoder(x, padding_mask)
        x = torch.cat(layers, -1) if self.pooled_layers == "all" else layers[-1]
        return self.encoder_norm(x), padding_mask

    def embed(self, pooled: Tensor) -> Tensor:
        """(B, pooling.output_dim) → embeddings (B, D)."""
        embedding: Tensor = self.embedding(self.embedding_norm(pooled))
        return embedding

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        x = normalise(source, padding_mask, self.feature_norm, self.feature_mean, self.feature_std)
        x, padding_mask = self.frames(x, padding_mask)
        embedding = self.embed(self.pooling(x, padding_mask))
        return {"embedding": embedding, "logits": self.head(self.dropout(embedding))}


class NamedNetwork(nn.Module):
    """A `SpeakerNetwork` under the name that it has in a checkpoint."""

    def __init__(self, network: SpeakerNetwork):
        super().__init__()
        self.network = network

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> Dict[str, Tensor]:
        found: Dict[str, Tensor] = self.network(source, padding_mask)
        return found


class LinearFrontEnd(nn.Module):
    """`stack` neighbouring frames side by side → one linear layer: (B, T, F) → (B, ⌈T / stack⌉, d)."""

    def __init__(self, n_mels: int, d_model: int, stack: int):
        super().__init__()
        self.stack = self.step = stack
        self.linear = Linear(n_mels * stack, d_model)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        x, padding_mask = stack_frames(x, padding_mask, self.stack)
        return self.linear(x), padding_mask


class ConvFrontEnd(nn.Module):
    """Two 3 × 3 convolutions with SiLU over time and frequency: (B, T, F) → (B, ⌈T / 2⌉, d).

    Strides are (2, 2) and (1, 2), as the subsampling of Gulati et al. 2020 with half its step in time.
    Padded frames are zeroed before each convolution: past its end an utterance sees zeros, as alone.
    """

    step = 2

    def __init__(self, n_mels: int, d_model: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=(1, 2), padding=1)
        self.linear = Linear(channels * -(-n_mels // 4), d_model)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        x = F.silu(self.conv1(x.unsqueeze(1)))
        if padding_mask is not None:
            padding_mask = padding_mask[:, ::2]
            x = x.masked_fill(padding_mask[:, None, :, None], 0)
        x = F.silu(self.conv2(x))
        return self.linear(x.permute(0, 2, 1, 3).flatten(2)), padding_mask


class Head(nn.Module):
    """Class weights: (B, D) → (B, classes).

    cosine: max over a class's sub-centres (Deng et al. 2020) of cos(x, w), in float32, no bias;
    linear: W x + b. In training there are `speeds` times as many classes: behind those of the speakers theirs
    again for each other speed at which speech is played. Elsewhere only the first are scored.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        kind: str = "cosine",
        subcenters: int = 1,
        speeds: int = 1,
    ):
        super().__init__()
        if kind not in ("cosine", "linear"):
            raise ValueError(f"unknown head {kind!r}: known are cosine, linear")
        if kind == "linear" and subcenters != 1:
            raise ValueError("sub-centres need the cosine head, which softmax does not use")
        self.kind, self.subcenters, self.classes, self.speeds = kind, subcenters, classes, speeds
        self.weight = nn.Parameter(torch.empty(classes * speeds * subcenters, dim))
        self.bias = nn.Parameter(torch.zeros(classes * speeds)) if kind == "linear" else None
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Optional[Tensor] = self.bias
        if self.speeds > 1 and not self.training:
            weight = weight[: self.classes * self.subcenters]
            bias = None if bias is None else bias[: self.classes]
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            cosines = F.linear(
                F.normalize(x.to(dtype), dim=1), F.normalize(weight.to(dtype), dim=1)
            )
        if self.subcenters > 1:
            cosines = cosines.view(len(x), -1, self.subcenters).amax(-1)
        return cosines


def network_of(state: Mapping[str, Any]) -> Optional[NamedNetwork]:
    """The network that a checkpoint's state describes, without its weights; None for one of another arch.

    ValueError for options that cannot be.
    """
    model, saved = state["cfg"]["model"], state["task_state"]
    arch = name_of(state, "model")
    if (
        name_of(state, "task") != "speaker_id"
        or arch not in PRESETS
        or not isinstance(model, Mapping)
    ):
        return None
    given = {**PRESETS[arch], **model}
    names = [f.name for f in fields(NetworkOptions) if f.name in given]
    options = NetworkOptions(**{name: given[name] for name in names})
    head = given.get("head") or fitting_head(given.get("criterion") or name_of(state, "criterion"))
    classes = len(saved["speakers"])
    task = state["cfg"].get("task")
    speeds = speeds_of(isinstance(task, Mapping) and task.get("speed_classes"))
    return NamedNetwork(SpeakerNetwork(options, saved["spec"]["n_mels"], classes, head, speeds))


def speeds_of(speed_classes: Any) -> int:
    """How many speeds have classes of their own, by the option of the task."""
    return len(SPEEDS) if speed_classes else 1


def fitting_head(criterion: Optional[str]) -> str:
    """The head whose scores a criterion takes."""
    return "linear" if criterion == "softmax" else "cosine"


def front_end(o: NetworkOptions, n_mels: int) -> nn.Module:
    """The module that `NetworkOptions.front_end` names."""
    if o.front_end == "linear":
        return LinearFrontEnd(n_mels, o.d_model, o.frame_stack)
    if o.front_end != "conv":
        raise ValueError(f"unknown front_end {o.front_end!r}: known are linear, conv")
    if o.frame_stack != 1:
        raise ValueError("frame_stack belongs to the linear front end: give --front-end linear")
    return ConvFrontEnd(n_mels, o.d_model, o.front_channels)


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
