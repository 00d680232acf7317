"""Samplers on data whose every answer is known: x_0 ~ N(μ, s²), pixel by pixel.

The exact predictor is a line in x, so a sampler with it is affine in where it starts and in each noise:
fed zeros and units it gives all of its coefficients, hence mean and variance of what it ends in, exactly.
Beside them stand recursions written from other forms of the same equations, the exact solution of
the probability-flow ODE, and the true μ and s.
"""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.objectives import OBJECTIVES
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.samplers import SAMPLERS, SPACINGS, Level, Trajectory, trajectory
from diffusion_ext.schedules import SCHEDULES, build_schedule

pytestmark = pytest.mark.pairs

MU, S = 0.3, 0.4
SPECS = [(name, zero) for name in SCHEDULES.names() for zero in (False, True)]
IDS = [f"{name}{'-zero' if zero else ''}" for name, zero in SPECS]
schedules = pytest.mark.parametrize("spec", SPECS, ids=IDS)
spacings = pytest.mark.parametrize("spacing", SPACINGS.names())
VARIANTS = {
    "ddpm-small": ("ddpm", dict(variance="small")),
    "ddpm-large": ("ddpm", dict(variance="large")),
    "ddim-0": ("ddim", dict(eta=0.0)),
    "ddim-0.5": ("ddim", dict(eta=0.5)),
    "ddim-1": ("ddim", dict(eta=1.0)),
    "heun": ("heun", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
# and those that follow the ODE in the time of flow matching
ORDERS = [("ddim-0", 1), ("heun", 2), ("dpmpp_2m", 2), ("euler", 1), ("heun-straight", 2)]
STRAIGHT = {"euler": ("euler", {}), "heun-straight": ("heun", dict(time="straight"))}
DETERMINISTIC = ("ddim-0", "heun", "dpmpp_2m")
make = cache(build_schedule)


def regression(what, a, s):
    """(gain, offset) of E[what | x] = gain · x + offset for x = a x_0 + s ε: Cov / Var, by hand."""
    variance = a * a * S * S + s * s
    total = math.sqrt(s * s + (0.5 * a) ** 2)
    covariance, mean = {
        "x0": (a * S * S, MU),
        "eps": (s, 0.0),
        "v": (a * s * (1 - S * S), -s * MU),
        "flow": (s - a * S * S, -MU),
        "edm": (a * s * (S * S / 0.5 - 0.5) / total, s / 0.5 * MU / total),
    }[what]
    gain = covariance / variance
    return gain, mean - gain * a * MU


def exact(schedule, objective="v"):
    """The exact predictor as samplers see it, through an objective, in float64."""
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()

    def denoise(x, timestep):
        a, s = alpha[timestep], sigma[timestep]
        gain, offset = regression(objective, a, s)
        return OBJECTIVES.get(objective).prediction(gain * x + offset, x, a, s)

    return denoise


def run(variant, denoise, path, x, noise):
    name, options = (VARIANTS | STRAIGHT)[variant]
    return SAMPLERS.build(name, denoise, x, path, noise, options=options)


def coefficients(variant, denoise, path):
    """(constant, gain of the start, gain of each step's noise): x_0 = c + g x_T + Σ g_i z_i."""
    steps = len(path.levels) - 1
    x = torch.zeros(steps + 2, dtype=torch.float64)
    x[1] = 1

    def noise(i):
        z = torch.zeros_like(x)
        z[2 + i] = 1
        return z

    x = run(variant, denoise, path, x, noise)
    return float(x[0]), float(x[1] - x[0]), (x[2:] - x[0]).numpy()


def moments(variant, denoise, path, start):
    """(mean, std) of the result, for x_T with mean and std `start`."""
    c, g, gains = coefficients(variant, denoise, path)
    return c + g * start[0], math.sqrt((g * start[1]) ** 2 + (gains**2).sum())


def marginal(level):
    """(mean, std) of x at a level."""
    return level.alpha * MU, math.hypot(level.alpha * S, level.sigma)


# --- the predictors ---------------------------------------------------------------------------------


@schedules
def test_exact_predictors_of_all_objectives_agree(spec):
    """At every timestep; eps where anything of the image is left to find."""
    schedule, x = make(spec[0], 50, spec[1]), torch.linspace(-3, 3, 7, dtype=torch.float64)
    for t in range(50):
        expected = exact(schedule, "v")(x, t)
        for objective in ("x0", "eps"):
            if objective == "eps" and schedule.alpha[t] < 1e-4:
                continue
            found = exact(schedule, objective)(x, t)
            torch.testing.assert_close(found.x0, expected.x0, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.eps, expected.eps, rtol=1e-9, atol=1e-9)


def test_the_predictor_is_the_mean_that_sampling_gives():
    """Not only algebra: the regression of x_0, ε and v on x_t over a million pairs."""
    rng = np.random.default_rng(0)
    x0, eps = MU + S * rng.standard_normal(10**6), rng.standard_normal(10**6)
    a, s = 0.6, 0.8
    x = a * x0 + s * eps
    for what, y in {"x0": x0, "eps": eps, "v": a * eps - s * x0}.items():
        assert np.polyfit(x, y, 1) == pytest.approx(regression(what, a, s), abs=5e-3)


# --- recursions in another form -------------------------------------------------------------------


def bayes(now, then, extra):
    """Ancestral step as Bayes' rule: q(x_then | x_now, x̂_0) ∝ q(x_now | x_then) q(x_then | x̂_0).

    Returns (weight of x̂_0, weight of x_now, std), the last from precisions, or the forward step's.
    """
    keep = now.alpha / then.alpha
    fresh = 1 - keep**2
    if then.sigma == 0:
        return 1.0, 0.0, 0.0
    precision = 1 / then.sigma**2 + keep**2 / fresh
    std = {"small": math.sqrt(1 / precision), "large": math.sqrt(fresh)}[extra]
    return then.alpha / then.sigma**2 / precision, keep / fresh / precision, std


def ddim_step(now, then, eta):
    """DDIM as weights of x̂_0 and x_now: the direction to x_now is (x − a x̂_0) / s."""
    std = 0.0
    if eta and then.sigma > 0:
        std = eta * bayes(now, then, "small")[2]
    rest = math.sqrt(then.sigma**2 - std**2) / now.sigma
    return then.alpha - rest * now.alpha, rest, std


def by_recursion(variant, path, start):
    """(mean, std) carried from level to level, with x̂_0 = k x + m."""
    mean, variance = start[0], start[1] ** 2
    if variant in ("heun", "dpmpp_2m"):
        gain, constant = {"heun": heun_line, "dpmpp_2m": multistep_line}[variant](path)
        return constant + gain * mean, abs(gain) * math.sqrt(variance)
    for now, then in zip(path.levels, path.levels[1:], strict=False):
        kind, _, extra = variant.partition("-")
        step = bayes(now, then, extra) if kind == "ddpm" else ddim_step(now, then, float(extra))
        on_x0, on_x, std = step
        k, m = regression("x0", now.alpha, now.sigma)
        mean = on_x * mean + on_x0 * (k * mean + m)
        variance = (on_x + on_x0 * k) ** 2 * variance + std**2
    return mean, math.sqrt(variance)


def heun_line(path):
    """(gain, constant) of Heun's method for dx/dφ = v(x, φ) on a quarter circle, last step DDIM."""
    line = np.array([1.0, 0.0])  # x as gain, constant
    one = np.array([0.0, 1.0])
    for now, then in zip(path.levels, path.levels[1:], strict=False):
        at = [
            math.acos(level.alpha) if level.alpha < 0.9 else math.asin(level.sigma)
            for level in (now, then)
        ]
        k, m = regression("v", now.alpha, now.sigma)
        v = k * line + m * one
        turned = math.cos(at[1] - at[0]) * line + math.sin(at[1] - at[0]) * v
        if then.sigma > 0:
            k, m = regression("v", then.alpha, then.sigma)
            turned = line + (at[1] - at[0]) * (v + k * turned + m * one) / 2
        line = turned
    return line


def multistep_line(path):
    """(gain, constant) of DPM-Solver++(2M), from its paper's r, h and D."""
    line, one, old, old_h = np.array([1.0, 0.0]), np.array([0.0, 1.0]), None, None
    for now, then in zip(path.levels, path.levels[1:], strict=False):
        k, m = regression("x0", now.alpha, now.sigma)
        model = k * line + m * one
        if then.sigma == 0:
            return model
        h = then.half_log_snr - now.half_log_snr
        d = model
        if old is not None and math.isfinite(old_h):
            r = old_h / h
            d = (1 + 1 / (2 * r)) * model - 1 / (2 * r) * old
        line = then.sigma / now.sigma * line - then.alpha * math.expm1(-h) * d
        old, old_h = model, h
    raise AssertionError("a path ends at the image")


@schedules
@spacings
@variants
@pytest.mark.parametrize("timesteps, steps", [(60, 60), (60, 7), (60, 1), (1000, 20)])
def test_mean_and_variance_are_those_of_the_recursion(spec, spacing, variant, timesteps, steps):
    """And the same through every objective that can be used with the schedule."""
    schedule = make(spec[0], timesteps, spec[1])
    path = trajectory(schedule, steps, spacing)
    for start in ((0.0, 1.0), marginal(path.levels[0]), (0.7, 2.0)):
        expected = by_recursion(variant, path, start)
        for objective in ("v", "x0") if spec[1] else ("v", "x0", "eps"):
            found = moments(variant, exact(schedule, objective), path, start)
            # √(1/ᾱ_T) of the cosine schedule is 2e4, by which eps loses as many digits
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), objective


@schedules
@spacings
@variants
def test_one_step_is_the_mean_of_the_data(spec, spacing, variant):
    """From noise that says next to nothing of the image, the best guess is μ, without variance."""
    schedule = make(spec[0], 1000, spec[1])
    path = trajectory(schedule, 1, spacing)
    mean, std = moments(variant, exact(schedule), path, (0.0, 1.0))
    left = path.levels[0].alpha
    assert mean == pytest.approx(MU, abs=left * left) and std == pytest.approx(
        left * S * S, abs=1e-12 + left**3
    )


# --- the truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("zero", [False, True])
@variants
def test_all_thousand_steps_end_in_the_data(name, zero, variant):
    """Started from N(0, 1) as in practice: mean to 1 %, deviation to 1.5 % of what it is."""
    schedule = make(name, 1000, zero)
    found = moments(variant, exact(schedule), trajectory(schedule, 1000), (0.0, 1.0))
    assert found[0] == pytest.approx(MU, abs=0.01 * S) and found[1] == pytest.approx(S, rel=0.015)


def test_small_and_large_bracket_the_truth():
    """The posterior's variance is too little, β too much; deviations the project's anchors measured."""
    schedule = make("linear", 1000)
    path = trajectory(schedule, 1000)
    small, large = (
        moments(f"ddpm-{kind}", exact(schedule), path, (0.0, 1.0))[1] for kind in ("small", "large")
    )
    assert small == pytest.approx(0.3962, abs=1e-3) and large == pytest.approx(0.4009, abs=1e-3)
    assert small < S < large


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("variant", ["ddpm-small", "ddpm-large", "ddim-0.5", "ddim-1"])
def test_longer_chains_are_nearer_to_the_truth(name, variant):
    """The error of the deviation is of first order in 1/T: half for twice the timesteps."""
    errors = []
    for timesteps in (250, 500, 1000):
        schedule = make(name, timesteps)
        path = trajectory(schedule, timesteps)
        start = marginal(path.levels[0])
        mean, std = moments(variant, exact(schedule), path, start)
        assert mean == pytest.approx(MU, abs=1e-9)  # the mean is never wrong from the right start
        errors.append(abs(std - S))
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < ratio < 2.4 for ratio in ratios), (errors, ratios)


