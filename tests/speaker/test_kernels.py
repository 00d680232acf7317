"""The quick kernels against torch's own: values and the gradient of every argument."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_ext.speaker.kernels import MIN_FRAMES, DepthwiseConv, Linear


def gradients(module, x, seed):
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape))
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().clamp_min(1)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-5, atol=1e-5)


# on both sides of MIN_FRAMES, of one utterance and many, not contiguous
SHAPES = [(1, 1), (3, 7), (1, MIN_FRAMES), (2, MIN_FRAMES), (17, 61), (64, 101)]


@pytest.mark.parametrize("batch, frames", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
def test_linear(batch, frames, bias, layout):
    torch.manual_seed(0)
    mine, theirs = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(batch, frames, 24)
    if layout == "transposed":
        x = torch.randn(batch, 24, frames).transpose(1, 2)
    elif layout == "expanded":
        x = torch.randn(1, frames, 24).expand(batch, frames, 24)
    assert_alike(gradients(mine, x, 1), gradients(theirs, x, 1))


@pytest.mark.parametrize("batch, frames", SHAPES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kernel", [1, 7, 31])
def test_depthwise_convolution(batch, frames, train, kernel):
    torch.manual_seed(0)
    mine = DepthwiseConv(12, kernel).train(train)
    theirs = nn.Conv2d(12, 12, (1, kernel), padding=(0, kernel // 2), groups=12)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(batch, frames, 12).transpose(1, 2).unsqueeze(2)
    assert_alike(gradients(mine, x, 1), gradients(theirs, x, 1))


def test_double_precision_and_autocast_take_torchs_own_way():
    torch.manual_seed(0)
    linear, x = Linear(24, 40), torch.randn(17, 61, 24)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert torch.equal(linear.double()(x.double()), expected)
    linear.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, F.linear(x, linear.weight, linear.bias))


def test_frozen_weights_get_no_gradient_and_the_input_does():
    layer = DepthwiseConv(12, 7).train().requires_grad_(False)
    x = torch.randn(3, 20, 12).transpose(1, 2).unsqueeze(2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
