"""Poolings against closed forms, utterance by utterance, and against torch's attention."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_ext.speaker.pooling import (
    POOLINGS,
    SelfAttentionPooling,
    mean_and_std,
    softmax_over_time,
    uniform_weights,
    weighted_mean,
)

pytestmark = pytest.mark.pairs

DIM = 8
LENGTHS = [9, 4, 1]
BUILDS = [(name, None) for name in POOLINGS.names()] + [
    ("self_attentive", "nhead=4,hidden=5"),
    ("attentive_statistics", "per_channel=false"),
    ("self_attention", "nhead=1"),
]
both = pytest.mark.parametrize("name, options", BUILDS, ids=[f"{n}-{o}" for n, o in BUILDS])


def build(name, options=None, seed=0):
    torch.manual_seed(seed)
    pooling = POOLINGS.build(name, DIM, options=options)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return pooling


def batch(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), DIM, generator=generator)
    return x, torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def scores(pooling, frames):
    """The two-layer scorer by hand: (T, DIM) → (T, K)."""
    w1, b1, _, _ = (p.detach().double().numpy() for p in pooling.score.parameters())
    w2, b2 = (p.detach().double().numpy() for p in list(pooling.score.parameters())[2:])
    e = np.tanh(frames @ w1.T + b1) @ w2.T + b2
    a = np.exp(e - e.max(0))
    return a / a.sum(0)


def by_hand(pooling, name, frames):
    """What one utterance (T, DIM) pools to, float64."""
    if name == "mean":
        return frames.mean(0)
    if name == "statistics":
        return np.concatenate([frames.mean(0), np.sqrt(frames.var(0) + 1e-5)])
    a = scores(pooling, frames)
    if name == "self_attentive":
        share = DIM // a.shape[1]
        return np.concatenate(
            [a[:, h] @ frames[:, h * share : (h + 1) * share] for h in range(a.shape[1])]
        )
    mean = (a * frames).sum(0)
    return np.concatenate([mean, np.sqrt((a * (frames - mean) ** 2).sum(0) + 1e-5)])


@both
@pytest.mark.parametrize("masked", [True, False])
def test_closed_form(name, options, masked):
    if name == "self_attention":
        pytest.skip("compared with torch.nn.MultiheadAttention below")
    pooling = build(name, options)
    x, mask = batch()
    lengths = LENGTHS if masked else [max(LENGTHS)] * len(x)
    found = pooling(x, mask if masked else None)
    assert found.shape == (len(x), pooling.output_dim)
    for i, length in enumerate(lengths):
        expected = by_hand(pooling, name, x[i, :length].double().numpy())
        np.testing.assert_allclose(found[i].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nhead", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_self_attention_is_torch_attention_then_the_masked_mean(nhead, masked):
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(DIM, nhead, batch_first=True)
    nn.init.normal_(peer.in_proj_bias)
    nn.init.normal_(peer.out_proj.bias)
    pooling = SelfAttentionPooling(DIM, nhead)
    pooling.attention.in_proj.load_state_dict(
        {"weight": peer.in_proj_weight, "bias": peer.in_proj_bias}
    )
    pooling.attention.out_proj.load_state_dict(peer.out_proj.state_dict())
    x, mask = batch()
    y, _ = peer(x, x, x, key_padding_mask=mask if masked else None, need_weights=False)
    lengths = LENGTHS if masked else [max(LENGTHS)] * len(x)
    expected = torch.stack([y[i, :n].mean(0) for i, n in enumerate(lengths)])
    found = pooling(x, mask if masked else None)
    assert found.shape == (len(x), DIM)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # how much each frame counts: what the others attend to it, in the mean
    _, attended = peer(x, x, x, average_attn_weights=False)
    weights = pooling.frame_scores(x).softmax(1)
    torch.testing.assert_close(weights, attended.mean(2).transpose(1, 2), rtol=1e-5, atol=1e-6)


@both
def test_weights_sum_to_one_over_valid_frames_and_are_zero_on_padding(name, options):
    """Constant frames give themselves; a padded frame's share is exactly 0, not nearly."""
    x, mask = batch()
    weights = uniform_weights(x, mask)
    score = softmax_over_time(50 * torch.randn(3, max(LENGTHS), 4), mask)
    for w in (weights, score):
        torch.testing.assert_close(w.sum(1), torch.ones_like(w.sum(1)))
        assert (w[mask] == 0).all() and (w[~mask] >= 0).all()
    if name != "self_attention":
        constant = torch.randn(DIM).expand(3, max(LENGTHS), DIM)
        mean = build(name, options)(constant, mask)[:, :DIM]
        torch.testing.assert_close(mean, constant[:, 0])


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9, -1e30, 3.0])
def test_padding_has_no_influence_whatever_it_holds(name, options, value):
    """Result, gradients of the parameters and of the valid frames; none to the padding."""
    x, mask = batch()
    results = []
    for fill in (0.0, value):
        pooling = build(name, options)
        source = x.masked_fill(mask[..., None], fill).requires_grad_()
        y = pooling(source, mask)
        y.square().sum().backward()
        results.append([y.detach(), source.grad] + [p.grad for p in pooling.parameters()])
        assert (source.grad[mask] == 0).all()
        assert all(r.isfinite().all() for r in results[-1])
        assert source.grad[~mask].abs().sum() > 0
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@both
@pytest.mark.parametrize("more", [1, 7, 64])
def test_more_padding_changes_nothing(name, options, more):
    pooling = build(name, options)
    x, mask = batch()
    expected = pooling(x, mask)
    found = pooling(F.pad(x, (0, 0, 0, more), value=5.0), F.pad(mask, (0, more), value=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for i, length in enumerate(LENGTHS):
        alone = pooling(x[i : i + 1, :length])
        torch.testing.assert_close(alone[0], expected[i], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("masked", [True, False])
def test_one_frame(name, options, masked):
    """The unbiased deviation of one frame is NaN, and the root's gradient at 0 infinite."""
    pooling = build(name, options)
    x = torch.randn(2, 1, DIM, requires_grad=True)
    mask = torch.zeros(2, 1, dtype=torch.bool) if masked else None
    y = pooling(x, mask)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pooling.parameters())


@both
def test_utterance_without_frames_is_refused(name, options):
    x, mask = batch()
    mask[1] = True
    with pytest.raises(ValueError, match=r"utterances \[1\] of the batch have no valid frame"):
        build(name, options)(x, mask)


@both
def test_true_means_padding(name, options):
    pooling = build(name, options)
    x, mask = batch(lengths=[9, 4])
    alone = pooling(x[1:, :4])
    torch.testing.assert_close(pooling(x, mask)[1:], alone, rtol=1e-5, atol=1e-6)
    flipped = pooling(x[1:], ~mask[1:])
    assert (flipped - alone).abs().max() > 1e-2


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, options, dtype):
    """Squares of 300 overflow float16, sums over 3000 frames lose digits in bfloat16."""
    pooling = build(name, options)
    x = 300 + torch.randn(2, 3000, DIM)
    mask = torch.arange(3000) >= torch.tensor([3000, 1000])[:, None]
    x = x.to(dtype).masked_fill(mask[..., None], float("nan"))
    half = build(name, options).to(dtype)
    found = half(x, mask)
    assert found.dtype == dtype and found.isfinite().all()
    if not list(pooling.parameters()):  # the others' projections round as half precision does
        expected = pooling(x.float(), mask)
        torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.02)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name, options, dtype):
    pooling = build(name, options)
    x, mask = batch()
    x = x.masked_fill(mask[..., None], float("inf")).requires_grad_()
    expected = pooling(x, mask)
    with torch.autocast("cpu", dtype=dtype):
        found = pooling(x, mask)
        loss = found.float().square().sum()
    loss.backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert (x.grad[mask] == 0).all() and x.grad.isfinite().all()


