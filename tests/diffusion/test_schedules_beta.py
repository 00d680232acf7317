"""Noise schedules: closed forms in numpy, two independent implementations, refusals."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext.objectives import check_combination
from diffusion_ext.schedules import (
    MAX_BETA,
    SCHEDULES,
    NoiseSchedule,
    build_schedule,
    cosine_beta_schedule,
    linear_beta_schedule,
    rescale_zero_terminal_snr,
    sigmoid_beta_schedule,
)
from ext_common.cli import UserError

pytestmark = pytest.mark.pairs

NAMES = ("cosine", "linear", "sigmoid")
LENGTHS = (10, 100, 1000, 4000)
both = pytest.mark.parametrize("zero_terminal", [False, True], ids=["plain", "zero_terminal"])
every = pytest.mark.parametrize("name", NAMES)
length = pytest.mark.parametrize("timesteps", LENGTHS)


def closed_form(name, timesteps, start=-3.0, end=3.0, tau=0.7, s=0.008, first=1e-4, last=0.02):
    """ᾱ at every timestep, without any bound on β; no cumulative product where there is a formula."""
    u = np.arange(1, timesteps + 1) / timesteps
    if name == "sigmoid":  # σ(x) = (1 + tanh(x/2)) / 2, of which the halves cancel
        low, high, here = (np.tanh(x / 2 / tau) for x in (start, end, start + u * (end - start)))
        return (high - here) / (high - low)
    if name == "cosine":
        return (np.cos(np.pi / 2 * (u + s) / (1 + s)) / np.cos(np.pi / 2 * s / (1 + s))) ** 2
    rates = np.interp(np.arange(timesteps), [0, timesteps - 1], [first, last]) * 1000 / timesteps
    return np.exp(np.cumsum(np.log1p(-np.minimum(rates, MAX_BETA))))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def numbers(schedule):
    return {n: getattr(schedule, n) for n in ("alphas_cumprod", "alpha", "sigma", "snr", "betas")}


def test_the_tables_below_name_every_registered_schedule():
    assert SCHEDULES.names() == NAMES


# --- values -------------------------------------------------------------------------------------


@every
@length
def test_closed_form(name, timesteps):
    """Equal to 1e-12 but for the last timestep, whose β is held at 0.999 where the formula says 1."""
    found = build_schedule(name, timesteps).alphas_cumprod.numpy()
    expected = closed_form(name, timesteps)
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-9)
    if name != "linear":
        assert abs(expected[-1]) < 1e-15
        assert found[-1] == pytest.approx(found[-2] * (1 - MAX_BETA), rel=1e-12)


@pytest.mark.parametrize(
    "spec, options",
    [
        ("sigmoid", dict(start=-3, end=3, tau=1.0)),
        ("sigmoid", dict(start=0, end=3, tau=0.3)),
        ("cosine", dict(s=0.1)),
        ("linear", dict(first=1e-3, last=0.01)),
    ],
)
def test_options_are_those_of_the_formula(spec, options):
    text = spec + ":" + ",".join(f"{key}={value}" for key, value in options.items())
    found = build_schedule(text, 200).alphas_cumprod
    assert torch.equal(build_schedule(spec, 200, options=options).alphas_cumprod, found)
    np.testing.assert_allclose(found[:-1], closed_form(spec, 200, **options)[:-1], atol=1e-12)
    assert (found - build_schedule(spec, 200).alphas_cumprod).abs().max() > 0.01


@pytest.mark.parametrize(
    "function, given",
    [
        (sigmoid_beta_schedule, dict(start=-3.0, end=3.0, tau=0.7, clamp_min=1e-5)),
        (cosine_beta_schedule, dict(s=0.008)),
        (linear_beta_schedule, dict(first=1e-4, last=0.02)),
    ],
)
def test_functions_have_the_defaults_of_the_options(function, given):
    name = function.__name__.partition("_")[0]
    for timesteps in (10, 1000):
        assert torch.equal(function(timesteps), SCHEDULES.build(name, timesteps))
        assert torch.equal(function(timesteps), function(timesteps, **given))


def test_least_beta_of_the_sigmoid():
    betas = sigmoid_beta_schedule(50, start=-20.0, clamp_min=1e-3)
    free = sigmoid_beta_schedule(50, start=-20.0, clamp_min=1e-30)
    assert float(free[0]) < 1e-10 and float(betas.min()) == 1e-3
    assert torch.equal(betas[free > 1e-3], free[free > 1e-3])


def test_linear_means_the_same_noise_for_every_length():
    """∏ (1 − β) ≈ exp(−Σ β), and Σ β = 1000 · (first + last) / 2 whatever T."""
    for timesteps in (100, 1000, 4000):
        betas = build_schedule("linear", timesteps).betas
        assert float(betas.sum()) == pytest.approx(10.05, rel=1e-12)
    # below 20 steps the scaled rate passes 1
    betas = SCHEDULES.build("linear", 10)
    np.testing.assert_allclose(betas, np.minimum(np.linspace(0.01, 2, 10), MAX_BETA))


def test_what_the_anchors_of_the_project_measured():
    """Where log-SNR crosses 0 and how much of the image is left at T (cosine, linear)."""
    found = {n: build_schedule(n, 1000) for n in NAMES}
    crossing = {n: int((s.snr < 1).nonzero()[0]) for n, s in found.items()}
    assert crossing["linear"] == pytest.approx(259, abs=1)
    assert crossing["cosine"] == pytest.approx(496, abs=1)
    assert crossing["sigmoid"] == pytest.approx(500, abs=1)
    assert float(found["linear"].alpha[-1]) == pytest.approx(6.4e-3, rel=0.01)
    assert float(found["cosine"].alpha[-1]) == pytest.approx(4.9e-5, rel=0.01)
    assert float(build_schedule("sigmoid:tau=1", 1000).alpha[-1]) == pytest.approx(5.5e-4, rel=0.01)


@pytest.mark.parametrize("timesteps", [20, 100, 1000, 4000])
def test_as_denoising_diffusion_pytorch(timesteps):
    """Whose sigmoid has ends in float32 (6e-8, times T in β) and another tau by default."""
    reason = "denoising-diffusion-pytorch is not installed"
    peer = pytest.importorskip(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch", reason=reason
    )
    for name in NAMES:
        options = {"tau": 0.7} if name == "sigmoid" else {}
        expected = getattr(peer, f"{name}_beta_schedule")(timesteps, **options)
        found = SCHEDULES.build(name, timesteps)
        assert found.dtype == torch.float64
        tolerance = 2e-8 * timesteps if name == "sigmoid" else 1e-13
        clipped = expected.clamp(max=MAX_BETA)  # it clips its linear schedule nowhere
        torch.testing.assert_close(found, clipped, rtol=0, atol=tolerance)


# --- properties -----------------------------------------------------------------------------------


@both
@every
@given(timesteps=st.integers(2, 1500))
def test_every_schedule_falls_strictly_and_is_finite(name, zero_terminal, timesteps):
    schedule = build_schedule(name, timesteps, zero_terminal)
    check_table(schedule, timesteps, zero_terminal)


@both
@every
@length
def test_usual_lengths_fall_strictly_and_are_finite(name, zero_terminal, timesteps):
    schedule = build_schedule(name, timesteps, zero_terminal)
    check_table(schedule, timesteps, zero_terminal)


def check_table(schedule, timesteps, zero_terminal):
    ac, betas = schedule.alphas_cumprod, schedule.betas
    assert schedule.timesteps == len(ac) == timesteps
    for table in numbers(schedule).values():
        assert table.dtype == torch.float64 and table.isfinite().all()
    assert (ac.diff() < 0).all() and 0 < ac[0] < 1 and (ac[:-1] > 0).all()
    assert schedule.ends_in_noise == zero_terminal == (float(ac[-1]) == 0)
    assert (betas > 0).all()
    if zero_terminal:
        assert (betas[:-1] < 1).all() and betas[-1] == 1
    else:
        assert float(betas.max()) <= MAX_BETA * (1 + 1e-12) and ac[-1] > 0
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(ac))
    torch.testing.assert_close(
        schedule.snr, schedule.alpha**2 / schedule.sigma**2, rtol=1e-9, atol=0
    )
    # no timestep without noise, also in the float32 that training computes in
    assert (schedule.sigma.float() > 1e-4).all()


@both
@every
@length
def test_the_default_dtype_changes_nothing(name, zero_terminal, timesteps):
    tables = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            tables.append(numbers(build_schedule(name, timesteps, zero_terminal)))
    for other in tables[1:]:
        assert all(torch.equal(tables[0][key], other[key]) for key in other)


@every
@given(timesteps=st.integers(2, 1500))
def test_betas_are_those_the_schedule_was_made_of(name, timesteps):
    betas = SCHEDULES.build(name, timesteps)
    found = build_schedule(name, timesteps).betas
    torch.testing.assert_close(found, betas, rtol=1e-9, atol=1e-13)


# --- zero terminal SNR ----------------------------------------------------------------------------


@every
@length
def test_rescaling_is_algorithm_1_of_lin_and_others(name, timesteps):
    plain = build_schedule(name, timesteps)
    found = build_schedule(name, timesteps, zero_terminal_snr=True)
    root = np.sqrt(plain.alphas_cumprod.numpy())
    # the straight line through (√ᾱ_T, 0) and (√ᾱ_1, √ᾱ_1)
    expected = np.interp(root, [root[-1], root[0]], [0, root[0]])
    np.testing.assert_allclose(found.alpha, expected, atol=1e-14)
    assert float(found.alphas_cumprod[-1]) == 0
    assert float(found.alphas_cumprod[0]) == pytest.approx(
        float(plain.alphas_cumprod[0]), rel=1e-15
    )
    again = rescale_zero_terminal_snr(found)
    np.testing.assert_allclose(again.alphas_cumprod, found.alphas_cumprod, rtol=1e-14)


@every
@length
def test_rescaling_as_diffusers(name, timesteps):
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm", reason="no diffusers")
    plain = build_schedule(name, timesteps)
    expected = ddpm.rescale_zero_terminal_snr(plain.betas.clone())
    found = build_schedule(name, timesteps, zero_terminal_snr=True)
    torch.testing.assert_close(found.betas, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("timesteps", [10, 1000])
@every
def test_as_a_scheduler_of_diffusers_sees_it(name, timesteps):
    """From our β, float32: its 1 − 0.999 is off by 1.3e-5, and so a factor of every β held there."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    schedule = build_schedule(name, timesteps)
    peer = diffusers.DDPMScheduler(timesteps, trained_betas=schedule.betas.tolist())
    found = peer.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, found, rtol=1e-4, atol=0)


