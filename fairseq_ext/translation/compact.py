"""What `--arch transformer_compact` changes in fairseq's Transformer, each part an option."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple, cast

import torch
import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

State = Optional[Dict[str, Dict[str, Optional[Tensor]]]]
Saved = Dict[str, Optional[Tensor]]

# Positions under the convolution.
WIDTH = 3
ROTARY_BASE = 10000.0
# What the cosine between a query and a key is multiplied by before anything is learned: a choice as sharp as
# e^10 among the tens of pieces of a sentence.
QK_SCALE = 10.0


@dataclass
class CompactOptions(FairseqDataclass):
    no_rotary: bool = field(
        default=False,
        metadata={
            "help": "positions are added to the embeddings; otherwise self-attention sees distances, by"
            " rotation (Su et al. 2021)"
        },
    )
    no_qk_norm: bool = field(
        default=False,
        metadata={
            "help": "attention multiplies queries and keys as they are; otherwise their directions, with a"
            " learned scale a head (Henry et al. 2020)"
        },
    )
    no_neighbours: bool = field(
        default=False,
        metadata={
            "help": "no depthwise convolution of width 3 after q, k and v of self-attention (So et al. 2021),"
            " which in the decoder is over what is written already"
        },
    )
    no_squared_relu: bool = field(
        default=False,
        metadata={"help": "ReLU between the feed-forward layers, not ReLU² (So et al. 2021)"},
    )
    no_zero_outputs: bool = field(
        default=False,
        metadata={"help": "attention and feed-forward do not start by adding nothing"},
    )
    no_bf16_matrices: bool = field(
        default=False,
        metadata={
            "help": "train in float32 throughout; otherwise a CPU that multiplies in bfloat16 does so with"
            " matrices, while weights, sums and validation stay float32"
        },
    )


class CompactAttention(MultiheadAttention):
    """fairseq's attention and its parameters, with the parts of `CompactOptions`.

    (T, B, C) → (T, B, C). Self-attention or attention to a source whose keys and values are computed once.
    causal: nothing behind a position is looked at, by mask and convolution. What comes out for a sentence
    does not depend on its padding.
    """

    def __init__(self, options: CompactOptions, causal: bool, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rotary = not options.no_rotary and self.self_attention
        self.causal = causal
        self.qk_scale = (
            nn.Parameter(torch.full((self.num_heads, 1, 1), QK_SCALE))
            if not options.no_qk_norm
            else None
        )
        self.taps = None
        if not options.no_neighbours and self.self_attention:
            taps = torch.zeros(WIDTH, 3 * self.embed_dim)
            taps[WIDTH - 1 if causal else WIDTH // 2] = 1.0
            self.taps = nn.Parameter(taps)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: State = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """As fairseq's; the weights are (B, T, S), or of each head (heads, B, T, S)."""
        saved: Saved = {}
        if incremental_state is not None:
            saved = self._get_input_buffer(incremental_state)
        if self.self_attention:
            q, k, v = self._of_itself(query, key_padding_mask, saved)
        else:
            q, k, v, key_padding_mask = self._of_source(query, key, key_padding_mask, saved)
        if incremental_state is not None:
            saved["prev_key"], saved["prev_value"] = k, v
            saved["prev_key_padding_mask"] = None if self.self_attention else key_padding_mask
            self._set_input_buffer(incremental_state, saved)
            if self.self_attention:
                # what is written has no padding in front, and behind it nothing is looked at
                key_padding_mask = None
        # the hypotheses of a sentence share its source: they are further rows of its queries
        steps, rows, (sentences, heads, _, width) = query.shape[0], query.shape[1], k.shape
        q = q.reshape(sentences, -1, heads, steps, width).transpose(1, 2)
        q = q.reshape(sentences, heads, -1, width)
        mask = mask_of(key_padding_mask, attn_mask, q)
        wanted = need_weights or need_head_weights
        drops = self.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if drops else 0.0
        y, weights = attend(q, k, v, mask, dropout, wanted)
        y = y.reshape(sentences, heads, -1, steps, width).permute(3, 0, 2, 1, 4)
        y = self.out_proj(y.reshape(steps, rows, -1))
        if weights is not None:
            weights = weights.reshape(sentences, heads, -1, steps, weights.shape[-1])
            weights = weights.transpose(0, 1).reshape(heads, rows, steps, -1)
            if not need_head_weights:
                weights = weights.mean(0)
        return y, weights

    def _of_itself(
        self, x: Tensor, padding: Optional[Tensor], saved: Saved
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, T, width) of (T, B, C), behind the keys and values that are saved."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        x = F.linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        if self.taps is not None:
            x = self._with_neighbours(x, padding, saved)
        x = x.view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        both, v = self._normed(x[:, :, :2]), rows_first(x[:, :, 2])
        before = saved.get("prev_key")
        if self.rotary:
            both = rotated(both, 0 if before is None else before.shape[2])
        q, k = self._scaled(rows_first(both[:, :, 0])), rows_first(both[:, :, 1])
        if before is not None:
            k, v = torch.cat([before, k], 2), torch.cat([cast(Tensor, saved["prev_value"]), v], 2)
        return q, k, v

    def _of_source(
        self,
        query: Tensor,
        key: Optional[Tensor],
        padding: Optional[Tensor],
        saved: Saved,
    ) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(query).unflatten(-1, heads)
        q = self._scaled(rows_first(self._normed(q)))
        if saved.get("prev_key") is not None:
            k, v = (cast(Tensor, saved[name]) for name in ("prev_key", "prev_value"))
            return q, k, v, saved["prev_key_padding_mask"]
        assert key is not None
        if self.beam_size > 1 and query.shape[1] == key.shape[1]:
            key = key[:, :: self.beam_size]
            padding = None if padding is None else padding[:: self.beam_size]
        weight = torch.cat([self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.k_proj.bias, self.v_proj.bias])
        k, v = F.linear(key, weight, bias).unflatten(-1, (2, *heads)).unbind(2)
        return q, rows_first(self._normed(k)), rows_first(v), padding

    def _with_neighbours(self, x: Tensor, padding: Optional[Tensor], saved: Saved) -> Tensor:
        """Σ_i taps[i] · x[t + i − centre] of (T, B, C), where padding and what is outside are 0."""
        assert self.taps is not None
        steps = x.shape[0]
        if not self.causal:
            if padding is not None:
                x = x.masked_fill(padding.T.unsqueeze(-1).to(torch.bool), 0.0)
            x = F.pad(x, (0, 0, 0, 0, WIDTH // 2, WIDTH // 2))
        else:
            before = saved.get("prev_neighbours")
            if before is None:
                x = F.pad(x, (0, 0, 0, 0, WIDTH - 1, 0))
            else:
                x = torch.cat([before.transpose(0, 1), x])
            # rows of the buffer are put in order with the keys
            saved["prev_neighbours"] = x[1 - WIDTH :].transpose(0, 1)
        taps = self.taps.to(x.dtype)
        y = x[:steps] * taps[0]
        for i in range(1, WIDTH):
            y = torch.addcmul(y, x[i : i + steps], taps[i])
        return y

    def _normed(self, x: Tensor) -> Tensor:
        """Queries or keys (…, width) of mean 0 and variance 1."""
        return x if self.qk_scale is None else F.layer_norm(x, x.shape[-1:])

    def _scaled(self, q: Tensor) -> Tensor:
        """Queries with the scale of the products in them."""
        if self.qk_scale is None:
            return cast(Tensor, q * self.scaling)
        return cast(Tensor, q * (self.qk_scale / self.head_dim).to(q.dtype))


def rows_first(x: Tensor) -> Tensor:
    """(T, B, heads, width) → (B, heads, T, width)."""
    return x.permute(1, 2, 0, 3)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], dropout: float, weighed: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """softmax(q kᵀ + mask) v of (B, heads, T, width), and the softmax where `weighed`."""
    # torch's fused attention is six times as slow in bfloat16 on a CPU, backward
    slow = q.dtype is torch.bfloat16 and q.device.type == "cpu"
    if not (weighed or slow):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=1.0), None
    products = q @ k.mT
    weights = torch.softmax((products if mask is None else products + mask).float(), dim=-1)
    y = F.dropout(weights.to(v.dtype), dropout) @ v
    return y, weights if weighed else None


def rotated(x: Tensor, start: int = 0) -> Tensor:
    """(T, …, width), each turned by its position start + t: pair (i, i + width/2) by t · 10000^(−2i/width).

    The product of two depends on the distance of their positions alone (Su et al. 2021, arXiv 2104.09864, eq.
    34).
    """
    half = x.shape[-1] // 2
    turns = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    places = torch.arange(start, start + len(x), device=x.device, dtype=torch.float32)
    angles = torch.outer(places, turns).view(len(x), *[1] * (x.dim() - 2), half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def mask_of(padding: Optional[Tensor], attn_mask: Optional[Tensor], q: Tensor) -> Optional[Tensor]:
    """What is added to the products, (B, 1, 1 or T, S): a padding mask (B, S), True = pad, and (T, S)."""
    added = None if attn_mask is None else attn_mask.to(q.dtype)[None, None]
    if padding is not None and bool(padding.any()):
        padded = torch.zeros(padding.shape, dtype=q.dtype, device=q.device)
        padded = padded.masked_fill(padding.to(torch.bool), float("-inf"))[:, None, None]
        added = padded if added is None else added + padded
    return added


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()
