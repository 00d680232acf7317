"""Dropout, linear layer and depthwise convolution that are quick on a CPU; elsewhere torch's own.

Same parameters, same values to rounding as `F.dropout`, `nn.Linear` and `nn.Conv2d`; how much each is
worth is measured by benchmarks/speaker.py.
"""

from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# with fewer frames a convolution is no quicker than a matrix product
MIN_FRAMES = 512
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014), drawing 16 random bits a value on a CPU.

    `F.dropout` draws a float a value there, which is a quarter of a Conformer's training step. p is
    rounded to a multiple of 2^-16.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1 - 2**-16:
            raise ValueError(f"dropout {p} is not in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        # inductor of torch 2.14 loses the size of one word that is seen as four
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        kept: Tensor = _BitDropout.apply(x, self.p)
        return kept

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Linear(nn.Linear):
    """`nn.Linear`, which over frames (B, T, C) on a CPU computes as a 1 × 1 convolution.

    oneDNN computes that with the widest vectors there are. The BLAS behind `F.linear` (MKL) has half its
    speed on the AMD EPYC with AVX-512 measured here, forward and backward; Intel was not measured.
    """

    def forward(self, x: Tensor) -> Tensor:
        # an exported graph has no branch on sizes, and its matrices are to be found by who quantises them
        if torch.compiler.is_exporting():
            return super().forward(x)
        enough = x.dim() == 3 and x.shape[0] * x.shape[1] >= MIN_FRAMES
        if not enough or not _plain_float_on_cpu(x, self.weight):
            return super().forward(x)
        # (B, C, 1, T) with C innermost in memory: nothing is copied, and the result has the layout of x
        image, weight = x.unsqueeze(1).permute(0, 3, 1, 2), self.weight[:, :, None, None]
        # dilation changes nothing in a filter of 1 × 1, but without it torch gives small batches on one
        # thread to the BLAS again
        y = F.conv2d(image, weight, self.bias, dilation=(2, 1))
        return y.permute(0, 2, 3, 1).squeeze(1)


class DepthwiseConv(nn.Conv2d):
    """'Same' convolution over time, a filter a channel: (B, C, 1, T) → (B, C, 1, T).

    2-D with a height of 1, and quickest with C innermost in memory (a view of frames (B, T, C)): on a CPU
    the 1-D kernel takes 2.5 times as long. Trained in float32 there, the gradient of its filters, most of
    the time of its step, is summed here and not by oneDNN.
    """

    def __init__(self, channels: int, kernel_size: int):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even; 'same' padding needs an odd one")
        super().__init__(
            channels, channels, (1, kernel_size), padding=(0, kernel_size // 2), groups=channels
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training and _plain_float_on_cpu(x, self.weight):
            y: Tensor = _Depthwise.apply(x, self.weight, self.bias)
            return y
        if x.device.type != "cpu":
            # the layout above is for CPUs: a GPU's kernel wants time innermost, and a dimension less
            x, weight = x.squeeze(2).contiguous(), self.weight.squeeze(2)
            reach = weight.shape[-1] // 2
            return F.conv1d(x, weight, self.bias, padding=reach, groups=len(weight)).unsqueeze(2)
        return super().forward(x)


class _BitDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 65536)
        keep = torch.empty(x.shape, dtype=torch.int8)
        torch.ge(random_bits(x.numel()).view(x.shape), dropped - 32768, out=keep)
        ctx.scale = 65536 / (65536 - dropped)
        ctx.save_for_backward(keep.neg_())
        return _masked(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return _masked(grad, ctx.saved_tensors[0], ctx.scale), None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=(0, weight.shape[-1] // 2), groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        channels, _, _, kernel = weight.shape
        reach = kernel // 2
        gx = F.conv2d(grad, weight.flip(-1), None, padding=(0, reach), groups=channels)
        # dL/dw[c, k] = Σ_b Σ_t x[b, c, t + k − reach] g[b, c, t]: the sum over b one utterance at a time,
        # so that what is added to stays in the cache; (kernel, T, C) in memory
        padded = F.pad(x.squeeze(2).transpose(1, 2), (0, 0, reach, reach))
        grad = grad.squeeze(2).transpose(1, 2)
        T = grad.shape[1]
        sums = x.new_zeros(kernel, T, channels)
        for frames, g in zip(padded.unbind(0), grad.unbind(0), strict=True):
            sums.addcmul_(frames.unfold(0, T, 1).transpose(1, 2), g)
        return gx, sums.sum(1).t().reshape(weight.shape), grad.sum((0, 1))


def random_bits(n: int) -> Tensor:
    """n int16 of uniform, independent bits from torch's generator."""
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:n]


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x · scale where `keep` is −1 (all bits set), 0 where it is 0, whatever x is there."""
    integers = INTEGERS[x.element_size()]
    return torch.bitwise_and(x.view(integers), keep).view(x.dtype).mul_(scale)


def _plain_float_on_cpu(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
