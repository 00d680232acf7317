"""Conformer and Transformer encoders for speech features, in which padding does not exist.

The block is the macaron block of Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for
Speech Recognition", eq. (1), pre-norm and without positional encoding: the convolution gives order.
Conventions: frames are (B, T, C); a padding mask is bool (B, T), True where padded, or None where no frame
is padding (the fast path: training crops have one length).
"""

from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ext_common.registry import Registry
from fairseq_ext.speaker.kernels import DepthwiseConv, Dropout, Linear

ENCODERS = Registry("encoder")
CONV_NORMS = ("layer", "batch")


@dataclass
class EncoderOptions:
    d_model: int = field(default=112, metadata={"help": "width of the encoder"})
    nhead: int = field(default=4, metadata={"help": "attention heads"})
    d_ffn: int = field(default=256, metadata={"help": "width of the feed-forward layers"})
    layers: int = field(default=3, metadata={"help": "number of blocks"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in every sub-layer"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout on the attention weights"}
    )
    kernel_size: int = field(
        default=15, metadata={"help": "frames under the depthwise convolution, odd (conformer)"}
    )
    conv_norm: str = field(
        default="layer",
        metadata={
            "help": "normalisation inside the convolution module (conformer): layer, or batch"
            " (statistics over valid frames only)",
            "choices": list(CONV_NORMS),
        },
    )