# --- somebody else's, and what is refused ---------------------------------------------------------


@dataclass
class PowerOptions:
    power: float = field(default=2.0, metadata={"help": "of u"})


@pytest.fixture
def own_schedule(monkeypatch):
    """`mine`: ᾱ = (1 − u)^power but for the last timestep, by nothing but the decorator."""
    for table in ("_entries", "_options"):
        monkeypatch.setattr(SCHEDULES, table, dict(getattr(SCHEDULES, table)))

    @SCHEDULES.register("mine", options=PowerOptions)
    def mine(timesteps, power=2.0):
        """Powers."""
        u = torch.arange(timesteps + 1, dtype=torch.float64) / (timesteps + 1)
        curve = (1 - u) ** power
        return 1 - curve[1:] / curve[:-1]


def test_a_decorator_is_enough(own_schedule):
    u = torch.arange(1, 31, dtype=torch.float64) / 31
    torch.testing.assert_close(build_schedule("mine", 30).alphas_cumprod, (1 - u) ** 2)
    found = build_schedule("mine:power=3", 30)
    torch.testing.assert_close(found.alphas_cumprod, (1 - u) ** 3)
    assert build_schedule("mine", 30, zero_terminal_snr=True).ends_in_noise
    assert "mine: Powers." in SCHEDULES.describe() and "of u (default: 2.0)" in SCHEDULES.describe()
    with pytest.raises(
        UserError, match="did you mean 'mine'.* known: cosine, linear, mine, sigmoid"
    ):
        build_schedule("mines", 30)


