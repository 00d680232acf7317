"""The encoder against torchaudio's Conformer and torch's attention; dropout against binomials."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

from fairseq_ext.speaker.conformer import (
    ENCODERS,
    ConvolutionModule,
    Dropout,
    Encoder,
    EncoderOptions,
    MaskedBatchNorm,
    MultiHeadAttention,
    conformer,
)

pytestmark = pytest.mark.pairs

KERNEL = 7


def randomise(module):
    """Every parameter random, biases and norms too: zeros and ones hide what is done to padding."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def peer_and_ours(layers=3, dim=12, heads=3, ffn=20, seed=0):
    """torchaudio's Conformer with random weights and statistics, and ours with copies of them."""
    torch.manual_seed(seed)
    peer = randomise(torchaudio.models.Conformer(dim, heads, ffn, layers, KERNEL))
    for layer in peer.conformer_layers:
        norm = layer.conv_module.sequential[3]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    ours = conformer(
        d_model=dim,
        nhead=heads,
        d_ffn=ffn,
        layers=layers,
        dropout=0.0,
        kernel_size=KERNEL,
        conv_norm="batch",
    )
    for theirs, mine in zip(peer.conformer_layers, ours.blocks, strict=True):
        copy_layer(theirs, mine)
    return peer, ours


def copy_layer(theirs, mine):
    for a, b in ((theirs.ffn1, mine.ffn1), (theirs.ffn2, mine.ffn2)):
        b.norm.load_state_dict(a.sequential[0].state_dict())
        b.linear1.load_state_dict(a.sequential[1].state_dict())
        b.linear2.load_state_dict(a.sequential[4].state_dict())
    mine.attention.norm.load_state_dict(theirs.self_attn_layer_norm.state_dict())
    copy_attention(theirs.self_attn, mine.attention.attention)
    conv, (first, _, depthwise, norm, _, last, _) = mine.convolution, theirs.conv_module.sequential
    conv.norm_in.load_state_dict(theirs.conv_module.layer_norm.state_dict())
    with torch.no_grad():
        for a, b in (
            (first, conv.pointwise1),
            (depthwise, conv.depthwise),
            (last, conv.pointwise2),
        ):
            b.weight.copy_(a.weight.reshape(b.weight.shape))
            b.bias.copy_(a.bias)
    conv.norm.load_state_dict(norm.state_dict(), strict=False)
    mine.norm.load_state_dict(theirs.final_layer_norm.state_dict())


def copy_attention(theirs, mine):
    mine.in_proj.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    mine.out_proj.load_state_dict(theirs.out_proj.state_dict())


def mask_of(lengths, total=None):
    return torch.arange(total or max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("frames", [1, 2, KERNEL - 2, KERNEL, 30, 31])
@pytest.mark.parametrize("layers", [1, 3])
def test_equals_torchaudio_in_eval(frames, layers):
    peer, ours = peer_and_ours(layers)
    peer.eval(), ours.eval()
    x = torch.randn(2, frames, 12)
    expected, _ = peer(x, torch.tensor([frames, frames]))
    outputs = ours(x)
    assert len(outputs) == layers
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
    # the last but one block is what a peer of one layer less gives
    if layers > 1:
        peer.conformer_layers = peer.conformer_layers[:-1]
        shorter, _ = peer(x, torch.tensor([frames, frames]))
        torch.testing.assert_close(outputs[-2], shorter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 17])