@schedules
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_ancestral_sampling_is_ddim_with_all_its_noise(spec, steps):
    """eta = 1 is the small variance on every sub-list of timesteps, coefficient by coefficient."""
    schedule = make(spec[0], 40, spec[1])
    path = trajectory(schedule, steps)
    expected = coefficients("ddpm-small", exact(schedule), path)
    found = coefficients("ddim-1", exact(schedule), path)
    for a, b in zip(found, expected, strict=True):
        # after pure noise DDIM takes the root of a difference that is 0 but for its last digits
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-8)


# --- orders of convergence ------------------------------------------------------------------------


def flow(x, level, end=None):
    """The probability-flow ODE from a level to another (the image): quantiles stay quantiles."""
    mean, std = (MU, S) if end is None else marginal(end)
    here = marginal(level)
    return mean + std * (x - here[0]) / here[1]


def even_path(steps, first=-4.0, last=4.0):
    """Levels evenly spaced in λ = log(alpha/sigma), between two that are not the image."""
    lambdas = np.linspace(first, last, steps + 1)
    snr = np.exp(2 * lambdas)
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    return Trajectory(
        tuple(
            Level(i, float(a), float(s)) for i, (a, s) in enumerate(zip(alpha, sigma, strict=True))
        )
    )


def on_path(path, objective="v"):
    def denoise(x, timestep):
        level = path.levels[timestep]
        gain, offset = regression(objective, level.alpha, level.sigma)
        return OBJECTIVES.get(objective).prediction(gain * x + offset, x, level.alpha, level.sigma)

    return denoise


