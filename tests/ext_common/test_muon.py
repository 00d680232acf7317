"""Muon: what its polynomials do to singular values, PyTorch's own as oracle, which parameters it takes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.optim import FP16Optimizer
from omegaconf import OmegaConf

from ext_common import engine
from ext_common.cli import UserError
from ext_common.muon import (
    COEFFICIENTS,
    FairseqMuon,
    Muon,
    MuonConfig,
    mark_hidden,
    numbers_of,
    orthogonalised,
)

LEAST = {3: 0.0084, 4: 0.0021, 5: 0.0005}
TORCHS = [(3.4445, -4.7750, 2.0315)] * 5


def matrices(values, rows=48, columns=80, count=2):
    """Matrices (count, rows, columns) of given singular values, and their singular vectors."""
    u = torch.linalg.qr(torch.randn(count, rows, rows)).Q
    v = torch.linalg.qr(torch.randn(count, columns, columns)).Q[:, :, :rows]
    return (u * values) @ v.mT, u, v


@pytest.mark.parametrize("steps", COEFFICIENTS)
def test_the_polynomials_bring_an_interval_near_1(steps):
    x = np.geomspace(LEAST[steps], 1.02, 100_000)
    for a, b, c in COEFFICIENTS[steps]:
        x = a * x + b * x**3 + c * x**5
    assert 0.6 <= x.min() and x.max() <= 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps, decades", [(3, 1.5), (4, 2), (5, 2.8)])
def test_singular_values_are_near_1_and_vectors_stay(steps, decades, dtype):
    torch.manual_seed(1)
    x, u, v = matrices(torch.logspace(0, -decades, 48))
    # as small as gradients are
    made = orthogonalised((1e-4 * x).to(dtype), COEFFICIENTS[steps]).float()
    values = torch.linalg.svdvals(made)
    assert 0.6 <= values.min() and values.max() <= 1.3
    turned = u.mT @ made @ v
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-4 if dtype is torch.float32 else 0.15)


def test_a_matrix_of_rank_1_and_one_of_zeros_stay_what_they_are():
    x = torch.outer(torch.randn(16), torch.randn(24)).expand(2, 16, 24) * torch.tensor(
        [1.0, 0.0]
    ).view(2, 1, 1)
    exact = orthogonalised(x, COEFFICIENTS[4])
    assert torch.linalg.svdvals(exact[0])[1] < 0.01 and not exact[1].any()
    for made in (exact, orthogonalised(x.bfloat16(), COEFFICIENTS[4]).float()):
        assert 0.6 <= torch.linalg.svdvals(made[0])[0] <= 1.3


def test_it_is_torchs_muon_at_torchs_coefficients():
    """Momentum, scale, decay and batches, in torch's dtype, for matrices that lie either way."""
    torch.manual_seed(1)
    shapes = [(16, 16), (24, 16), (16, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    one = Muon(
        [(p, 1) for p in ours],
        [torch.nn.Parameter(torch.zeros(1))],
        coefficients=TORCHS,
        dtype=torch.bfloat16,
        norm="frobenius",
        **options,
    )
    two = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        # an update moves a value by 0.02 · 0.2 · sqrt(16) / sqrt(16) = 0.004 in the mean
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


def test_matrices_above_one_another_are_apart():
    """q, k and v in one weight move as three weights do."""
    torch.manual_seed(1)
    stacked = torch.nn.Parameter(torch.randn(24, 8))
    apart = [torch.nn.Parameter(part.clone()) for part in stacked.detach().chunk(3)]
    rest = [torch.nn.Parameter(torch.zeros(1))]
    stacked.grad = torch.randn(24, 8) * torch.logspace(0, 3, 24).unsqueeze(1)
    for p, grad in zip(apart, stacked.grad.chunk(3), strict=True):
        p.grad = grad
    Muon([(stacked, 3)], rest, lr=0.1).step()
    Muon([(p, 1) for p in apart], rest, lr=0.1).step()
    assert torch.equal(stacked, torch.cat(apart))


def test_a_convolution_is_a_matrix_however_it_lies_in_memory():
    torch.manual_seed(1)
    start, grad = torch.randn(2, 8, 4, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(start.clone(memory_format=layout))
        p.grad = grad.clone(memory_format=layout)
        Muon([(p, 1)], [torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()
        moved.append(p.detach() - start)
    torch.testing.assert_close(moved[0], moved[1])
    values = torch.linalg.svdvals(moved[0].view(8, 36)) / (0.1 * 0.2 * 36**0.5)
    assert 0.6 <= values.min() and values.max() <= 1.3


def test_the_rest_is_adams():
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(3, 4))
    q = torch.nn.Parameter(p.detach().clone())
    options = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.1}
    one = Muon([(torch.nn.Parameter(torch.zeros(2, 2)), 1)], [p], **options)
    two = torch.optim.AdamW([q], **options)
    for _ in range(3):
        p.grad = torch.randn(3, 4)
        q.grad = p.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.cell = torch.nn.LSTM(8, 8)
        self.conv = torch.nn.Conv2d(4, 8, 3)
        self.depthwise = torch.nn.Conv1d(8, 8, 3, groups=8)
        self.norm = torch.nn.LayerNorm(8)
        self.tied = torch.nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight
        self.score = torch.nn.Linear(8, 1)
        self.output_projection = torch.nn.Linear(8, 11)


def test_which_parameters_are_matrices_of_hidden_layers():
    net = Net()
    mark_hidden(net)
    found = {
        n: p.hidden_matrices for n, p in net.named_parameters() if hasattr(p, "hidden_matrices")
    }
    assert found == {
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
        "cell.weight_ih_l0": 4,
        "cell.weight_hh_l0": 4,
        "conv.weight": 1,
    }


def config(**options):
    return OmegaConf.structured(MuonConfig(lr=[0.01], **options))


@pytest.fixture
def trained(monkeypatch):
    """A model whose optimizer is being built."""
    net = Net()
    monkeypatch.setattr(engine, "_being_built", [engine.Trained(None, net)])
    return net


def test_copies_in_another_precision_are_known_by_their_order(trained):
    """As --bf16 hands them over; parameters of a criterion behind them are Adam's."""
    params = [p for p in trained.parameters() if p.requires_grad]
    copies = FP16Optimizer.build_fp32_params(None, params, flatten=False)
    assert not hasattr(copies[1], "hidden_matrices")
    assert numbers_of([*copies, torch.nn.Parameter(torch.zeros(3, 3))]) == [
        *(getattr(p, "hidden_matrices", 0) for p in params),
        0,
    ]
    assert sum(numbers_of(copies)) == 3 + 1 + 4 + 4 + 1


def test_a_flat_vector_is_refused(trained):
    params = [p for p in trained.parameters() if p.requires_grad]
    flat = torch.nn.Parameter(torch.cat([p.detach().view(-1) for p in params]))
    with pytest.raises(UserError, match="--fp16-no-flatten-grads"):
        FairseqMuon(config(), [flat])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"muon_steps": 9}, "--muon-steps 9 is none of 3, 4, 5"),
        ({"muon_momentum": 1.0}, "--muon-momentum 1"),
        ({"adam_betas": "(a, b)"}, "--adam-betas"),
    ],
)
def test_what_makes_no_sense_is_refused(trained, options, said):
    with pytest.raises(UserError, match=said):
        FairseqMuon(config(**options), trained.parameters())


