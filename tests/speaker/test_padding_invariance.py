"""An utterance scores the same whatever is in its batch: each encoder, pooling, criterion."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fairseq_ext.speaker.conformer import ENCODERS
from fairseq_ext.speaker.margins import MARGINS
from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork
from fairseq_ext.speaker.pooling import POOLINGS

pytestmark = pytest.mark.pairs

MELS, CLASSES, KERNEL = 6, 5, 7
LENGTHS = [23, 11, 1]
TINY = dict(
    d_model=8,
    nhead=2,
    d_ffn=12,
    layers=2,
    kernel_size=KERNEL,
    dropout=0.0,
    embedding_dim=8,
    front_channels=3,
)

FRONTS = [
    dict(front_end="conv"),
    *(dict(front_end="linear", frame_stack=k) for k in (1, 2, 3)),
]

# Every encoder × pooling × criterion, and every other option that touches time with each encoder.
PARTS = [
    dict(encoder=e, pooling=p, criterion=c)
    for e, p, c in itertools.product(ENCODERS.names(), POOLINGS.names(), MARGINS.names())
]
REST = [
    dict(encoder=e, conv_norm=n, feature_norm=f, **front, pooled_layers=a)
    for e, n, f, front, a in itertools.product(
        ENCODERS.names(),
        ["layer", "batch"],
        ["none", "global", "utterance"],
        FRONTS,
        ["last", "all"],
    )
    if n == "layer" or e == "conformer"
]


def label(options):
    return "-".join(str(v) for v in options.values())


everything = pytest.mark.parametrize("options", PARTS + REST, ids=label)


class Case:
    """A network with random weights and biases, a batch, and the loss of it."""

    def __init__(self, options, lengths=LENGTHS, train=False):
        options = dict(options)
        self.loss = MARGINS.get(options.pop("criterion", "am_softmax"))
        head = "linear" if self.loss is MARGINS.get("softmax") else "cosine"
        torch.manual_seed(0)
        self.net = SpeakerNetwork(NetworkOptions(**{**TINY, **options}), MELS, CLASSES, head)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            self.net.feature_mean.fill_(-4)
            self.net.feature_std.fill_(1.5)
            for name, buffer in self.net.named_buffers():
                if "running_mean" in name:
                    buffer.normal_()
        self.net.train(train)
        self.lengths = lengths
        self.x = torch.randn(len(lengths), max(lengths), MELS) - 4
        self.mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        self.target = torch.arange(len(lengths)) % CLASSES

    def run(self, x, mask):
        """(scores, gradient of the input, gradients of the parameters, buffers) of one step."""
        self.net.zero_grad()
        buffers = {k: v.clone() for k, v in self.net.named_buffers()}
        x = x.clone().requires_grad_()
        logits = self.net(x, mask)["logits"]
        self.loss(logits, self.target[: len(x)], reduction="sum").backward()
        grads = {n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}
        after = {k: v.clone() for k, v in self.net.named_buffers()}
        self.net.load_state_dict(buffers, strict=False)
        return logits.detach(), x.grad, grads, after


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@everything
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_padding_gets_no_gradient_and_its_content_changes_nothing(options, train):
    case = Case(options, train=train)
    pad = case.mask[..., None]
    first = case.run(case.x.masked_fill(pad, 0), case.mask)
    for fill in (float("nan"), float("inf"), 1e9):
        logits, grad, grads, buffers = case.run(case.x.masked_fill(pad, fill), case.mask)
        assert (grad[case.mask] == 0).all()
        assert (grad[~case.mask] != 0).any()
        assert logits.isfinite().all() and grad.isfinite().all()
        assert torch.equal(logits, first[0]) and torch.equal(grad, first[1])
        for mine, theirs in ((grads, first[2]), (buffers, first[3])):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(v, theirs[k]) and v.isfinite().all() for k, v in mine.items())


@everything
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_alone_is_as_in_a_batch(options, train):
    if train and options.get("conv_norm") == "batch":
        pytest.skip("the statistics of a batch are those of its utterances")
    case = Case(options, train=train)
    together, grad, _, _ = case.run(case.x, case.mask)
    for i, n in enumerate(case.lengths):
        x = case.x[i : i + 1, :n].clone().requires_grad_()
        logits = case.net(x)["logits"]
        close(logits[0], together[i])
        case.loss(logits, case.target[i : i + 1], reduction="sum").backward()
        scale = max(1.0, float(x.grad.abs().max()))
        close(grad[i, :n] / scale, x.grad[0] / scale)


@everything
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_more_padding_changes_nothing(options, train):
    """Also in training with batch statistics: those, and the running ones, are of valid frames."""
    case = Case(options, train=train)
    # in float64, where nothing but the padding can make a difference of 1e-9
    case.net.double()
    case.x = case.x.double()
    first = case.run(case.x, case.mask)
    for more in (1, 7, 64):
        x = F.pad(case.x, (0, 0, 0, more), value=3.0)
        logits, grad, grads, buffers = case.run(x, F.pad(case.mask, (0, more), value=True))
        close(logits, first[0], 1e-9)
        close(grad[:, : case.x.shape[1]], first[1], 1e-7)
        for k, v in grads.items():
            close(v, first[2][k], 1e-7)
        for k, v in buffers.items():
            close(v, first[3][k], 1e-9)
            moved = train and "running" in k
            assert moved or torch.equal(v, dict(case.net.named_buffers())[k])


@pytest.mark.parametrize("encoder", ENCODERS.names())
@pytest.mark.parametrize("front", FRONTS, ids=label)
def test_every_length(encoder, front):
    """1 to 70 frames, across every boundary of stacks and kernel, beside a longer utterance."""
    lengths = [74, *range(1, 71)]
    case = Case(dict(encoder=encoder, **front), lengths)
    case.target = torch.zeros(len(lengths), dtype=torch.int64)
    with torch.no_grad():
        together = case.net(case.x, case.mask)["logits"]
        for i, n in enumerate(lengths):
            close(case.net(case.x[i : i + 1, :n])["logits"][0], together[i])


@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
def test_running_statistics_of_padded_and_of_bucketed_batches(conv_norm):
    """The same frames, once padded and once as one utterance each: same statistics."""
    case = Case(dict(encoder="conformer", conv_norm=conv_norm, layers=1), [20, 20, 20], train=True)
    none = case.run(case.x, None)
    padded = case.run(
        F.pad(case.x, (0, 0, 0, 17), value=100.0),
        F.pad(case.mask, (0, 17), value=True),
    )
    running = [k for k in none[3] if "running" in k]
    assert len(running) == (2 if conv_norm == "batch" else 0)
    for k in running:
        close(padded[3][k], none[3][k])
        assert not torch.equal(none[3][k], dict(case.net.named_buffers())[k])
    close(padded[0], none[0])


@pytest.mark.parametrize("options", REST, ids=label)
def test_a_mask_without_padding_is_no_mask(options):
    case = Case(options, [9, 9])
    with torch.no_grad():
        close(case.net(case.x, case.mask)["logits"], case.net(case.x)["logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoder", ENCODERS.names())
def test_autocast(encoder, dtype):
    case = Case(dict(encoder=encoder), train=True)
    pad = case.mask[..., None]
    with torch.autocast("cpu", dtype=dtype):
        expected = case.run(case.x.masked_fill(pad, 0), case.mask)
        found = case.run(case.x.masked_fill(pad, float("nan")), case.mask)
    assert torch.equal(found[0], expected[0])
    assert (found[1][case.mask] == 0).all() and found[1].isfinite().all()
    assert all(v.isfinite().all() for v in found[2].values())
