"""The U-Net that looks at a noisy image and the timestep.

Residual blocks and attention as in Ho et al. 2020 (arXiv 2006.11239, appendix B), laid out so that every
weight has its counterpart in diffusers' `UNet2DModel` (see export.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, List, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass
class UNetOptions:
    base_channels: int = field(
        default=64, metadata={"help": "channels at full resolution, a multiple of 4"}
    )
    channel_mults: List[int] = field(
        default_factory=lambda: [1, 2, 2],
        metadata={
            "help": "channels of each resolution as multiples of --base-channels, e.g. 1,2,2"
        },
    )
    blocks: int = field(default=2, metadata={"help": "residual blocks a resolution"})
    attention_resolutions: List[int] = field(
        default_factory=lambda: [16],
        metadata={
            "help": "heights (pixels) at which every block attends; 0 for none. The middle always attends"
        },
    )
    head_channels: int = field(default=32, metadata={"help": "channels of an attention head"})
    dropout: float = field(default=0.0, metadata={"help": "inside residual blocks"})
    scale_shift: bool = field(
        default=False,
        metadata={
            "help": "the time embedding scales and shifts the second norm, instead of adding"
        },
    )


class UNet(nn.Module):
    """(B, C, H, W) and timesteps (B,), whole or not → (B, C_out, H, W).

    H and W that are no multiples of `divisor(options)` are padded with 0 on all sides, and the output is cut
    again; attention goes by the padded height. n_classes: labels 0 … n_classes − 1, and n_classes for
    none; condition_size: width of an augmentation condition, of which 0 means none. The output layer, the
    second convolution of each block and the output of attention start at 0.
    """

    def __init__(
        self,
        options: UNetOptions,
        in_channels: int,
        out_channels: int,
        height: int,
        n_classes: int = 0,
        condition_size: int = 0,
    ):
        super().__init__()
        self.options, self.n_classes, self.condition_size = options, n_classes, condition_size
        height = padded(height, options)
        widths = [options.base_channels * m for m in options.channel_mults]
        first, embedding = widths[0], 4 * widths[0]
        self.time_1, self.time_2 = nn.Linear(first, embedding), nn.Linear(embedding, embedding)
        self.label = nn.Embedding(n_classes + 1, embedding) if n_classes else None
        # no bias: the condition 0 of every sampled image leaves no trace
        self.condition = (
            nn.Linear(condition_size, embedding, bias=False) if condition_size else None
        )
        groups = norm_groups(options.base_channels)

        def residual(n_in: int, n_out: int) -> ResidualBlock:
            return ResidualBlock(
                n_in, n_out, embedding, groups, options.dropout, options.scale_shift
            )

        def stage(blocks: Iterable[tuple[int, int]], attends: bool) -> nn.ModuleList:
            heads = options.head_channels
            return nn.ModuleList(
                nn.ModuleList(
                    [
                        residual(i, o),
                        *([Attention(o, heads, groups)] if attends else []),
                    ]
                )
                for i, o in blocks
            )

        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        skips, width = [first], first
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(widths):
            attends = height >> level in options.attention_resolutions
            ins = [width] + [out] * (options.blocks - 1)
            self.down.append(stage([(i, out) for i in ins], attends))
            width = out
            skips += [out] * options.blocks
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(out, out, 3, stride=2, padding=1))
                skips.append(out)
        self.middle_1 = residual(width, width)
        self.middle_attention = Attention(width, options.head_channels, groups)
        self.middle_2 = residual(width, width)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            attends = height >> level in options.attention_resolutions
            ins = [w + skips.pop() for w in [width] + [out] * options.blocks]
            self.up.append(stage([(i, out) for i in ins], attends))
            width = out
            if level:
                self.grow.append(nn.Conv2d(out, out, 3, padding=1))
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = zeroed(nn.Conv2d(first, out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Optional[Tensor] = None,
        condition: Optional[Tensor] = None,
    ) -> Tensor:
        height, width = x.shape[-2:]
        x, top, left = self._padded(x.to(self.conv_in.weight.dtype))
        time = time_features(t, self.time_1.in_features).to(x.dtype)
        embedding = self.time_2(F.silu(self.time_1(time)))
        if self.label is not None:
            if label is None:
                label = torch.full_like(t, self.n_classes, dtype=torch.long)
            embedding = embedding + self.label(label)
        if self.condition is not None and condition is not None:
            embedding = embedding + self.condition(condition.to(x.dtype))
        embedding = F.silu(embedding)
        x = self.conv_in(x)
        if x.device.type == "cpu":
            # what follows keeps this layout, of which convolutions there make no copies
            x = x.contiguous(memory_format=torch.channels_last)
        skips = [x]
        blocks: Any  # to torch what a ModuleList holds is modules, whose lengths are not known
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = run(block, x, embedding)
                skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
                skips.append(x)
        x = self.middle_1(x, embedding)
        x = self.middle_2(self.middle_attention(x), embedding)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                x = run(block, torch.cat([x, skips.pop()], 1), embedding)
            if level < len(self.grow):
                x = self.grow[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out[..., top : top + height, left : left + width]

    def _padded(self, x: Tensor) -> tuple[Tensor, int, int]:
        """(x with all that the stages halve, where the image begins in it)."""
        height, width = x.shape[-2:]
        more = [padded(side, self.options) - side for side in (height, width)]
        if not any(more):
            return x, 0, 0
        top, left = (side // 2 for side in more)
        return F.pad(x, (left, more[1] - left, top, more[0] - top)), top, left


class ResidualBlock(nn.Module):
    """Two convolutions, the time embedding between them."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        embedding: int,
        groups: int,
        dropout: float,
        scale_shift: bool,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_1, self.conv_1 = nn.GroupNorm(groups, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(embedding, n_out * (2 if scale_shift else 1))
        self.norm_2 = nn.GroupNorm(groups, n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.shortcut = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """embedding: (B, E), already through its nonlinearity."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        time = self.time(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, 1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + time)
        out: Tensor = self.shortcut(x) + self.conv_2(self.dropout(F.silu(h)))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int, groups: int):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(pixels).view(b, -1, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        added: Tensor = self.out(attended).transpose(1, 2).view(b, c, height, width)
        return x + added


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention` of (B, heads, N, D); in float32 on a CPU.

    There the fused kernel takes 1.3 (256 pixels) to 4 times (64 pixels) as long in bfloat16.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def run(block: nn.ModuleList, x: Tensor, embedding: Tensor) -> Tensor:
    """A residual block, and its attention where it has one."""
    x = block[0](x, embedding)
    return block[1](x) if len(block) > 1 else x


def time_features(t: Tensor, size: int) -> Tensor:
    """cos and sin of t at size/2 frequencies from 1 to 1/10,000 (Vaswani et al. 2017), float32 (B, size)."""
    half = size // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) / half * steps)[None]
    return torch.cat([angles.cos(), angles.sin()], 1)


def norm_groups(channels: int) -> int:
    """Groups of every norm: at least 4 channels each, at most 32 groups."""
    return math.gcd(channels, min(32, max(1, channels // 4)))


def divisor(options: UNetOptions) -> int:
    """What height and width are padded to multiples of."""
    factor: int = 2 ** (len(options.channel_mults) - 1)
    return factor


def padded(side: int, options: UNetOptions) -> int:
    """Height or width in pixels, as the stages have it."""
    return -(-side // divisor(options)) * divisor(options)


def zeroed(layer: M) -> M:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