def test_a_model_without_matrices_is_refused(monkeypatch):
    net = torch.nn.LayerNorm(3)
    monkeypatch.setattr(engine, "_being_built", [engine.Trained(None, net)])
    with pytest.raises(UserError, match="--optimizer adam"):
        FairseqMuon(config(), net.parameters())


def test_what_is_saved_goes_on_bit_for_bit():
    """With clipping, in bfloat16, and with today's options."""
    torch.manual_seed(1)
    net = SimpleNamespace(
        w=torch.nn.Parameter(torch.randn(8, 8)), b=torch.nn.Parameter(torch.zeros(8))
    )
    net.w.hidden_matrices = 1

    def optimizer(momentum=0.95):
        options = {"muon_dtype": "bfloat16", "muon_momentum": momentum, "weight_decay": 0.1}
        return FairseqMuon(config(**options), [net.w, net.b])

    def update(one, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in (net.w, net.b):
            p.grad = torch.randn(p.shape, generator=generator)
        one.clip_grad_norm(0.5)
        one.step()

    one = optimizer()
    update(one, 1)
    saved = copy.deepcopy((one.state_dict(), net.w.data, net.b.data))
    update(one, 2)
    ended = net.w.data.clone(), net.b.data.clone()
    two = optimizer(momentum=0.5)
    net.w.data, net.b.data = saved[1], saved[2]
    two.load_state_dict(saved[0], two.optimizer_config)
    assert two.param_groups[0]["momentum"] == 0.5
    two.load_state_dict(saved[0], one.optimizer_config)
    update(two, 2)
    assert torch.equal(net.w.data, ended[0]) and torch.equal(net.b.data, ended[1])
