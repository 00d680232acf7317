"""The network around encoder and pooling: normalisation, stacking, aggregation, sizes, purity."""

import copy

import pytest
import torch

from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork, normalise, stack_frames

MELS = 5
TINY = dict(d_model=8, nhead=2, d_ffn=12, layers=2, kernel_size=3, dropout=0.0, embedding_dim=6)


def network(classes=4, head="cosine", **options):
    torch.manual_seed(0)
    net = SpeakerNetwork(NetworkOptions(**{**TINY, **options}), MELS, classes, head)
    net.feature_mean.copy_(torch.linspace(-3, 0, MELS))
    net.feature_std.copy_(torch.linspace(1, 2, MELS))
    return net


def mask_of(lengths):
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def test_output():
    net = network()
    out = net(torch.randn(3, 10, MELS), mask_of([10, 5, 1]))
    assert set(out) == {"embedding", "logits"}
    assert out["embedding"].shape == (3, 6) and out["logits"].shape == (3, 4)
    assert out["logits"].abs().max() <= 1 + 1e-6
    linear = network(head="linear")
    linear.head.weight.data.mul_(100)
    assert linear(torch.randn(3, 10, MELS))["logits"].abs().max() > 1


@pytest.mark.parametrize("kind", ["none", "global", "utterance"])
def test_normalise_by_hand(kind):
    """The mean of an utterance is that of its own frames: padding is neither value nor count."""
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 7, MELS) - 5, [7, 3, 1]
    mean, std = torch.linspace(-6, -4, MELS), torch.linspace(1, 2, MELS)
    found = normalise(
        x.masked_fill(mask_of(lengths)[..., None], float("nan")), mask_of(lengths), kind, mean, std
    )
    for i, n in enumerate(lengths):
        expected = x[i, :n]
        if kind != "none":
            expected = (expected - mean) / std
        if kind == "utterance":
            expected = expected - expected.mean(0)
        torch.testing.assert_close(found[i, :n], expected, rtol=1e-5, atol=1e-5)
        assert (found[i, n:] == 0).all()
        alone = normalise(x[i : i + 1, :n], None, kind, mean, std)
        torch.testing.assert_close(alone[0], found[i, :n], rtol=1e-5, atol=1e-5)


def test_utterance_normalisation_removes_a_gain():
    net = network(feature_norm="utterance").eval()
    x = torch.randn(2, 20, MELS)
    gain = torch.randn(2, 1, MELS)
    torch.testing.assert_close(net(x)["logits"], net(x + gain)["logits"], rtol=1e-4, atol=1e-5)
    plain = network(feature_norm="global").eval()
    assert (plain(x)["logits"] - plain(x + gain)["logits"]).abs().max() > 1e-3


