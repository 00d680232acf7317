"""Margin losses against formulas written out by hand in numpy, angle by angle."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_ext.speaker.margins import MARGINS, aam_softmax, am_softmax, margin_at, softmax
from fairseq_ext.speaker.network import Head

LOSSES = {"am_softmax": am_softmax, "aam_softmax": aam_softmax}


def by_hand(cosines, labels, s, m, kind, topk=0, inter_m=0.0):
    """−log softmax of the margined scores, one utterance and one class at a time, in float64."""
    losses = []
    for row, label in zip(np.asarray(cosines, dtype=np.float64), labels, strict=True):
        scores = []
        others = sorted((j for j in range(len(row)) if j != label), key=lambda j: -row[j])
        for j, cos in enumerate(row):
            if j in others[:topk]:
                aam = math.cos(math.acos(cos) - inter_m)
                cos = cos + inter_m if kind == "am_softmax" else aam
            if j == label and kind == "am_softmax":
                cos = cos - m
            elif j == label and kind == "aam_softmax":
                theta = math.acos(min(1.0, max(-1.0, cos)))
                if theta + m <= math.pi:
                    cos = math.cos(theta + m)
                else:
                    cos = cos - (1 - math.cos(m))
            scores.append(s * cos)
        top = max(scores)
        losses.append(top + math.log(sum(math.exp(v - top) for v in scores)) - scores[label])
    return np.array(losses)


def margined_target(loss, cos, s, m):
    """The score of the target that a loss used: solved for from a two-class problem.

    With one other class of score 0 the loss is log(1 + e^(−target)).
    """
    logits = torch.stack([cos, torch.zeros_like(cos)], 1)
    value = loss(logits, torch.zeros(len(cos), dtype=torch.int64), s=s, m=m, reduction="none")
    return -torch.log(torch.expm1(value)) / s


def some_cosines(n=40, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    cosines = torch.tensor(rng.uniform(-1, 1, (n, classes)))
    return cosines, torch.tensor(rng.integers(0, classes, n))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("s, m", [(30.0, 0.35), (30.0, 0.2), (64.0, 0.5), (1.0, 0.0), (10.0, 1.2)])
def test_equals_the_formula(kind, s, m):
    """(b), (d): the margin on the target alone, cross-entropy once."""
    cosines, labels = some_cosines()
    expected = by_hand(cosines, labels, s, m, kind)
    found = LOSSES[kind](cosines, labels, s=s, m=m, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("topk", [1, 3, 99])
def test_the_nearest_others_have_a_margin_too(kind, topk):
    cosines, labels = some_cosines()
    expected = by_hand(cosines, labels, 20.0, 0.2, kind, topk, 0.06)
    options = dict(s=20.0, m=0.2, inter_topk=topk, reduction="none")
    found = LOSSES[kind](cosines, labels, **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    x = cosines.clone().requires_grad_()
    LOSSES[kind](x, labels, **options).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).all()
    plain = LOSSES[kind](cosines, labels, s=20.0, m=0.2, reduction="none")
    assert torch.equal(LOSSES[kind](cosines, labels, **{**options, "inter_topk": 0}), plain)
    with pytest.raises(ValueError, match="inter_topk must not be negative"):
        MARGINS.options(kind, "inter_topk=-1")


def test_am_softmax_worked_example():
    """cos (0.5, 0.1), label 0, s 10, m 0.2: scores (3, 1); not 'margin × label number'."""
    cosines = torch.tensor([[0.5, 0.1], [0.5, 0.1]])
    found = am_softmax(cosines, torch.tensor([0, 1]), s=10, m=0.2, reduction="none")
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(6))]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind, m", [("am_softmax", 0.35), ("aam_softmax", 0.2)])
def test_default_arguments(kind, m):
    """The margin of am_softmax is its paper's."""
    cosines, labels = some_cosines()
    expected = by_hand(cosines, labels, 30.0, m, kind).mean()
    assert float(LOSSES[kind](cosines, labels)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_margin_of_zero_is_the_scaled_softmax(kind):
    """(c)"""
    cosines, labels = some_cosines()
    expected = torch.nn.functional.cross_entropy(30 * cosines, labels)
    torch.testing.assert_close(LOSSES[kind](cosines, labels, s=30.0, m=0.0), expected)


def test_softmax_is_plain_cross_entropy():
    cosines, labels = some_cosines()
    torch.testing.assert_close(
        softmax(5 * cosines, labels), torch.nn.functional.cross_entropy(5 * cosines, labels)
    )
    assert MARGINS.options("softmax") is None


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_target_changes(kind):
    """(b): the gradient of the other classes is that of a softmax over the changed scores."""
    cosines, labels = some_cosines(5)
    s, m = 12.0, 0.3
    changed = s * cosines
    for i, label in enumerate(labels):
        cos = float(cosines[i, label])
        theta = math.acos(cos)
        aam = math.cos(theta + m) if theta + m <= math.pi else cos - 1 + math.cos(m)
        changed[i, label] = s * (cos - m if kind == "am_softmax" else aam)
    x = cosines.clone().requires_grad_()
    LOSSES[kind](x, labels, s=s, m=m, reduction="sum").backward()
    other = torch.ones_like(changed, dtype=torch.bool).scatter(1, labels[:, None], False)
    torch.testing.assert_close(x.grad[other], (s * changed.softmax(1))[other])


@pytest.mark.parametrize("kind", MARGINS.names())
def test_reductions(kind):
    cosines, labels = some_cosines()
    loss = MARGINS.get(kind)
    each = loss(cosines, labels, reduction="none")
    assert each.shape == (len(labels),)
    torch.testing.assert_close(loss(cosines, labels, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(cosines, labels, reduction="mean"), each.mean())
    torch.testing.assert_close(loss(cosines, labels), each.mean())
    with pytest.raises(ValueError):
        loss(cosines, labels, reduction="average")


@pytest.mark.parametrize("kind", MARGINS.names())
def test_gradcheck(kind):
    """(f)"""
    cosines, labels = some_cosines(4, 3)
    cosines = (0.95 * cosines).requires_grad_()
    loss = MARGINS.get(kind)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, reduction="sum"), (cosines,))