@pytest.mark.parametrize("frames", [1, KERNEL - 3, 31])
def test_equals_torchaudio_in_training(frames, batch):
    """Dropout 0: outputs, gradients and the running statistics after two steps.

    Batches of 16 and more take another kernel for the linear layers.
    """
    peer, ours = peer_and_ours()
    peer.train(), ours.train()
    for _ in range(2):
        x = torch.randn(batch, frames, 12, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        expected, _ = peer(x, torch.full((batch,), frames))
        result = ours(y)[-1]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (result * weight).sum().backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    for theirs, mine in zip(peer.conformer_layers, ours.blocks, strict=True):
        conv, peers = mine.convolution, theirs.conv_module.sequential
        for a, b in (
            (conv.depthwise.weight, peers[2].weight),
            (conv.pointwise1.weight, peers[0].weight),
            (mine.ffn1.linear1.weight, theirs.ffn1.sequential[1].weight),
            (mine.attention.attention.in_proj.weight, theirs.self_attn.in_proj_weight),
        ):
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(
                a.grad.reshape(b.shape) / scale, b.grad / scale, rtol=1e-3, atol=1e-3
            )
        norm, copy = theirs.conv_module.sequential[3], mine.convolution.norm
        torch.testing.assert_close(copy.running_mean, norm.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(copy.running_var, norm.running_var, rtol=1e-4, atol=1e-4)


def test_torchaudio_depends_on_padding_and_ours_does_not():
    """The documented reason for an own Conformer (pytorch/audio #4205)."""
    peer, ours = peer_and_ours()
    peer.eval(), ours.eval()
    x = torch.randn(2, 40, 12)
    lengths = torch.tensor([40, 20])
    alone, _ = peer(x[1:, :20], lengths[1:])
    batched, _ = peer(x, lengths)
    assert (batched[1, :20] - alone[0]).abs().max() > 1e-2
    alone = ours(x[1:, :20])[-1]
    batched = ours(x, mask_of([40, 20]))[-1]
    torch.testing.assert_close(batched[1, :20], alone[0], rtol=1e-5, atol=1e-5)


def test_convolution_zeroes_padding_again_after_the_glu():
    """Its biases would refill the padding, and the depthwise convolution would carry it back."""
    torch.manual_seed(0)
    module = randomise(ConvolutionModule(8, KERNEL, 0.0)).eval()
    x = torch.randn(1, 20, 8)
    mask = mask_of([20], 20 + KERNEL)
    padded = F.pad(x, (0, 0, 0, KERNEL))
    torch.testing.assert_close(module(padded, mask)[:, :20], module(x), rtol=1e-5, atol=1e-6)
    assert (module(padded)[:, :20] - module(x)).abs().max() > 1e-2, "biases do leak without a mask"


def test_depthwise_convolution_is_a_one_dimensional_one():
    module = ConvolutionModule(6, 5, 0.0)
    x = torch.randn(2, 9, 6)
    expected = F.conv1d(
        x.transpose(1, 2),
        module.depthwise.weight.squeeze(2),
        module.depthwise.bias,
        padding=2,
        groups=6,
    ).transpose(1, 2)
    found = module.depthwise(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_attention_equals_torch(train, padded, dropout):
    """Both branches: the fused kernel, and the one that drops attention weights (here none)."""
    torch.manual_seed(0)
    peer = randomise(nn.MultiheadAttention(12, 3, batch_first=True)).train(train)
    ours = MultiHeadAttention(12, 3, dropout).train(train)
    copy_attention(peer, ours)
    x = torch.randn(3, 10, 12)
    mask = mask_of([10, 4, 1]) if padded else None
    expected, _ = peer(x, x, x, key_padding_mask=mask, need_weights=False)
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(ours(x, mask)[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_attention_dropout_drops_weights_not_outputs():
    """With identical values every undropped output is a multiple of 1 / (0.5 T)."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(4, 1, 0.5).train()
    with torch.no_grad():
        attention.in_proj.weight.zero_()
        attention.in_proj.bias[:] = torch.tensor([0.0] * 8 + [1.0] * 4)
        attention.out_proj.weight.copy_(torch.eye(4))
        attention.out_proj.bias.zero_()
    y = attention(torch.randn(50, 6, 4))[..., 0]
    torch.testing.assert_close(y * 3, (y * 3).round(), atol=1e-5, rtol=0)
    assert y.unique().numel() > 3, "the number of kept keys varies"
    assert abs(float(y.detach().mean()) - 1) < 0.1


@pytest.mark.parametrize("name", ENCODERS.names())
def test_padding_mask_means_true_is_padding(name):
    """Turned round, the mask hides the speech and shows the padding."""
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(d_model=8, nhead=2, d_ffn=8, layers=2, dropout=0.0, kernel_size=3)
    encoder.eval()
    x = torch.randn(1, 12, 8)
    mask = mask_of([8], 12)
    alone = encoder(x[:, :8])[-1]
    torch.testing.assert_close(encoder(x, mask)[-1][:, :8], alone, rtol=1e-5, atol=1e-5)
    assert (encoder(x, ~mask)[-1][:, :8] - alone).abs().max() > 1e-2


@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
@pytest.mark.parametrize("name", ENCODERS.names())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_what_the_padding_holds_changes_nothing(name, conv_norm, value):
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(
        d_model=8, nhead=2, d_ffn=8, layers=2, dropout=0.0, kernel_size=3, conv_norm=conv_norm
    )
    mask = mask_of([8, 5], 12)
    x = torch.randn(2, 12, 8)
    expected = encoder(x.masked_fill(mask[..., None], 0), mask)[-1][~mask]
    x = x.masked_fill(mask[..., None], value).requires_grad_()
    found = encoder(x, mask)
    assert all(layer.isfinite().all() for layer in found)
    assert torch.equal(found[-1][~mask], expected)
    found[-1][~mask].square().sum().backward()
    assert (x.grad[mask] == 0).all() and (x.grad[~mask] != 0).any()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("name", ENCODERS.names())
def test_longer_than_any_training_utterance(name):
    """7,193 frames, the longest of the course's data: nothing is tied to a largest length."""
    torch.manual_seed(0)
    encoder = ENCODERS.get(name)(d_model=4, nhead=1, d_ffn=4, layers=1, kernel_size=3).eval()
    x = torch.randn(1, 7193, 4)
    with torch.no_grad():
        assert encoder(x)[-1].isfinite().all()


def test_bad_sizes_are_refused_in_words():
    with pytest.raises(ValueError, match="d_model 10 is not a multiple of nhead 4"):
        conformer(d_model=10, nhead=4)
    with pytest.raises(ValueError, match="kernel_size 4 is even"):
        conformer(kernel_size=4)
    with pytest.raises(ValueError, match="'grop'.*layer, batch"):
        conformer(conv_norm="grop")
    with pytest.raises(ValueError, match="dropout 1.0"):
        conformer(dropout=1.0)
    assert EncoderOptions().kernel_size % 2 == 1


def test_layer_norm_is_the_default_and_keeps_no_statistics():
    assert not list(conformer(layers=1).buffers())
    assert isinstance(conformer(layers=1), Encoder)


class TestMaskedBatchNorm:
    def pair(self):
        torch.manual_seed(0)
        peer, ours = nn.BatchNorm1d(5), MaskedBatchNorm(5)
        randomise(peer)
        ours.load_state_dict(peer.state_dict(), strict=False)
        return peer, ours

    def test_equals_batch_norm_without_padding(self):
        peer, ours = self.pair()
        for _ in range(3):
            x = torch.randn(4, 7, 5) * 3 + 2
            expected = peer(x.transpose(1, 2)).transpose(1, 2)
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_mean, peer.running_mean)
        torch.testing.assert_close(ours.running_var, peer.running_var)
        peer.eval(), ours.eval()
        expected = peer(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)

    def test_padded_batch_equals_batch_norm_over_the_valid_frames(self):
        peer, ours = self.pair()
        x = torch.randn(3, 9, 5)
        mask = mask_of([9, 4, 1])
        x[mask] = 1e6
        x.requires_grad_()
        valid = x[~mask].detach().requires_grad_()
        result, expected = ours(x, mask)[~mask], peer(valid)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_mean, peer.running_mean)
        torch.testing.assert_close(ours.running_var, peer.running_var)
        weight = torch.randn_like(expected)
        (result * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad[~mask], valid.grad, rtol=1e-4, atol=1e-5)
        assert (x.grad[mask] == 0).all()

    def test_one_frame_in_all_is_refused(self):
        with pytest.raises(ValueError, match="at least 2 valid frames"):
            MaskedBatchNorm(5)(torch.randn(1, 1, 5))
        with pytest.raises(ValueError, match="at least 2 valid frames"):
            MaskedBatchNorm(5)(torch.randn(1, 3, 5), mask_of([1], 3))

    def test_evaluation_changes_no_statistics(self):
        ours = MaskedBatchNorm(5).eval()
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        ours(torch.randn(2, 4, 5))
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_trains_in_half_precision(self, dtype):
        """What --fp16 and --bf16 do to the module: parameters and buffers are converted."""
        ours = MaskedBatchNorm(5).to(dtype)
        x = torch.randn(3, 9, 5)
        y = ours(x.to(dtype), mask_of([9, 4, 1]))
        assert y.dtype == dtype and y.isfinite().all()
        reference = MaskedBatchNorm(5)
        expected = reference(x.to(dtype).float(), mask_of([9, 4, 1]))
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(
            ours.running_mean.float(), reference.running_mean, rtol=0.02, atol=0.02
        )


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
    def test_keeps_the_share_it_says_and_the_mean(self, p):
        torch.manual_seed(0)
        n = 1_000_003
        y = Dropout(p)(torch.ones(n))
        kept = int((y != 0).sum())
        # six standard deviations of the binomial: 2e-9
        assert abs(kept - n * (1 - p)) < 6 * math.sqrt(n * p * (1 - p)) + n * 2**-16
        scale = y[y != 0].unique()
        assert len(scale) == 1
        assert float(scale) == pytest.approx(1 / (1 - p), rel=1e-4)
        assert float(y.mean()) == pytest.approx(1, abs=0.01)

    def test_each_of_the_four_values_of_a_draw_is_fair_and_independent(self):
        torch.manual_seed(0)
        p, n = 0.3, 400_000
        kept = (Dropout(p)(torch.ones(n, 4)) != 0).double()
        bound = 6 * math.sqrt(p * (1 - p) / n)
        assert ((kept.mean(0) - (1 - p)).abs() < bound).all()
        correlation = torch.corrcoef(kept.T) - torch.eye(4)
        assert correlation.abs().max() < 6 / math.sqrt(n)

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_identity(self, p):
        x = torch.randn(5, 3)
        assert torch.equal(Dropout(p).eval()(x), x)
        assert torch.equal(Dropout(0.0).train()(x), x)

    def test_p_of_zero_and_evaluation_draw_no_random_numbers(self):
        state = torch.get_rng_state()
        Dropout(0.0)(torch.ones(9))
        Dropout(0.5).eval()(torch.ones(9))
        assert torch.equal(torch.get_rng_state(), state)

    def test_same_generator_state_same_mask(self):
        drop, x = Dropout(0.5), torch.ones(1001)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first, second = drop(x), drop(x)
        torch.set_rng_state(state)
        assert torch.equal(drop(x), first)
        assert not torch.equal(second, first)

    def test_gradient_goes_where_the_value_went(self):
        x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
        y = Dropout(0.4)(x)
        grad = torch.randn_like(x)
        y.backward(grad)
        scale = (y.detach() / x.detach()).max()
        assert torch.equal(x.grad != 0, y != 0)
        torch.testing.assert_close(x.grad, torch.where(y != 0, grad * scale, 0))

    def test_gradcheck(self):
        def seeded(x):
            torch.manual_seed(0)
            return Dropout(0.4)(x)

        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(seeded, (x,))

    @pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (5,), (2, 0, 3), (3, 7), ()])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_any_size_and_type(self, shape, dtype):
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        y = Dropout(0.5)(x)
        assert y.shape == x.shape and y.dtype == dtype
        assert set(y.detach().flatten().tolist()) <= {0.0, 2.0}
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())

    def test_non_contiguous_input(self):
        x = torch.randn(6, 5).T
        torch.manual_seed(0)
        y = Dropout(0.5)(x)
        torch.testing.assert_close(y[y != 0], 2 * x[y != 0])
        assert y.shape == x.shape

    def test_what_is_dropped_is_zero_whatever_it_was(self):
        x = torch.full((1000,), float("nan"))
        y = Dropout(0.5)(x)
        assert 300 < int((y == 0).sum()) < 700
        assert int(y.isnan().sum()) == 1000 - int((y == 0).sum())

    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, 1 - 1e-9, float("nan")])
    def test_impossible_p_is_refused(self, p):
        with pytest.raises(ValueError, match="dropout"):
            Dropout(p)