def test_global_normalisation_uses_the_buffers():
    net, plain = network().eval(), network(feature_norm="none").eval()
    x = torch.randn(2, 20, MELS)
    standard = (x - net.feature_mean) / net.feature_std
    torch.testing.assert_close(net(x)["logits"], plain(standard)["logits"])
    assert {"feature_mean", "feature_std"} <= set(net.state_dict())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_stacked_frames(n):
    """Every T from 1 to 70: ⌈T / n⌉ stacks, frames in order, zeros behind, mask to match."""
    for length in range(1, 71):
        x = torch.arange(1, length * 2 + 1).float().reshape(1, length, 2)
        y, mask = stack_frames(x, None, n)
        stacks = -(-length // n)
        assert y.shape == (1, stacks, 2 * n) and mask is None
        flat = y.reshape(-1, 2)
        assert torch.equal(flat[:length], x[0])
        assert (flat[length:] == 0).all()
        padded = torch.cat([x, torch.zeros(1, 9, 2)], 1)
        longer, mask = stack_frames(padded, mask_of([length, length + 9])[:1], n)
        assert int((~mask).sum()) == stacks
        assert longer.shape[1] == mask.shape[1] == -(-(length + 9) // n)
        assert torch.equal(longer[0, :stacks], y[0])
        assert (longer[0, stacks:] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 31])
def test_conv_front_end_has_half_the_frames_whatever_follows(length):
    """⌈T / 2⌉ frames, the same alone and before padding; each sees 7 frames around its own place."""
    torch.manual_seed(0)
    front = network(front_end="conv").input
    x = torch.randn(1, length, MELS, requires_grad=True)
    alone, mask = front(x, None)
    assert alone.shape == (1, -(-length // 2), 8) and mask is None
    padded = torch.cat([x.detach(), torch.zeros(1, 6, MELS)], 1)
    longer, mask = front(padded, mask_of([length, length + 6])[:1])
    assert int((~mask).sum()) == alone.shape[1]
    torch.testing.assert_close(longer[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)
    middle = alone.shape[1] // 2
    alone[0, middle].sum().backward()
    reached = x.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert reached == [t for t in range(length) if abs(t - 2 * middle) <= 3]


def test_aggregation_pools_all_blocks_side_by_side():
    net = network(pooled_layers="all", pooling="mean").eval()
    x = torch.randn(2, 9, MELS)
    layers = net.encoder(*net.input((x - net.feature_mean) / net.feature_std, None))
    assert len(layers) == 2
    pooled = net.encoder_norm(torch.cat(layers, -1)).mean(1)
    assert pooled.shape == (2, 16)
    expected = net.embedding(net.embedding_norm(pooled))
    torch.testing.assert_close(net(x)["embedding"], expected, rtol=1e-5, atol=1e-5)
    # both blocks count
    last = network(pooled_layers="last", pooling="mean").eval()
    assert last.pooling.output_dim == 8 and net.pooling.output_dim == 16


def test_embedding_dropout_is_before_the_class_weights_only():
    net = network(embedding_dropout=0.5).train()
    x = torch.randn(2, 9, MELS)
    a, b = net(x), net(x)
    assert torch.equal(a["embedding"], b["embedding"])
    assert not torch.equal(a["logits"], b["logits"])


@pytest.mark.parametrize("encoder", ["conformer", "transformer"])
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_evaluation_is_pure(encoder, conv_norm):
    """Twice the same, no buffer changed, no random number drawn, and so after save and load."""
    net = network(encoder=encoder, conv_norm=conv_norm, dropout=0.3, embedding_dropout=0.3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.train()
    net(torch.randn(4, 9, MELS))
    net.eval()
    x, mask = torch.randn(3, 12, MELS), mask_of([12, 5, 1])
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    first, second = net(x, mask), net(x, mask)
    assert torch.equal(state, torch.get_rng_state())
    other = network(encoder=encoder, conv_norm=conv_norm).eval()
    assert not torch.equal(other(x, mask)["logits"], first["logits"])
    other.load_state_dict(before)
    loaded = other(x, mask)
    for key in first:
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], loaded[key])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_order_in_the_batch_is_irrelevant():
    net = network().eval()
    x, mask = torch.randn(4, 12, MELS), mask_of([12, 7, 3, 1])
    order = torch.tensor([2, 0, 3, 1])
    expected = net(x, mask)["logits"][order]
    torch.testing.assert_close(net(x[order], mask[order])["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_half_precision_trains(convert, conv_norm):
    """--fp16 and --bf16 convert the whole network; the scores stay float32 cosines."""
    net = getattr(network(conv_norm=conv_norm, feature_norm="utterance"), convert)().train()
    x = (torch.randn(4, 12, MELS) - 10).to(net.input.linear.weight.dtype)
    logits = net(x, mask_of([12, 7, 3, 2]))["logits"]
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    assert net(x)["logits"].isfinite().all()


def test_bad_options_are_refused_in_words():
    for options, message in (
        (dict(feature_norm="utterrance"), "'utterrance'.*none, global, utterance"),
        (dict(encoder="conformr"), "did you mean 'conformer'"),
        (dict(pooling="atentive_statistics"), "did you mean 'attentive_statistics'"),
        (dict(conv_norm="group"), "'group'.*layer, batch"),
        (dict(frame_stack=0), "frame_stack"),
        (dict(frame_stack=2), "front end"),
        (dict(front_end="convolution"), "front_end"),
        (dict(pooled_layers="first"), "pooled_layers"),
        (dict(layers=0), "layers"),
        (dict(nhead=3), "nhead"),
    ):
        with pytest.raises(ValueError, match=message):
            network(**options)
