"""Averages of the weights: closed forms, several lengths, the beginning, and what conversions leave."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from diffusion_ext.ema import WeightAverages, decay

NO_RAMP = 1e30


class Pair(nn.Module):
    """Two parameters of different shapes, one of them a scalar."""

    def __init__(self, value=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(value)))
        self.inner = nn.Linear(2, 3)
        self.set(value)

    def set(self, value):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value)

    def forward(self, x):
        return self.scale * self.inner(x)


class Model(nn.Module):
    """As in training: the averages are a part of the model they average."""

    def __init__(self, half_lives=(100.0,), ramp_up=NO_RAMP, value=0.0):
        super().__init__()
        self.net = Pair(value)
        self.ema = WeightAverages(self.net, half_lives, ramp_up)


def run(model, values, images=10.0):
    for step, value in enumerate(values, 1):
        model.net.set(value)
        model.ema.update(model.net, step * images, images)
    return model.ema.weights[:, 0].tolist()


# --- the share of the old -------------------------------------------------------------------------


@given(half_life=st.floats(1, 1e7), images=st.floats(1, 1e4), seen=st.floats(1, 1e9))
def test_decay_is_a_half_after_a_half_life(half_life, images, seen):
    kept = decay(half_life, seen, images, NO_RAMP)
    assert kept == pytest.approx(math.exp(-math.log(2) * images / half_life), rel=1e-12)
    # two updates of half as many images leave as much as one
    assert decay(half_life, seen, images / 2, NO_RAMP) ** 2 == pytest.approx(kept, rel=1e-12)


@pytest.mark.parametrize(
    "half_life, seen, images, ramp_up, kept",
    [
        (100, 1e9, 100, 0.05, 0.5),
        (100, 1e9, 200, 0.05, 0.25),
        (100, 1e9, 50, 0.05, 2**-0.5),
        # 5 % of 1,000 images seen: the half-life is 50
        (100, 1000, 50, 0.05, 0.5),
        (100, 2000, 50, 0.05, 2**-0.5),
        (100, 4000, 50, 0.05, 2**-0.5),
        # the first update of a run, and no average
        (1e6, 64, 64, 0.05, 2.0**-20),
        (0, 1000, 10, 0.05, 0.0),
    ],
)
def test_decay_by_hand(half_life, seen, images, ramp_up, kept):
    assert decay(half_life, seen, images, ramp_up) == pytest.approx(kept, rel=1e-12)


@given(half_life=st.floats(1, 1e6), seen=st.floats(1, 1e7), ramp_up=st.floats(0.01, 1))
def test_ramp_up_is_the_smaller_half_life(half_life, seen, ramp_up):
    found = decay(half_life, seen, 1, ramp_up)
    assert found == min(decay(half_life, seen, 1, NO_RAMP), decay(ramp_up * seen, seen, 1, NO_RAMP))


# --- averages -------------------------------------------------------------------------------------


@given(value=st.floats(-100, 100, width=32), count=st.integers(1, 20))
def test_constant_weights_stay_what_they_are(value, count):
    model = Model((0.0, 3.0, 1e6), 0.05, value)
    run(model, [value] * count)
    expected = torch.full_like(model.ema.weights, value)
    torch.testing.assert_close(model.ema.weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("half_life", [20.0, 100.0, 1000.0])
def test_a_step_is_approached_exponentially(half_life):
    """From 0 to 1: 1 − 2^(−images / half-life)."""
    model = Model((half_life,))
    for updates in range(1, 31):
        model.net.set(1.0)
        model.ema.update(model.net, 10.0 * updates, 10.0)
        expected = 1 - 2 ** (-10 * updates / half_life)
        assert float(model.ema.weights[0, 0]) == pytest.approx(expected, rel=1e-5)


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), images=st.floats(1, 50)
)
def test_any_history_is_the_weighted_sum(values, images):
    """Σ (1 − d_k) Π_{j>k} d_j θ_k, with the ramp, in float64."""
    model = Model((30.0, 400.0), 0.5)
    found = run(model, values, images)
    for average, half_life in zip(found, (30.0, 400.0), strict=True):
        kept = [decay(half_life, images * k, images, 0.5) for k in range(1, len(values) + 1)]
        expected = sum(
            (1 - kept[k]) * math.prod(kept[k + 1 :]) * value for k, value in enumerate(values)
        )
        assert average == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_half_as_large_batches_average_alike():
    """The half-life is in images: two updates of 5 are one of 10."""
    one, two = Model((50.0,)), Model((50.0,))
    run(one, [1.0, -2.0, 0.5], 10.0)
    run(two, [1.0, 1.0, -2.0, -2.0, 0.5, 0.5], 5.0)
    torch.testing.assert_close(one.ema.weights, two.ema.weights)


def test_the_random_beginning_is_soon_forgotten():
    """A half-life of 10 million images, batches of 100: 1,000 updates on, 5 % of the time is a half-life."""
    model = Model((1e7,), 0.05, value=1000.0)
    (found,) = run(model, [0.0] * 1000, 100.0)
    assert abs(found) < 1e-20
    without = Model((1e7,), NO_RAMP, value=1000.0)
    (stuck,) = run(without, [0.0] * 1000, 100.0)
    assert stuck > 990


def test_half_life_0_is_the_weights_themselves():
    model = Model((0.0, 50.0))
    torch.manual_seed(0)
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.net.parameters():
                parameter.normal_()
        model.ema.update(model.net, step * 10, 10)
        for name, parameter in model.net.named_parameters():
            assert torch.equal(model.ema.of(0)[name], parameter)
            assert not torch.allclose(model.ema.of(1)[name], parameter)


def test_a_new_average_is_the_initial_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    averages = WeightAverages(net, (10.0, 20.0), 0.05)
    for index in range(2):
        assert list(averages.of(index)) == [name for name, _ in net.named_parameters()]
        for name, parameter in net.named_parameters():
            assert torch.equal(averages.of(index)[name], parameter)


def test_the_averaged_weights_are_what_the_network_runs_with():
    model = Model((10.0,), value=0.0)
    run(model, [1.0], 10.0)  # half way: every weight is 0.5
    x = torch.ones(1, 2)
    found = functional_call(model.net, model.ema.of(0), (x,))
    torch.testing.assert_close(found, torch.full((1, 3), 0.5 * (0.5 + 0.5 + 0.5)))
    torch.testing.assert_close(model.net(x), torch.full((1, 3), 3.0))


def test_lengths_do_not_disturb_each_other():
    values = [1.0, -1.0, 3.0, 0.0]
    together = run(Model((5.0, 70.0, 0.0)), values)
    alone = [run(Model((half_life,)), values)[0] for half_life in (5.0, 70.0, 0.0)]
    assert together == alone and len(set(together)) == 3


# --- in a model -----------------------------------------------------------------------------------


def test_state_goes_with_the_model_and_goes_on_alike():
    whole, first = Model((30.0, 300.0), 0.5), Model((30.0, 300.0), 0.5)
    values = [1.0, 2.0, -1.0, 4.0, 0.5, 3.0]
    run(whole, values)
    run(first, values[:3])
    resumed = Model((30.0, 300.0), 0.5, value=7.0)
    resumed.load_state_dict(first.state_dict())
    assert list(resumed.state_dict()) == [
        *(f"net.{n}" for n, _ in first.net.named_parameters()),
        "ema.weights",
    ]
    for step, value in enumerate(values[3:], 4):
        resumed.net.set(value)
        resumed.ema.update(resumed.net, step * 10.0, 10.0)
    assert torch.equal(resumed.ema.weights, whole.ema.weights)


def test_averages_are_no_parameters():
    model = Model()
    assert [n for n, _ in model.named_parameters() if n.startswith("ema")] == []
    assert not model.ema.weights.requires_grad


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_conversions_leave_the_averages_in_float32(convert):
    """To the last bit: rounded to bfloat16 they would not move by updates that change the last bits."""
    model = Model((1e5,), value=1.0)
    run(model, [1.001] * 5)
    before = model.ema.weights.clone()
    getattr(model, convert)()
    assert model.ema.weights.dtype == torch.float32 and torch.equal(model.ema.weights, before)
    assert next(model.net.parameters()).dtype == getattr(torch.zeros(1), convert)().dtype
    moved = model.to(torch.bfloat16).ema.weights
    assert moved.dtype == torch.float32 and torch.equal(moved, before)
    assert "weights" in dict(model.ema.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_precision_are_averaged_in_float32(dtype):
    """1,000 steps of 1/1000 towards 1; in half precision the average would stop on the way."""
    model = Model((1e4,), value=0.0).to(dtype)
    found = run(model, [1.0] * 1000, 10.0)[0]
    assert found == pytest.approx(0.5, rel=1e-4)


def test_update_leaves_the_network_and_gradients_alone():
    model = Model((10.0,), value=1.0)
    model.net(torch.ones(1, 2)).sum().backward()
    gradients = [p.grad.clone() for p in model.net.parameters()]
    model.ema.update(model.net, 10.0, 10.0)
    assert all((p == 1).all() for p in model.net.parameters())
    for parameter, gradient in zip(model.net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert model.ema.weights.grad_fn is None
