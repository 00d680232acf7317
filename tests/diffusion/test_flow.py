"""Flow matching and EDM: their own equations beside what the variance-preserving samplers make of them."""

import math

import pytest
import torch
from scipy import stats

from diffusion_ext.objectives import OBJECTIVES, schedule_of, shown
from diffusion_ext.samplers import SAMPLERS, trajectory
from diffusion_ext.schedules import TIME_SAMPLINGS, build_schedule
from ext_common.cli import UserError

MU, S = 0.3, 0.4
X = torch.linspace(-2.5, 2.5, 9, dtype=torch.float64).view(-1, 1, 1, 1)


def levels_of(objective, timesteps=1000):
    return schedule_of(
        dict(
            objective=objective,
            timesteps=timesteps,
            beta_schedule="sigmoid",
            zero_terminal_snr=False,
        )
    )


def flow_velocity(x, tau):
    """E[ε − x_0 | (1 − τ) x_0 + τ ε = x] for x_0 ~ N(MU, S²), by the rule for Gaussians."""
    variance = ((1 - tau) * S) ** 2 + tau**2
    return -MU + (tau - (1 - tau) * S**2) / variance * (x - (1 - tau) * MU)


def curved(x, tau):
    return torch.tanh(1.3 * x + math.sin(5 * tau)) + 0.3 * torch.cos(2 * x - tau)


def as_network(objective, function, schedule):
    """denoise(x, t) of a network given as `function` of what it is shown and of the timestep's number."""
    entry = OBJECTIVES.get(objective)

    def denoise(x, t):
        a, s = float(schedule.alpha[t]), float(schedule.sigma[t])
        inside, _ = shown(entry, x, torch.full((len(x),), t), a, s)
        return entry.prediction(function(inside, t), x, a, s)

    return denoise


# --- flow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_the_levels_of_flow_are_even_in_its_time_and_end_in_noise(timesteps):
    schedule = levels_of("flow", timesteps)
    tau = schedule.sigma / (schedule.alpha + schedule.sigma)
    expected = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    torch.testing.assert_close(tau, expected, rtol=1e-9, atol=0)
    assert schedule.ends_in_noise


@pytest.mark.parametrize("network", [flow_velocity, curved])
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ddim", 1), ("heun:time=straight", 2)])
def test_samplers_on_rescaled_levels_are_flow_matchings_own(network, sampler, order):
    """Euler and Heun written down in (1 − τ) x_0 + τ ε, which knows no variance preserved; DDIM is Euler."""
    schedule, steps = levels_of("flow"), 8
    denoise = as_network("flow", lambda x, t: network(x, (t + 1) / 1000), schedule)
    found = SAMPLERS.bind(sampler)(denoise, X, trajectory(schedule, steps), None)
    x, h = X, 1 / steps
    for tau in torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist():
        slope = network(x, tau)
        if order == 2 and tau - h > 1e-9:
            slope = (slope + network(x - h * slope, tau - h)) / 2
        x = x - h * slope
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_samples_of_gaussian_data_follow_the_exact_map(objective):
    """x_0 = μ + S (x_T − a_T μ) / √(a_T² S² + s_T²), with 100 of 1,000 levels of each path of its own."""
    schedule, entry = levels_of(objective), OBJECTIVES.get(objective)
    a, s = float(schedule.alpha[-1]), float(schedule.sigma[-1])

    def denoise(x, t):
        a, s = float(schedule.alpha[t]), float(schedule.sigma[t])
        x0 = MU + a * S**2 / (a**2 * S**2 + s**2) * (x - a * MU)
        eps = (x - a * x0) / s
        # by the network's output and back
        return entry.prediction(entry.target(x0, eps, a, s), x, a, s)

    exact = MU + S * (X - a * MU) / math.sqrt(a**2 * S**2 + s**2)
    for sampler in ("dpmpp_2m", "heun", "heun:time=straight"):
        found = SAMPLERS.bind(sampler)(denoise, X, trajectory(schedule, 100), None)
        assert float((found - exact).abs().max()) < 4e-3, sampler


def test_training_pairs_have_the_exact_velocity_as_their_mean():
    """The regression of flow's target on what its network is shown, over a million pairs."""
    entry, source = OBJECTIVES.get("flow"), torch.Generator().manual_seed(1)
    x0, eps = (
        torch.randn(10**6, generator=source, dtype=torch.float64) * scale + shift
        for scale, shift in ((S, MU), (1, 0))
    )
    tau = 0.7
    norm = math.hypot(1 - tau, tau)
    a, s = (1 - tau) / norm, tau / norm
    x, _ = shown(entry, a * x0 + s * eps, torch.zeros(10**6), a, s)
    torch.testing.assert_close(x, (1 - tau) * x0 + tau * eps)
    target = entry.target(x0, eps, a, s)
    centred = x - x.mean()
    slope = float((centred * target).mean() / centred.square().mean())
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = flow_velocity(at, tau)
    assert slope == pytest.approx(float(expected[1] - expected[0]), abs=5e-3)
    assert float(target.mean() - slope * x.mean()) == pytest.approx(float(expected[0]), abs=5e-3)


