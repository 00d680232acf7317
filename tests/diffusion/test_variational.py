"""The variational bound: against torch.distributions, scipy and the definition, and what it trains."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from diffusion_ext import criterion
from diffusion_ext.schedules import SCHEDULES, build_schedule
from diffusion_ext.weightings import (
    PosteriorTables,
    bound,
    discretised_log_likelihood,
    gaussian_kl,
)

VALUES = torch.arange(256) / 127.5 - 1
names = pytest.mark.parametrize("name", SCHEDULES.names())


# --- parts ----------------------------------------------------------------------------------------


@given(
    means=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    logs=st.tuples(st.floats(-6, 2), st.floats(-6, 2)),
)
def test_gaussian_kl_as_torch(means, logs):
    (m1, m2), (v1, v2) = (torch.tensor(pair, dtype=torch.float64) for pair in (means, logs))
    expected = kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp()))
    assert float(gaussian_kl(m1, v1, m2, v2)) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-4, 1))
def test_probabilities_of_the_256_values_sum_to_1(mean, log_std):
    logs = discretised_log_likelihood(VALUES, torch.full((256,), mean), torch.full((256,), log_std))
    assert float(logs.double().exp().sum()) == pytest.approx(1, abs=1e-5)


@given(mean=st.floats(-1.2, 1.2), log_std=st.floats(-3, 1))
def test_likelihood_is_the_mass_of_the_bin(mean, log_std):
    """Edges half a step away, the outermost at infinity; scipy in float64."""
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    mass = np.diff(norm.cdf(edges, mean, np.exp(log_std)))
    found = discretised_log_likelihood(
        VALUES, torch.full((256,), mean), torch.full((256,), log_std)
    )
    np.testing.assert_allclose(found.double().exp(), mass, rtol=1e-3, atol=2e-7)


def test_an_impossible_value_costs_a_finite_amount():
    x, mean = torch.tensor([0.0]), torch.tensor([0.9], requires_grad=True)
    found = discretised_log_likelihood(x, mean, torch.tensor([-6.0]))
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(np.log(1e-12)) and mean.grad.isfinite().all()


# --- the posterior --------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("timesteps", [2, 30])
@pytest.mark.parametrize("zero", [False, True])
def test_posterior_is_that_of_the_joint_gaussian(name, timesteps, zero):
    """Conditioning (x_{t−1}, x_t) given x_0 by its covariance matrix, in numpy."""
    schedule = build_schedule(name, timesteps, zero)
    tables = PosteriorTables(schedule)
    ac = schedule.alphas_cumprod.numpy()
    for t in range(1, timesteps):
        keep = np.sqrt(ac[t] / ac[t - 1])
        spread = np.array([1 - ac[t - 1], keep * (1 - ac[t - 1]), 1 - ac[t]])
        gain = spread[1] / spread[2]
        variance = spread[0] - gain * spread[1]
        assert float(tables.on_x[t]) == pytest.approx(gain, rel=1e-5, abs=1e-7)
        on_x0 = np.sqrt(ac[t - 1]) - gain * np.sqrt(ac[t])
        assert float(tables.on_x0[t]) == pytest.approx(on_x0, rel=1e-5, abs=1e-7)
        assert float(tables.log_small[t]) == pytest.approx(np.log(variance), abs=1e-4)
        assert float(tables.log_large[t]) == pytest.approx(np.log(1 - ac[t] / ac[t - 1]), abs=1e-4)
    # the image itself at t = 0, with the variance of t = 1 for its logarithm
    assert (float(tables.on_x0[0]), float(tables.on_x[0])) == pytest.approx((1, 0))
    assert float(tables.log_small[0]) == float(tables.log_small[1])
    assert all(table.isfinite().all() for table in vars(tables).values())


def test_posterior_as_denoising_diffusion_pytorch():
    reason = "denoising-diffusion-pytorch is not installed"
    peer = pytest.importorskip("denoising_diffusion_pytorch", reason=reason)
    net = torch.nn.Module()
    net.channels, net.out_dim, net.self_condition = 1, 1, False
    made = peer.GaussianDiffusion(net, image_size=8, timesteps=300, beta_schedule="cosine")
    tables = PosteriorTables(build_schedule("cosine", 300))
    torch.testing.assert_close(tables.on_x0, made.posterior_mean_coef1, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tables.on_x, made.posterior_mean_coef2, rtol=1e-5, atol=1e-7)
    clipped = made.posterior_log_variance_clipped[1:]
    torch.testing.assert_close(tables.log_small[1:], clipped, rtol=1e-5, atol=1e-5)


# --- the bound ------------------------------------------------------------------------------------


def batch(t, schedule, seed=0):
    source = torch.Generator().manual_seed(seed)
    shape = (len(t), 2, 3, 3)
    x0 = (torch.randint(0, 256, shape, generator=source) / 127.5 - 1).float()
    noise = torch.randn(shape, generator=source)
    a, s = (table.float()[t][:, None, None, None] for table in (schedule.alpha, schedule.sigma))
    guess = (x0 + 0.1 * torch.randn(shape, generator=source)).clamp(-1, 1)
    return x0, a * x0 + s * noise, guess, torch.rand(shape, generator=source)


def expected_bound(schedule, x0, x_t, t, guess, fraction):
    """One image in float64: KL of Normals by torch, or the mass of its bins by scipy."""
    ac = schedule.alphas_cumprod
    before = ac[t - 1] if t else torch.ones((), dtype=torch.float64)
    beta, x0, x_t, guess, fraction = (
        v.double() for v in (1 - ac[t] / before, x0, x_t, guess, fraction)
    )

    def small(t):
        return (1 - ac[t - 1]) / (1 - ac[t]) * (1 - ac[t] / ac[t - 1])

    def mean(image):
        on_x = (1 - beta).sqrt() * (1 - before) / (1 - ac[t])
        return before.sqrt() * beta / (1 - ac[t]) * image + on_x * x_t

    least = small(max(t, 1))
    std = (beta.log() * fraction + least.log() * (1 - fraction)).mul(0.5).exp()
    if t:
        return kl_divergence(Normal(mean(x0), least.sqrt()), Normal(mean(guess), std)).mean()
    upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
    lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
    mass = norm.cdf(upper, mean(guess), std) - norm.cdf(lower, mean(guess), std)
    return torch.tensor(-np.log(np.maximum(mass, 1e-12)).mean())


@names
@pytest.mark.parametrize("zero", [False, True])
def test_bound_is_its_definition(name, zero):
    """Every timestep of one batch, each image on its own, t = 0 among them."""
    schedule = build_schedule(name, 24, zero)
    t = torch.arange(24)
    x0, x_t, guess, fraction = batch(t, schedule)
    found = bound(PosteriorTables(schedule), x0, x_t, t, guess, fraction)
    assert found.shape == (24,) and found.dtype == torch.float32
    for k in range(24):
        expected = float(expected_bound(schedule, x0[k], x_t[k], k, guess[k], fraction[k]))
        assert float(found[k]) == pytest.approx(expected, rel=2e-3, abs=2e-6), k


def test_bound_is_0_for_the_posterior_itself_and_more_for_anything_else():
    schedule = build_schedule("sigmoid", 24)
    t = torch.arange(1, 24)
    x0, x_t, guess, fraction = batch(t, schedule)
    tables = PosteriorTables(schedule)
    torch.testing.assert_close(
        bound(tables, x0, x_t, t, x0, torch.zeros_like(x0)), torch.zeros(23), rtol=0, atol=1e-6
    )
    assert (bound(tables, x0, x_t, t, guess, torch.zeros_like(x0)) > 1e-6).all()
    assert (bound(tables, x0, x_t, t, x0, torch.ones_like(x0)) > 1e-6).all()


def test_gradient_of_the_fraction_by_hand():
    """d KL / d fraction = ½ (large − small) (1 − (v₁ + Δ²)/v₂), a mean over the pixels; none through x_t."""
    schedule = build_schedule("cosine", 24)
    t = torch.tensor([3, 12, 20])
    x0, x_t, guess, fraction = batch(t, schedule)
    tables = PosteriorTables(schedule)
    fraction.requires_grad_()
    bound(tables, x0, x_t, t, guess, fraction).sum().backward()
    on_x0, small, large = (
        table[t][:, None, None, None].double()
        for table in (tables.on_x0, tables.log_small, tables.log_large)
    )
    log_variance = fraction.detach().double() * (large - small) + small
    wrong = (on_x0 * (guess - x0)) ** 2 + small.exp()
    expected = 0.5 * (large - small) * (1 - wrong / log_variance.exp()) / 18
    torch.testing.assert_close(fraction.grad.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
@names
def test_gradients_are_finite_at_every_timestep(name, zero):
    """Both branches are computed for every image: neither may leave NaN in the other."""
    schedule = build_schedule(name, 100, zero)
    t = torch.arange(100)
    x0, x_t, _, fraction = batch(t, schedule)
    fraction.requires_grad_()
    found = bound(PosteriorTables(schedule), x0, x_t, t, -x0, fraction)
    found.sum().backward()
    assert found.isfinite().all() and fraction.grad.isfinite().all()
    assert (fraction.grad.flatten(1).abs().sum(1)[1:] > 0).all()


# --- in the criterion -----------------------------------------------------------------------------


def test_the_bound_trains_the_variance_and_not_the_prediction():
    """The half of the output that predicts gets the same gradient with and without it."""
    schedule = build_schedule("sigmoid", 24)
    gradients = []
    for weight in (0.0, 1.0):
        cfg = criterion.DdpmCriterionConfig(vlb_weight=weight, autocast="fp32")
        task = SimpleNamespace(schedule=schedule, cfg=SimpleNamespace(objective="v", seed=1))
        made = criterion.DdpmCriterion(cfg, task)
        t = torch.arange(24)
        x0, x_t, guess, fraction = batch(t, schedule)
        output = torch.cat([guess, 2 * fraction - 1], 1).requires_grad_()
        data = dict(x0=x0, noise=x_t, t=t, x_t=x_t, label=None, condition=None)
        loss, plain = made.losses(lambda *_, output=output: output, data)
        loss.sum().backward()
        gradients.append(output.grad)
        terms = (
            weight
            * 24
            * bound(
                PosteriorTables(schedule),
                x0,
                x_t,
                t,
                # v: x_0 = a x − s v
                (
                    schedule.alpha.float()[:, None, None, None] * x_t
                    - schedule.sigma.float()[:, None, None, None] * guess
                ).clamp(-1, 1),
                fraction,
            )
        )
        torch.testing.assert_close(loss, plain + terms, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients[0][:, :2], gradients[1][:, :2])
    assert (gradients[0][:, 2:] == 0).all() and (gradients[1][:, 2:] != 0).any()
