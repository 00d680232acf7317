"""The U-Net: what it starts as, sizes, embeddings, precision. Equal to diffusers' in test_export.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_ext.model import check_options
from diffusion_ext.unet import (
    Attention,
    ResidualBlock,
    UNet,
    UNetOptions,
    attention,
    divisor,
    norm_groups,
    time_features,
)
from ext_common.cli import UserError

TINY = dict(base_channels=8, channel_mults=[1, 2], blocks=1, head_channels=4)


def net(in_channels=1, out_channels=1, height=8, n_classes=0, condition_size=0, seed=0, **options):
    """A U-Net whose every weight is moved, so that nothing hides behind an output of 0."""
    torch.manual_seed(seed)
    made = UNet(
        UNetOptions(**{**TINY, **options}),
        in_channels,
        out_channels,
        height,
        n_classes,
        condition_size,
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.5 / math.sqrt(weight[0].numel()) * torch.randn_like(weight))
    return made.eval().requires_grad_(False)


def images(n=3, channels=1, height=8, width=8, seed=1):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width, generator=source)


T = torch.tensor([0, 40, 999])


# --- beginnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_new_network_says_0_and_its_blocks_change_nothing(scale_shift):
    torch.manual_seed(0)
    made = UNet(
        UNetOptions(**TINY, scale_shift=scale_shift), 3, 3, 8, n_classes=4, condition_size=2
    )
    x = images(channels=3)
    found = made(x, T, torch.tensor([0, 1, 4]), torch.ones(3, 2))
    assert found.shape == x.shape and (found == 0).all()
    y, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    block = ResidualBlock(8, 8, embedding=32, groups=2, dropout=0.0, scale_shift=scale_shift)
    assert torch.equal(block(y, embedding), y)
    assert torch.equal(Attention(8, 4, 2)(y), y)


def test_a_new_network_learns_at_once():
    """The output layer has a gradient, and after one step of it all that stands before has one too."""
    torch.manual_seed(0)
    made = UNet(UNetOptions(**TINY), 1, 1, 8, n_classes=3, condition_size=2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    reached = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (made(images(), T, torch.tensor([0, 1, 2]), torch.ones(3, 2)) - 1).square().mean()
        loss.backward()
        reached.append({n for n, p in made.named_parameters() if p.grad.abs().max() > 0})
        optimizer.step()
    assert reached[0] == {"conv_out.weight", "conv_out.bias"}
    # what a key adds to every score of a query cancels in the softmax
    missing = {n for n, _ in made.named_parameters()} - reached[-1]
    assert all(name.endswith("key.bias") for name in missing), missing


# --- sizes ----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    mults=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    ins=st.integers(1, 4),
    outs=st.integers(1, 6),
    level=st.integers(0, 2),
    scale_shift=st.booleans(),
)
def test_any_multiple_of_the_divisor_keeps_its_size(
    mults, blocks, rows, columns, ins, outs, level, scale_shift
):
    """Non-square too, attending at one of its resolutions."""
    options = UNetOptions(4, mults, blocks, scale_shift=scale_shift)
    height, width = rows * divisor(options), columns * divisor(options)
    options.attention_resolutions = [height >> level]
    made = UNet(options, ins, outs, height).eval()
    nn.init.normal_(made.conv_out.weight)
    with torch.no_grad():
        found = made(images(2, ins, height, width), torch.tensor([3, 500]))
    assert found.shape == (2, outs, height, width) and found.isfinite().all()
    assert (found != 0).any()


@pytest.mark.parametrize("height, width", [(17, 50), (5, 9), (8, 11), (6, 6)])
def test_any_other_size_is_padded_and_cut_again(height, width):
    """Equal to the same network on the image with zeros around it; attention goes by the padded height."""
    made = UNet(UNetOptions(4, [1, 2, 2], 1, [-(-height // 4)]), 1, 1, height).eval()
    assert len(made.down[2][0]) == 2, "it attends at the padded height"
    nn.init.normal_(made.conv_out.weight)
    x, t = images(2, 1, height, width), torch.tensor([3, 500])
    more = [-height % 4, -width % 4]
    top, left = more[0] // 2, more[1] // 2
    around = F.pad(x, (left, more[1] - left, top, more[0] - top))
    with torch.no_grad():
        expected = made(around, t)[..., top : top + height, left : left + width]
        assert torch.equal(made(x, t), expected)
    # what lies outside of the image has no part in a loss
    made(x, t).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_divisor():
    assert [divisor(UNetOptions(channel_mults=[1] * n)) for n in (1, 2, 3, 4)] == [1, 2, 4, 8]


def test_attention_stands_where_it_is_asked_for():
    def count(resolutions, height=16):
        made = net(height=height, channel_mults=[1, 1, 2], attention_resolutions=resolutions)
        return sum(isinstance(module, Attention) for module in made.modules())

    # one block down and two up at each resolution, and always the middle
    assert count([]) == count([0]) == 1
    assert count([16]) == count([8]) == count([4]) == 4
    assert count([16, 4]) == 7
    assert count([16], height=32) == 4 and count([32], height=16) == 1


@pytest.mark.parametrize("scale_shift", [False, True])
def test_convolutions_on_a_cpu_get_and_give_channels_last(scale_shift):
    made = net(height=16, channel_mults=[1, 2], attention_resolutions=[16], scale_shift=scale_shift)
    seen = []

    def see(layer, arguments, output):
        both = [t.is_contiguous(memory_format=torch.channels_last) for t in (*arguments, output)]
        seen.append(both)

    *inner, _ = (m for m in made.modules() if isinstance(m, nn.Conv2d) and m is not made.conv_in)
    for layer in inner:
        layer.register_forward_hook(see)
    # gray, where one layout cannot be told from the other
    made(images(height=16, width=16), T)
    assert len(seen) == len(inner) and all(map(all, seen))


def test_number_of_weights_of_ddpm_cifar():
    """Ho et al. 2020 have 35.7 M: 128 channels, (1, 2, 2, 2), two blocks, attention at 16."""
    with torch.device("meta"):
        made = UNet(UNetOptions(128, [1, 2, 2, 2], 2, [16]), 3, 3, 32)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(35.7e6, abs=0.1e6)


# --- embeddings -----------------------------------------------------------------------------------


@given(t=st.lists(st.integers(0, 4000), min_size=1, max_size=5), half=st.integers(1, 32))
def test_time_features(t, half):
    """cos and sin of t / 10000^(i / half)."""
    found = time_features(torch.tensor(t), 2 * half)
    angles = np.array(t, dtype=np.float64)[:, None] / 10_000 ** (np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    # float32 angles of up to 4,000 are off by 2.4e-4
    np.testing.assert_allclose(found, expected, atol=5e-4 if max(t) else 0)
    assert found.dtype == torch.float32 and found.shape == (len(t), 2 * half)


def test_time_features_as_diffusers():
    reason = "diffusers is not installed"
    peer = pytest.importorskip("diffusers.models.embeddings", reason=reason)
    t = torch.arange(1000)
    expected = peer.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_features(t, 64), expected, rtol=0, atol=1e-4)


def test_what_blocks_are_told_is_time_label_and_condition_together():
    made, seen = net(n_classes=3, condition_size=2), []
    made.middle_1.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[1]))
    label, condition = torch.tensor([0, 3, 1]), torch.randn(3, 2)
    made(images(), T, label, condition)
    h = made.time_1(time_features(T, 8))
    h = made.time_2(h * torch.sigmoid(h)) + made.label.weight[label]
    h = h + condition @ made.condition.weight.T
    torch.testing.assert_close(seen[0], h * torch.sigmoid(h), rtol=1e-5, atol=1e-6)


def test_timesteps_are_told_apart_and_belong_to_their_image():
    made, x = net(), images(1).expand(3, 1, 8, 8)
    found = made(x, T)
    assert (found[0] - found[1]).abs().max() > 1e-3 and (found[1] - found[2]).abs().max() > 1e-3
    swapped = made(x, T.flip(0))
    torch.testing.assert_close(swapped.flip(0), found, rtol=1e-4, atol=1e-5)


def test_no_label_is_the_last_index():
    """None is n_classes for all; a hidden label in a batch is the same as None for that image."""
    made, x = net(n_classes=3), images()
    none = made(x, T)
    assert torch.equal(none, made(x, T, torch.tensor([3, 3, 3])))
    mixed = made(x, T, torch.tensor([0, 3, 2]))
    torch.testing.assert_close(mixed[1], none[1], rtol=1e-4, atol=1e-5)
    for k in (0, 2):
        assert (mixed[k] - none[k]).abs().max() > 1e-3
    with pytest.raises(IndexError):
        made(x, T, torch.tensor([0, 4, 2]))


def test_labels_mean_nothing_to_a_network_without_classes():
    made, x = net(), images()
    assert made.label is None and torch.equal(made(x, T, torch.tensor([0, 1, 2])), made(x, T))


def test_condition_0_is_none_exactly():
    """Sampling gives none, training gives 0 for an image that was not changed: one and the same."""
    made, x = net(condition_size=4), images()
    none = made(x, T)
    assert torch.equal(made(x, T, None, torch.zeros(3, 4)), none)
    condition = torch.zeros(3, 4)
    condition[1, 2] = 1
    found = made(x, T, None, condition)
    assert (found[1] - none[1]).abs().max() > 1e-3
    torch.testing.assert_close(found[[0, 2]], none[[0, 2]], rtol=1e-4, atol=1e-5)
    half = condition.double()  # the dtype of a condition is nobody's business
    assert torch.equal(made(x, T, None, half), found)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}, {"attention_resolutions": [8, 4]}])
def test_an_image_does_not_see_the_others(options):
    made = net(n_classes=3, condition_size=2, **options)
    x, label, condition = images(), torch.tensor([0, 3, 1]), torch.randn(3, 2)
    whole = made(x, T, label, condition)
    for k in range(3):
        alone = made(*(part[k : k + 1] for part in (x, T, label, condition)))
        torch.testing.assert_close(alone[0], whole[k], rtol=1e-4, atol=1e-5)
    x[0] = float("nan")
    assert not made(x, T, label, condition)[1:].isnan().any()


def test_dropout_only_in_training():
    made, x = net(dropout=0.5), images()
    assert torch.equal(made(x, T), made(x, T))
    made.train()
    assert not torch.allclose(made(x, T), made(x, T))


# --- blocks against plain formulae ----------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("n_out", [8, 12])
def test_residual_block_by_hand(scale_shift, n_out):
    torch.manual_seed(0)
    block = ResidualBlock(8, n_out, embedding=16, groups=2, dropout=0.0, scale_shift=scale_shift)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, embedding = torch.randn(3, 8, 5, 6), torch.randn(3, 16)

    def norm(layer, h):
        parts = h.view(len(h), 2, -1)
        mean, var = parts.mean(2, keepdim=True), parts.var(2, unbiased=False, keepdim=True)
        h = ((parts - mean) / (var + 1e-5).sqrt()).view_as(h)
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h / (1 + torch.exp(-h))

    h = block.conv_1(silu(norm(block.norm_1, x)))
    time = (embedding @ block.time.weight.T + block.time.bias)[:, :, None, None]
    if scale_shift:
        h = norm(block.norm_2, h) * (1 + time[:, :n_out]) + time[:, n_out:]
    else:
        h = norm(block.norm_2, h + time)
    expected = block.conv_2(silu(h)) + (x if n_out == 8 else block.shortcut(x))
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-4, atol=1e-5)


def by_softmax(q, k, v):
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).double()
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return (weights @ v.double()).to(v.dtype)


@pytest.mark.parametrize("heads, n, d", [(1, 7, 4), (3, 16, 8), (2, 1, 5)])
def test_attention_is_the_softmax_formula(heads, n, d):
    q, k, v = (
        torch.randn(2, heads, n, d, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    torch.testing.assert_close(attention(q, k, v), by_softmax(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_gives_back_the_type_it_got(dtype):
    """Computed in float32: the result is the float32 one, rounded once."""
    q, k, v = (
        torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i in range(3)
    )
    found = attention(q, k, v)
    assert found.dtype == dtype
    assert torch.equal(found, attention(q.float(), k.float(), v.float()).to(dtype))


@pytest.mark.parametrize("head_channels, heads", [(4, 3), (12, 1), (100, 1), (5, 2)])
def test_attention_layer_as_torch(head_channels, heads):
    """nn.MultiheadAttention over the pixels of a normed image, added to it."""
    torch.manual_seed(0)
    ours, peer = Attention(12, head_channels, 3), nn.MultiheadAttention(12, heads, batch_first=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        layers = (ours.query, ours.key, ours.value)
        peer.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        peer.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    peer.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 12, 3, 5)
    pixels = ours.norm(x).flatten(2).transpose(1, 2)
    expected = x + peer(pixels, pixels, pixels)[0].transpose(1, 2).view_as(x)
    assert ours.heads == heads
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@given(channels=st.integers(1, 512))
def test_norm_groups_divide_the_channels_of_every_resolution(channels):
    groups = norm_groups(channels)
    assert channels % groups == 0 and 1 <= groups <= 32
    assert channels < 4 or channels // groups >= 4
    if channels % 4 == 0:
        assert groups == math.gcd(channels, min(32, channels // 4))


# --- precision --------------------------------------------------------------------------------------


def test_bf16_autocast_is_near_float32():
    made, x = net(channel_mults=[1, 2, 2], base_channels=16, n_classes=3), images(3, 1, 16, 16)
    full = made(x, T)
    with torch.autocast("cpu", torch.bfloat16):
        half = made(x, T)
    error = (half.float() - full).square().mean().sqrt() / full.std()
    assert 1e-5 < error < 0.03  # of a number, 2^-9 is lost at each of some thirty layers


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_networks_of_another_type_compute_on_a_cpu(dtype, tolerance):
    """`--bf16` and `--fp16` of fairseq convert the network, not its input."""
    made, x = net(n_classes=3, condition_size=2, attention_resolutions=[8, 4]), images()
    full = made(x, T, None, torch.ones(3, 2))
    half = made.to(dtype)(x, T, None, torch.ones(3, 2))
    assert half.dtype == dtype
    assert (half.float() - full).square().mean().sqrt() / full.std() < tolerance


def test_float64_is_float32_with_more_digits():
    made, x = net(), images()
    full = made(x, T)
    torch.testing.assert_close(made.double()(x, T).float(), full, rtol=1e-3, atol=1e-4)


# --- what cannot be built -------------------------------------------------------------------------


class Cfg:
    ema_half_life, ema_ramp_up, ema_snapshots = [100.0], 0.05, 0


@pytest.mark.parametrize(
    "options, height, width, said",
    [
        (dict(base_channels=6), 8, 8, "--base-channels is a multiple of 4"),
        (dict(base_channels=0), 8, 8, "--base-channels is a multiple of 4"),
        (dict(blocks=0), 8, 8, "--blocks is at least 1"),
        (dict(channel_mults=[]), 8, 8, "--channel-mults"),
        (dict(channel_mults=[1, 0]), 8, 8, "--channel-mults"),
        (dict(base_channels=8, head_channels=3), 8, 8, "--head-channels 3 does not divide the 16"),
        (dict(dropout=1.0), 8, 8, "--dropout 1.0"),
        (dict(channel_mults=[1, 1, 1]), 2, 8, "images of 2 × 8 are too small .* 3 resolutions"),
    ],
)
def test_refused_in_words(options, height, width, said):
    with pytest.raises(UserError, match=said) as caught:
        check_options(UNetOptions(**options), Cfg, height, width)
    assert "\n" not in str(caught.value)


@settings(max_examples=25)
@given(
    base=st.integers(1, 16).map(lambda n: 4 * n),
    mults=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    head=st.integers(1, 40),
)
def test_whatever_is_not_refused_is_built(base, mults, head):
    """The other way round to the test above: no crash beyond the checks."""
    options = UNetOptions(base, mults, 1, [8, 4], head)
    try:
        check_options(options, Cfg, 8, 8)
    except UserError:
        return
    with torch.device("meta"):
        made = UNet(options, 1, 1, 8)
        assert made(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)).shape == (1, 1, 8, 8)


def test_the_network_of_the_faces_takes_what_its_recipe_estimates_from(repo_root):
    """34 GFLOP an image forward; a training is three times as much for each image."""
    from torch.utils.flop_counter import FlopCounterMode

    recipe = yaml.safe_load((repo_root / "configs/diffusion/faces64.yaml").read_text())
    known = UNetOptions.__dataclass_fields__.keys()
    options = UNetOptions(**{k: v for k, v in recipe["model"].items() if k in known})
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(options, 3, 3, 64, 0, 0)(torch.empty(2, 3, 64, 64), torch.zeros(2).long(), None, None)
    each = counter.get_total_flops() / 2
    images = recipe["dataset"]["batch_size"] * recipe["optimization"]["max_update"]
    assert each == pytest.approx(34e9, rel=0.02)
    assert 3 * each * images == pytest.approx(3.9e18, rel=0.02)
    assert 3 * each * images / 100e12 / 3600 == pytest.approx(11, rel=0.02)