def test_a_schedule_in_float32_is_computed_in_float64(own_schedule):
    @SCHEDULES.register("half_hearted")
    def half_hearted(timesteps):
        return torch.full((timesteps,), 0.5)

    found = build_schedule("half_hearted", 40).alphas_cumprod
    assert torch.equal(found, 0.5 ** torch.arange(1, 41, dtype=torch.float64))


def test_a_schedule_that_is_none_is_refused(own_schedule):
    """A formula re-typed without a bound on β: β_T = 1 twice, or a first timestep without noise."""

    @SCHEDULES.register("unbounded")
    def unbounded(timesteps):
        return torch.linspace(0.0, 1.5, timesteps, dtype=torch.float64)

    with pytest.raises(UserError, match="^--beta-schedule unbounded is of no use .*fall strictly"):
        build_schedule("unbounded", 30)


@pytest.mark.parametrize(
    "spec, timesteps, said",
    [
        (
            "sigmoyd",
            10,
            "unknown beta schedule 'sigmoyd': did you mean 'sigmoid'? known: cosine, linear, s",
        ),
        ("xyz", 10, "unknown beta schedule 'xyz'; known: cosine, linear, sigmoid"),
        ("sigmoid", 1, "--timesteps 1 is too few"),
        ("sigmoid", -5, "--timesteps -5 is too few"),
        (
            "sigmoid:taux=1",
            10,
            "unknown option 'taux': did you mean 'tau'? known: start, end, tau, cl",
        ),
        ("sigmoid:tau=0", 10, "needs start < end, tau > 0 and 0 < clamp_min < 0.999"),
        ("sigmoid:start=3", 10, "needs start < end"),
        ("sigmoid:clamp_min=0", 10, "0 < clamp_min"),
        ("sigmoid:clamp_min=0.999", 10, "clamp_min < 0.999"),
        ("sigmoid:tau=nan", 10, "bad value 'nan' for tau: expected float"),
        ("cosine:s=0", 10, "s must be above 0"),
        ("cosine:s=x", 10, "bad value 'x' for s: expected float"),
        ("linear:first=0", 10, "needs 0 < first ≤ last < 1"),
        ("linear:first=0.03", 10, "needs 0 < first ≤ last < 1"),
        ("linear:last=1", 10, "needs 0 < first ≤ last < 1"),
        (
            "linear:last=0.9,first=0.9",
            1000,
            "linear:last=0.9,first=0.9 is of no use with --timesteps 1000",
        ),
        ("sigmoid:tau=0.01", 1000, "--beta-schedule sigmoid:tau=0.01 is of no use"),
        ("sigmoid:end=inf", 10, "--beta-schedule sigmoid:end=inf is of no use"),
        ("linear:first=1e-30", 10, "--beta-schedule linear:first=1e-30 is of no use"),
    ],
)
@both
def test_refused_in_words(spec, timesteps, zero_terminal, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        build_schedule(spec, timesteps, zero_terminal)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9, 0.5], dtype=torch.float32),
        torch.tensor([[0.9, 0.5]], dtype=torch.float64),
        torch.tensor([], dtype=torch.float64),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.tensor([0.9, 0.9], dtype=torch.float64),
        torch.tensor([0.5, 0.9], dtype=torch.float64),
        torch.tensor([0.9, -0.1], dtype=torch.float64),
        torch.tensor([0.9, float("nan")], dtype=torch.float64),
        torch.tensor([float("nan"), 0.9], dtype=torch.float64),
    ],
)
def test_tables_that_are_no_schedule(table):
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        NoiseSchedule(table)


@pytest.mark.parametrize(
    "objective, weighting, flag",
    [
        ("eps", "none", "--objective eps"),
        ("eps", "min_snr", "--objective eps"),
        ("v", "min_snr", "--loss-weighting min_snr"),
        ("v", "min_snr:gamma=3", "--loss-weighting min_snr:gamma=3"),
        ("x0", "p2", "--loss-weighting p2"),
    ],
)
@every
def test_what_cannot_work_where_the_last_timestep_is_noise(name, objective, weighting, flag):
    with pytest.raises(UserError, match=f"^{re.escape(flag)} .*--zero-terminal-snr") as caught:
        check_combination(objective, weighting, build_schedule(name, 20, True))
    assert "\n" not in str(caught.value) and "use --" in str(caught.value)
    check_combination(objective, weighting, build_schedule(name, 20))
    check_combination("v", "none", build_schedule(name, 20, True))
    check_combination("x0", "none", build_schedule(name, 20, True))