@pytest.mark.parametrize("m", [0.05, 0.2, 0.5, 1.5])
def test_aam_decreases_and_is_continuous_over_all_angles(m):
    """(h): cos θ − (1 − cos m) beyond π − m, on purpose; 'cos θ − m sin m' jumps there."""
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    target = margined_target(aam_softmax, theta.cos(), 4.0, m)
    step = target.diff()
    assert (step < 1e-9).all()
    assert step.abs().max() < 2 * float(theta[1]), "a jump"
    inner = theta + m <= math.pi
    # the root is held off 0 near θ = 0, hence the loose end
    torch.testing.assert_close(target[inner], (theta + m).cos()[inner], rtol=0, atol=4e-4)
    torch.testing.assert_close(
        target[~inner], theta.cos()[~inner] - 1 + math.cos(m), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_margin_never_lowers_the_loss(kind):
    cosines, labels = some_cosines(200)
    without = LOSSES[kind](cosines, labels, s=20.0, m=0.0, reduction="none")
    for m in (0.1, 0.2, 0.5):
        assert (LOSSES[kind](cosines, labels, s=20.0, m=m, reduction="none") >= without).all()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_the_ends(kind, dtype):
    """(g): cosines of ±1 and just beyond, scale 64."""
    values = [1.0, -1.0, 1 + 2e-7, -1 - 2e-7, 0.0, 1 - 1e-7]
    cosines = torch.tensor([[a, b] for a in values for b in values], dtype=dtype)
    for label in (0, 1):
        x = cosines.clone().requires_grad_()
        labels = torch.full((len(x),), label)
        each = LOSSES[kind](x, labels, s=64.0, m=0.5, reduction="none")
        each.sum().backward()
        assert each.isfinite().all() and x.grad.isfinite().all()
        assert each.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_still_pulls_at_the_worst_angle(kind):
    """At cos = −1 and +1 the gradient of the target is not cut off."""
    for cos in (-1.0, 1.0):
        x = torch.tensor([[cos, 0.9]], requires_grad=True)
        LOSSES[kind](x, torch.tensor([0]), s=10.0, m=0.3).backward()
        assert x.grad[0, 0] < -1e-3


def test_gradient_is_bounded_beside_the_end():
    """The slope of sin θ over cos θ grows without end towards cos = ±1; one such pair must not."""
    for gap in (1e-8, 1e-12, 1e-15):
        x = torch.tensor([[1 - gap, 0.99]], dtype=torch.float64, requires_grad=True)
        aam_softmax(x, torch.tensor([0]), s=64.0, m=0.5).backward()
        assert x.grad.abs().max() < 64 * 5000


@pytest.mark.parametrize("kind", MARGINS.names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_precision_under_autocast(kind, dtype):
    """(g): scores of 64 in half precision would lose the second digit of the loss."""
    cosines, labels = some_cosines()
    cosines = cosines.float()
    with torch.autocast("cpu", dtype=dtype):
        found = MARGINS.get(kind)(cosines, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, MARGINS.get(kind)(cosines, labels), rtol=1e-6, atol=1e-6)


class TestHead:
    def test_scores_are_cosines_over_the_features(self):
        """(a), (e): W is normalised by row, over D, not over the classes."""
        torch.manual_seed(0)
        head = Head(5, 8)
        x = torch.randn(6, 5)
        expected = torch.tensor(
            [[float(a @ b / (a.norm() * b.norm())) for b in head.weight.detach()] for a in x]
        )
        torch.testing.assert_close(head(x).detach(), expected, rtol=1e-5, atol=1e-6)

    def test_length_of_the_embedding_and_of_the_weights_does_not_matter(self):
        """(a)"""
        torch.manual_seed(0)
        head, x = Head(5, 8), torch.randn(6, 5)
        before = head(x)
        for scale in (1e-3, 1.0, 1e3):
            torch.testing.assert_close(head(scale * x), before, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            head.weight.mul_(torch.logspace(-3, 3, 8)[:, None])
        torch.testing.assert_close(head(x), before, rtol=1e-5, atol=1e-6)
        assert before.abs().max() <= 1 + 1e-6

    @pytest.mark.parametrize("subcenters", [1, 3])
    @pytest.mark.parametrize("kind", LOSSES)
    def test_no_bias_and_gradients_orthogonal_to_rows(self, kind, subcenters):
        """(e)"""
        torch.manual_seed(0)
        head = Head(5, 8, subcenters=subcenters)
        assert [name for name, _ in head.named_parameters()] == ["weight"]
        x = torch.randn(6, 5, requires_grad=True)
        before = head.weight.detach().clone()
        LOSSES[kind](head(x), torch.randint(0, 8, (6,))).backward()
        along = (head.weight.grad * head.weight).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)
        assert head.weight.grad.abs().max() > 1e-2
        along = (x.grad * x).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)
        assert torch.equal(head.weight, before), "forward does not re-assign the weights"

    def test_weights_are_initialised(self):
        torch.manual_seed(0)
        first, second = Head(16, 50).weight, Head(16, 50).weight
        assert first.isfinite().all() and not torch.equal(first, second)
        assert 0.01 < float(first.detach().std()) < 1

    def test_subcenters_are_a_maximum_within_the_class(self):
        torch.manual_seed(0)
        head, x = Head(4, 3, subcenters=2), torch.randn(5, 4)
        one = Head(4, 6)
        one.load_state_dict(head.state_dict())
        every = one(x)
        expected = torch.stack([every[:, 2 * c : 2 * c + 2].max(1).values for c in range(3)], 1)
        torch.testing.assert_close(head(x), expected)

    @pytest.mark.parametrize("kind, subcenters", [("cosine", 1), ("cosine", 2), ("linear", 1)])
    def test_other_speeds_are_classes_in_training_only(self, kind, subcenters):
        head, one = (Head(4, n, kind, subcenters, speeds) for n, speeds in ((3, 3), (9, 1)))
        one.load_state_dict(head.state_dict())
        x = torch.randn(5, 4)
        assert torch.equal(head(x), one(x))
        torch.testing.assert_close(head.eval()(x), one(x)[:, :3])

    def test_zero_embedding(self):
        """(g)"""
        head = Head(4, 3)
        x = torch.zeros(2, 4, requires_grad=True)
        loss = am_softmax(head(x), torch.tensor([0, 2]))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()
        assert torch.equal(head(x).detach(), torch.zeros(2, 3))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_full_precision_under_autocast(self, dtype):
        torch.manual_seed(0)
        head, x = Head(16, 5), torch.randn(4, 16)
        with torch.autocast("cpu", dtype=dtype):
            cosines = head(x)
        assert cosines.dtype == torch.float32
        torch.testing.assert_close(cosines, head(x), rtol=1e-6, atol=1e-6)
        half = Head(16, 5).to(dtype)
        cosines = half(x.to(dtype))
        assert cosines.dtype == torch.float32
        am_softmax(cosines, torch.tensor([0, 1, 2, 3]), s=64.0).backward()
        assert half.weight.grad.isfinite().all()

    def test_linear(self):
        head = Head(4, 3, "linear")
        x = torch.randn(5, 4)
        with torch.no_grad():
            head.bias.normal_()
        torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)

    def test_refused(self):
        with pytest.raises(ValueError, match="'cosin'.*cosine, linear"):
            Head(4, 3, "cosin")
        with pytest.raises(ValueError, match="sub-centres"):
            Head(4, 3, "linear", subcenters=2)