class Encoder(nn.Module):
    """A stack of blocks: (B, T, C) and padding mask (B, T) or None → the outputs of all blocks.

    Padded frames are set to zero on entry, whatever they hold (NaN included), so that no gradient reaches
    them; the frames of each output at padded places are undefined but finite.
    """

    def __init__(self, blocks: List[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> List[Tensor]:
        outputs = []
        x = zero_padding(x, padding_mask)
        for block in self.blocks:
            x = block(x, padding_mask)
            outputs.append(x)
        return outputs


@ENCODERS.register("conformer", options=EncoderOptions)
def conformer(**options: Any) -> Encoder:
    """Conformer blocks: half feed-forward, self-attention, convolution, half feed-forward."""
    o = EncoderOptions(**options)
    return Encoder([ConformerBlock(o) for _ in range(o.layers)])


@ENCODERS.register("transformer", options=EncoderOptions)
def transformer(**options: Any) -> Encoder:
    """Pre-norm Transformer blocks: self-attention, feed-forward."""
    o = EncoderOptions(**options)
    return Encoder([TransformerBlock(o) for _ in range(o.layers)])


class ConformerBlock(nn.Module):
    """One macaron block (Gulati et al. 2020, eq. 1): (B, T, C) → (B, T, C)."""

    def __init__(self, o: EncoderOptions):
        super().__init__()
        self.ffn1 = FeedForward(o.d_model, o.d_ffn, o.dropout)
        self.attention = SelfAttention(o.d_model, o.nhead, o.dropout, o.attention_dropout)
        self.convolution = ConvolutionModule(o.d_model, o.kernel_size, o.dropout, o.conv_norm)
        self.ffn2 = FeedForward(o.d_model, o.d_ffn, o.dropout)
        self.norm = nn.LayerNorm(o.d_model)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = torch.add(x, self.ffn1(x), alpha=0.5)
        x = x + self.attention(x, padding_mask)
        x = x + self.convolution(x, padding_mask)
        x = torch.add(x, self.ffn2(x), alpha=0.5)
        out: Tensor = self.norm(x)
        return out


class TransformerBlock(nn.Module):
    """One pre-norm block (Vaswani et al. 2017; Xiong et al. 2020): (B, T, C) → (B, T, C)."""

    def __init__(self, o: EncoderOptions):
        super().__init__()
        self.attention = SelfAttention(o.d_model, o.nhead, o.dropout, o.attention_dropout)
        self.ffn = FeedForward(o.d_model, o.d_ffn, o.dropout)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = x + self.attention(x, padding_mask)
        out: Tensor = x + self.ffn(x)
        return out


class FeedForward(nn.Module):
    """LayerNorm, Linear, SiLU, Linear, each Linear followed by dropout. Frame by frame: no mask needed."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.linear1 = Linear(d_model, d_ffn)
        self.linear2 = Linear(d_ffn, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.silu(self.linear1(self.norm(x))))
        out: Tensor = self.dropout(self.linear2(hidden))
        return out


class SelfAttention(nn.Module):
    """LayerNorm, multi-head scaled dot-product attention over the valid frames, dropout."""

    def __init__(
        self, d_model: int, nhead: int, dropout: float = 0.0, attention_dropout: float = 0.0
    ):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, nhead, attention_dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        out: Tensor = self.dropout(self.attention(self.norm(x), padding_mask))
        return out


class MultiHeadAttention(nn.Module):
    """Scaled dot-product self-attention (Vaswani et al. 2017, eq. 1): (B, T, C) → (B, T, C).

    The weights are laid out as in `torch.nn.MultiheadAttention` (its `in_proj_weight` is `in_proj.weight`
    here). The weight of a padded key is 0.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float = 0.0):
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model {d_model} is not a multiple of nhead {nhead}")
        self.nhead = nhead
        self.in_proj = Linear(d_model, 3 * d_model)
        # matrices above one another, which Muon takes apart
        self.in_proj.stacked = 3  # type: ignore[assignment]
        self.out_proj = Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.in_proj(x).view(B, T, 3, self.nhead, -1).permute(2, 0, 3, 1, 4)
        keep = None if padding_mask is None else ~padding_mask[:, None, None, :]
        if torch.compiler.is_exporting():
            y = attention_of_products(q, k, v, padding_mask)
        elif self.training and self.dropout.p > 0:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if keep is not None:
                scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
            y = self.dropout(scores.softmax(-1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(B, T, C))
        return out

    def weights(self, x: Tensor) -> Tensor:
        """What each frame (dimension 2) takes from each (3), by head: (B, nhead, T, T), at least float32."""
        B, T, _ = x.shape
        q, k, _ = self.in_proj(x).view(B, T, 3, self.nhead, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights: Tensor = scores.softmax(-1)
        return weights


def attention_of_products(
    q: Tensor, k: Tensor, v: Tensor, padding_mask: Optional[Tensor]
) -> Tensor:
    """Scaled dot-product attention over (B, heads, T, D), for graphs: two products and a softmax.

    The mask is one more component of the keys, −1e9 where padded, beside a 1 of the queries: no pass over the
    (T, T) scores is spent on it. exp(−1e9) is 0 in float32.
    """
    q = q * q.shape[-1] ** -0.5
    if padding_mask is not None:
        far = padding_mask[:, None, :, None].to(k.dtype) * -1e9
        q = F.pad(q, (0, 1), value=1.0)
        k = torch.cat([k, far.expand(-1, k.shape[1], -1, -1)], -1)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class ConvolutionModule(nn.Module):
    """LayerNorm, pointwise, GLU, depthwise convolution, normalisation, SiLU, pointwise, dropout.

    Frames at padded places are zeroed after the GLU (its biases would refill them) so that the depthwise
    convolution sees past the end what it sees past the end of an utterance alone: zeros.
    """

    def __init__(self, d_model: int, kernel_size: int, dropout: float, norm: str = "layer"):
        super().__init__()
        self.norm_in = nn.LayerNorm(d_model)
        self.pointwise1 = Linear(d_model, 2 * d_model)
        self.depthwise = DepthwiseConv(d_model, kernel_size)
        if norm not in CONV_NORMS:
            raise ValueError(f"unknown conv_norm {norm!r}: known are {', '.join(CONV_NORMS)}")
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else MaskedBatchNorm(d_model)
        self.pointwise2 = Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        x = F.glu(self.pointwise1(self.norm_in(x)), -1)
        x = zero_padding(x, padding_mask)
        x = self.depthwise(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        x = self.norm(x) if isinstance(self.norm, nn.LayerNorm) else self.norm(x, padding_mask)
        out: Tensor = self.dropout(self.pointwise2(F.silu(x)))
        return out


class MaskedBatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) over the valid frames of (B, T, C) only.

    Without padding it equals `nn.BatchNorm1d`. There is no `num_batches_tracked`: an integer buffer breaks
    fairseq's EMA, and a fixed momentum does not need it.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        if padding_mask is None and x.dtype == self.weight.dtype:
            if self.training and x.numel() < 2 * x.shape[-1]:
                raise ValueError("batch normalisation needs at least 2 valid frames to train on")
            y = F.batch_norm(
                x.reshape(-1, x.shape[-1]),
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
            return y.view(x.shape)
        mean, var = self.running_mean, self.running_var
        if self.training:
            valid = (x if padding_mask is None else x[~padding_mask]).reshape(-1, x.shape[-1])
            valid = valid.to(torch.promote_types(x.dtype, torch.float32))
            n = len(valid)
            if n < 2:
                raise ValueError("batch normalisation needs at least 2 valid frames to train on")
            var, mean = torch.var_mean(valid, 0, correction=0)
            with torch.no_grad():
                # the buffers are in half precision under --fp16
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * (n / (n - 1))).to(self.running_var), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return x * scale.to(x.dtype) + (self.bias - mean * scale).to(x.dtype)


def zero_padding(x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """(B, T, C) with the frames where the mask (B, T) is True set to 0, and no gradient to them."""
    return x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(-1), 0)