# --- edm ------------------------------------------------------------------------------------------


def karras(sigma, data=0.5):
    """c_skip, c_out, c_in, λ of table 1."""
    total = sigma**2 + data**2
    return (
        data**2 / total,
        sigma * data / math.sqrt(total),
        1 / math.sqrt(total),
        total / (sigma * data) ** 2,
    )


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_edm_is_the_preconditioning_of_the_paper(sigma):
    entry = OBJECTIVES.get("edm")
    a = 1 / math.sqrt(1 + sigma**2)
    s = sigma * a
    skip, out, inside, weight = karras(sigma)
    noisy = X + sigma * X.flip(0)  # x_0 + σ ε
    output = curved(X, 0.5)
    found = entry.prediction(output, a * noisy, a, s)
    torch.testing.assert_close(found.x0, skip * noisy + out * output)
    torch.testing.assert_close(a * found.x0 + s * found.eps, a * noisy)
    given, time = shown(entry, a * noisy, torch.zeros(9), a, s)
    torch.testing.assert_close(given, inside * noisy)
    # ¼ ln σ, moved and stretched: as far between the ends as ln σ is
    share = math.log(sigma / 0.002) / math.log(80 / 0.002)
    assert time.tolist() == pytest.approx([999 * share] * 9, abs=1e-3)
    torch.testing.assert_close(
        entry.target(X, X.flip(0), a, s), (X - skip * noisy) / out, rtol=1e-6, atol=1e-6
    )
    snr = torch.tensor(1 / sigma**2, dtype=torch.float64)
    assert float(entry.per_x0_error(snr)) == pytest.approx(weight)


def test_edm_gives_back_what_it_is_shown_as_the_noise_goes():
    """D(x; σ) → x for any output of the network, in proportion to σ."""
    entry, far = OBJECTIVES.get("edm"), []
    for sigma in (1e-2, 1e-3, 1e-4):
        a = 1 / math.sqrt(1 + sigma**2)
        x0 = entry.prediction(torch.full_like(X, 5.0), a * X, a, sigma * a).x0
        far.append(float((x0 - X).abs().max()))
    assert far[0] < 0.07 and [far[0] / far[1], far[1] / far[2]] == pytest.approx([10, 10], rel=0.02)


def test_the_levels_of_edm_are_those_of_the_paper():
    schedule = levels_of("edm", 18)
    sigma = schedule.sigma / schedule.alpha
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(ends[0] + i / 17 * (ends[1] - ends[0])) ** 7 for i in range(18)]
    assert sigma.flip(0).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_no_noise_is_rescaled_where_the_path_is_the_objectives_own(objective):
    cfg = dict(objective=objective, timesteps=10, beta_schedule="sigmoid", zero_terminal_snr=True)
    with pytest.raises(UserError, match=f"--objective {objective} .*leave it out"):
        schedule_of(cfg)
    with pytest.raises(UserError, match="--timesteps 1 is too few"):
        levels_of(objective, 1)


# --- how often a level is trained -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, schedule, value, expected",
    [
        ("uniform", levels_of("flow"), lambda s: s.sigma / (s.alpha + s.sigma), stats.uniform()),
        (
            "logit_normal",
            levels_of("flow"),
            lambda s: torch.logit(s.sigma / (s.alpha + s.sigma) - 5e-4),
            stats.norm(),
        ),
        (
            "logit_normal:mean=0.5,std=0.7",
            build_schedule("cosine", 1000),
            lambda s: torch.logit((torch.arange(1000) + 0.5) / 1000),
            stats.norm(0.5, 0.7),
        ),
        ("edm", levels_of("edm"), lambda s: (s.sigma / s.alpha).log(), stats.norm(-1.2, 1.2)),
        (
            "edm:mean=0,std=1",
            build_schedule("linear", 4000),
            lambda s: (s.sigma / s.alpha).log(),
            stats.norm(),
        ),
    ],
)
def test_time_samplings_have_their_quantiles(name, schedule, value, expected):
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    t = TIME_SAMPLINGS.bind(name)(u, schedule)
    assert t.dtype == torch.int64 and int(t.min()) >= 0 and int(t.max()) < schedule.timesteps
    at = [0.05, 0.25, 0.5, 0.75, 0.95]
    found = torch.quantile(value(schedule)[t].double(), torch.tensor(at, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected.ppf(at).tolist(), abs=0.02)


def test_the_extremes_of_24_bits_are_timesteps():
    u = torch.tensor([0.0, 1 - 2.0**-24])
    for name in TIME_SAMPLINGS.names():
        for schedule in (levels_of("flow"), levels_of("edm"), build_schedule("sigmoid", 7)):
            t = TIME_SAMPLINGS.bind(name)(u, schedule)
            assert 0 <= int(t[0]) <= int(t[1]) < schedule.timesteps