X = torch.tensor([-2.0, -0.5, 1.0, 2.5], dtype=torch.float64)


def errors(variant, paths, denoise, end=None):
    """Largest distance to the exact solution, for each path."""
    found = []
    for path in paths:
        x0 = run(variant, denoise(path), path, X, None)
        goal = flow(X, path.levels[0], end(path) if end else None)
        found.append(float((x0 - goal).abs().max()))
    return np.array(found)


@pytest.mark.parametrize("variant, order", ORDERS)
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_order_of_convergence(variant, order, objective):
    """Between two noise levels, 40 to 1,280 steps even in λ: the error falls by 2^order a doubling."""
    paths = [even_path(40 * 2**k) for k in range(6)]
    found = errors(variant, paths, partial(on_path, objective=objective), lambda p: p.levels[-1])
    orders = np.log2(found[:-1] / found[1:])
    assert orders[2:] == pytest.approx(order, abs=0.06), orders
    assert np.polyfit(np.arange(6), -np.log2(found), 1)[0] == pytest.approx(order, abs=0.12), orders


def two_peaks(x, a, s, peak=0.6, width=0.2):
    """E[x_0 | x] for x_0 near −peak or peak, at even odds: no longer a line in x."""
    variance = (a * width) ** 2 + s**2
    means = [m + a * width**2 / variance * (x - a * m) for m in (-peak, peak)]
    right = 1 / (1 + np.exp(-2 * a * peak * x / variance))
    return (1 - right) * means[0] + right * means[1]