@pytest.mark.parametrize("kind", LOSSES)
def test_separable_speakers_reach_a_loss_of_almost_zero(kind):
    """(j): the scale leaves room for the margin; with s = 1 a floor remains."""
    torch.manual_seed(0)
    classes, dim = 20, 16
    centres = torch.nn.functional.normalize(torch.randn(classes, dim), dim=1)
    labels = torch.arange(classes).repeat(3)
    x = centres[labels] + 0.02 * torch.randn(len(labels), dim)

    def train(s):
        torch.manual_seed(1)
        head = Head(dim, classes)
        optimizer = torch.optim.Adam(head.parameters(), 0.05)
        for _ in range(150):
            loss = LOSSES[kind](head(x), labels, s=s, m=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (head(x).argmax(1) == labels).all()
        return float(loss.detach())

    assert train(30.0) < 0.02
    # −log softmax of cosines alone: even at 1 against −1 everywhere the loss cannot be small
    assert train(1.0) > math.log(1 + (classes - 1) * math.exp(-2)) - 1e-6


class TestMarginAt:
    def test_boundaries(self):
        assert margin_at(0, 0.2, 100, 200) == 0
        assert margin_at(100, 0.2, 100, 200) == 0
        assert margin_at(150, 0.2, 100, 200) == pytest.approx(0.1)
        assert margin_at(101, 0.2, 100, 200) == pytest.approx(0.002)
        assert margin_at(199, 0.2, 100, 200) == pytest.approx(0.198)
        assert margin_at(200, 0.2, 100, 200) == 0.2
        assert margin_at(10**9, 0.2, 100, 200) == 0.2

    def test_no_warm_up_by_default(self):
        assert margin_at(0, 0.2, 0, 0) == 0.2

    def test_ramp_of_length_zero_is_a_step(self):
        assert margin_at(99, 0.2, 100, 100) == 0
        assert margin_at(100, 0.2, 100, 100) == 0.2

    def test_start_alone_is_a_step_too(self):
        """--margin-start 500 without --margin-end must not switch the margin on at once."""
        assert margin_at(0, 0.2, 500, 0) == 0
        assert margin_at(499, 0.2, 500, 0) == 0
        assert margin_at(500, 0.2, 500, 0) == 0.2

    @given(
        m=st.floats(0, 1),
        start=st.integers(0, 1000),
        end=st.integers(0, 1000),
        updates=st.lists(st.integers(0, 1200), min_size=2, max_size=6),
    )
    def test_monotone_and_within_bounds(self, m, start, end, updates):
        values = [margin_at(u, m, start, end) for u in sorted(updates)]
        assert all(a <= b for a, b in zip(values, values[1:], strict=False))
        assert all(0 <= v <= m for v in values)
        assert margin_at(max(start, end), m, start, end) == m
        if start > 0:
            assert margin_at(start - 1, m, start, end) == 0