@both
def test_gradcheck(name, options):
    pooling = build(name, options).double()
    x, mask = batch(lengths=[3, 1])
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooling(x, mask), (x,))


def test_deviation_of_a_large_mean_does_not_cancel():
    """E[x²] − mean² of values around 1e4 is noise in float32."""
    x = 1e4 + torch.tensor([-1.0, 1.0]).repeat(50)[None, :, None]
    std = mean_and_std(x, uniform_weights(x, None))[0, 1]
    assert float(std) == pytest.approx(1.0, rel=1e-3)


def test_weights_are_at_least_single_precision():
    x, mask = batch()
    assert uniform_weights(x.half(), mask).dtype == torch.float32
    assert uniform_weights(x.double(), mask).dtype == torch.float64
    assert softmax_over_time(x.bfloat16(), mask).dtype == torch.float32
    assert weighted_mean(x.half(), uniform_weights(x, mask)).dtype == torch.float32


def test_bad_options_are_refused_in_words():
    with pytest.raises(ValueError, match="not a multiple"):
        POOLINGS.build("self_attention", DIM, options="nhead=3")
    with pytest.raises(ValueError, match="not a multiple"):
        POOLINGS.build("self_attentive", DIM, options="nhead=3")
    with pytest.raises(ValueError, match="did you mean 'attentive_statistics'"):
        POOLINGS.build("attentive_statistic", DIM)
    with pytest.raises(ValueError, match="nheads"):
        POOLINGS.build("self_attention", DIM, options="nheads=2")