@pytest.mark.parametrize("variant, order", ORDERS)
def test_order_of_convergence_where_the_predictor_is_curved(variant, order):
    """Against scipy's eighth-order Runge-Kutta on dx/dλ, to 1e-11."""
    start, found = X.numpy(), []

    def slope(lam, x):
        a, s = 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))
        eps = (x - a * two_peaks(x, a, s)) / s
        # d log(a)/dλ = s², and x/a moves by ε d(s/a)/dλ = −ε s/a
        return s**2 * x - s * eps

    solved = solve_ivp(slope, (-4, 4), start, method="DOP853", rtol=1e-11, atol=1e-12)
    goal = solved.y[:, -1]
    for steps in (40, 80, 160, 320, 640):
        path = even_path(steps)

        def denoise(x, timestep, path=path):
            _, a, s = path.levels[timestep]
            x0 = torch.from_numpy(two_peaks(x.numpy(), a, s))
            return OBJECTIVES.get("x0").prediction(x0, x, a, s)

        found.append(np.abs(run(variant, denoise, path, X, None).numpy() - goal).max())
    found = np.array(found)
    orders = np.log2(found[:-1] / found[1:])
    assert orders[1:] == pytest.approx(order, abs=0.15), orders


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_ddim_error_halves_on_every_schedule(name):
    """Down to the image, with the timesteps that users get: 20 to 160 of 4,000."""
    schedule = make(name, 4000)
    paths = [trajectory(schedule, 20 * 2**k) for k in range(4)]
    found = errors("ddim-0", paths, lambda path: exact(schedule))
    assert found[:-1] / found[1:] == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("variant", ["heun", "dpmpp_2m"])
def test_second_order_falls_by_four_on_every_schedule(name, variant):
    """Down to the image, timesteps even in λ: 40 to 160 of 4,000."""
    schedule = make(name, 4000)
    paths = [trajectory(schedule, 40 * 2**k, "logsnr") for k in range(3)]
    found = errors(variant, paths, lambda path: exact(schedule))
    assert (found[:-1] / found[1:] > 3.8).all(), found


@schedules
@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_full_chain_follows_the_exact_flow(spec, variant):
    schedule = make(spec[0], 1000, spec[1])
    found = errors(variant, [trajectory(schedule, 1000)], lambda path: exact(schedule))
    assert found[0] < 0.01, found


@schedules
@pytest.mark.parametrize("variant", ["heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_second_order_is_nearer_than_ddim_with_few_steps(spec, variant, steps):
    """Also where the first level is nearly pure noise, and sigma/alpha nearly infinite."""
    schedule = make(spec[0], 1000, spec[1])
    paths = [trajectory(schedule, steps)]
    ddim, found = (
        errors(kind, paths, lambda path: exact(schedule))[0] for kind in ("ddim-0", variant)
    )
    assert found < 0.985 * ddim, (found, ddim)


# --- through the denoiser, in float32, with real noise ---------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@variants
def test_real_draws_have_the_mean_and_variance_of_the_recursion(objective, variant):
    """6,400 pixels through `Denoiser` and `ImageNoise`; unclipped, as N(μ, s²) leaves [−1, 1]."""
    schedule = make("sigmoid", 300)
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()

    def network(x, t, label, x0):
        # the levels' own x, which `DiffusionModel` divides as the objective wants it
        gain, offset = regression(objective, alpha[int(t[0])], sigma[int(t[0])])
        return (gain * x + offset).float()

    path = trajectory(schedule, 30)
    noise = ImageNoise(3, list(range(25)), (1, 16, 16))
    x0 = run(variant, Denoiser(network, schedule, objective, clip=False), path, noise.start, noise)
    assert x0.dtype == torch.float32
    mean, std = by_recursion(variant, path, (0.0, 1.0))
    n = x0.numel()
    assert float(x0.mean()) == pytest.approx(mean, abs=4 * std / n**0.5)
    assert float(x0.std()) == pytest.approx(std, abs=4 * std / (2 * n) ** 0.5)
    # and look normal: third and fourth moment
    z = (x0.double() - mean) / std
    assert float((z**3).mean()) == pytest.approx(0, abs=4 * (15 / n) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(3, abs=4 * (96 / n) ** 0.5)
