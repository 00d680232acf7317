"""What a network may predict: round trips at every noise level, diffusers' formulae, clipping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.objectives import OBJECTIVES, Prediction, clipped
from diffusion_ext.schedules import SCHEDULES, build_schedule
from diffusion_ext.weightings import loss_weights
from ext_common.cli import UserError

TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
numbers = st.floats(-10, 10)
objectives = pytest.mark.parametrize("objective", OBJECTIVES.names())


def test_what_is_registered():
    assert OBJECTIVES.names() == ("edm", "eps", "flow", "v", "x0")


def pair(seed=0, shape=(3, 2, 4, 4), dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=source, dtype=dtype) for _ in range(2))


# --- round trips ----------------------------------------------------------------------------------


@objectives
@given(x0=numbers, eps=numbers, angle=st.floats(1e-3, math.pi / 2))
def test_target_gives_back_image_and_noise(objective, x0, eps, angle):
    """At any noise level from sigma = 1e-3 on, a = 0 among them but for eps."""
    a, s = math.cos(angle), math.sin(angle)
    if objective == "eps":
        a = max(a, 1e-3)
    x0, eps = torch.tensor([x0, eps], dtype=torch.float64)
    entry = OBJECTIVES.get(objective)
    found = entry.prediction(entry.target(x0, eps, a, s), a * x0 + s * eps, a, s)
    # rounding of x_t, enlarged by 1/a or 1/s
    assert float(found.x0) == pytest.approx(float(x0), abs=1e-11)
    assert float(found.eps) == pytest.approx(float(eps), abs=1e-11)


@objectives
@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("zero", [False, True])
def test_round_trip_at_every_timestep(objective, name, zero):
    """A batch with one image at each timestep, levels broadcast as in training."""
    schedule = build_schedule(name, 1000, zero)
    x0, eps = pair(shape=(1000, 1, 2, 2))
    a, s = (table[:, None, None, None] for table in (schedule.alpha, schedule.sigma))
    x_t = a * x0 + s * eps
    entry = OBJECTIVES.get(objective)
    found = entry.prediction(entry.target(x0, eps, a, s), x_t, a, s)
    last = 999 if zero and objective == "eps" else 1000
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.x0[:last], x0[:last], rtol=0, atol=1e-10)


def test_eps_says_nothing_of_the_image_in_pure_noise():
    """Why it is refused there: 0/0, which no clipping should hide."""
    x0, eps = pair()
    found = OBJECTIVES.get("eps").prediction(eps, eps, torch.zeros(3, 1, 1, 1), 1.0)
    assert not found.x0.isfinite().any()


@objectives
def test_one_guess_is_the_same_in_every_objective(objective):
    """An x_0 that is wrong, expressed as an output of each, is read as the same x_0 and ε."""
    x_t, guess = pair(1)
    a, s = 0.8, 0.6
    eps = (x_t - a * guess) / s
    entry = OBJECTIVES.get(objective)
    found = entry.prediction(entry.target(guess, eps, a, s), x_t, a, s)
    torch.testing.assert_close(found.x0, guess)
    torch.testing.assert_close(found.eps, eps)


@given(angle=st.floats(1e-2, math.pi / 2 - 1e-2), x0=numbers, eps=numbers)
def test_v_is_the_velocity_along_the_circle(angle, x0, eps):
    """x = cos φ x_0 + sin φ ε, v = dx/dφ; by central difference."""
    h = 1e-5
    x = [math.cos(p) * x0 + math.sin(p) * eps for p in (angle - h, angle + h)]
    found = OBJECTIVES.get("v").target(x0, eps, math.cos(angle), math.sin(angle))
    assert found == pytest.approx((x[1] - x[0]) / (2 * h), abs=1e-7)


# --- diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("objective", TYPES)
def test_targets_and_predictions_as_diffusers(name, objective):
    """add_noise, get_velocity, and the x_0 and ε that DDIMScheduler derives, at some timesteps."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    schedule = build_schedule(name, 100)
    peer = diffusers.DDIMScheduler(
        100,
        trained_betas=schedule.betas.tolist(),
        prediction_type=TYPES[objective],
        clip_sample=False,
        timestep_spacing="trailing",
    )
    peer.alphas_cumprod = schedule.alphas_cumprod.clone()
    peer.set_timesteps(100)
    x0, noise = pair()
    output = torch.sin(3 * x0 + noise)
    entry = OBJECTIVES.get(objective)
    for t in (0, 1, 40, 98, 99):
        a, s = float(schedule.alpha[t]), float(schedule.sigma[t])
        at = torch.tensor([t])
        x_t = a * x0 + s * noise
        torch.testing.assert_close(peer.add_noise(x0, noise, at), x_t, rtol=1e-10, atol=1e-10)
        if objective == "v":
            velocity = peer.get_velocity(x0, noise, at)
            torch.testing.assert_close(entry.target(x0, noise, a, s), velocity)
        step = peer.step(output, t, x_t)
        found = entry.prediction(output, x_t, a, s)
        torch.testing.assert_close(found.x0, step.pred_original_sample, rtol=1e-9, atol=1e-9)
        before = schedule.alphas_cumprod[t - 1] if t else torch.ones((), dtype=torch.float64)
        moved = before.sqrt() * found.x0 + (1 - before).sqrt() * found.eps
        torch.testing.assert_close(moved, step.prev_sample, rtol=1e-9, atol=1e-9)


# --- clipping -------------------------------------------------------------------------------------


@given(
    x0=st.floats(-5, 5), eps=numbers, angle=st.floats(1e-3, math.pi / 2), limit=st.floats(0.1, 3)
)
def test_clipping_keeps_image_and_noise_adding_up(x0, eps, angle, limit):
    a, s = math.cos(angle), math.sin(angle)
    x0, eps = torch.tensor([x0, eps], dtype=torch.float64)
    x_t = a * x0 + s * eps
    found = clipped(Prediction(x0, eps), x_t, a, s, limit)
    assert float(found.x0) == min(max(float(x0), -limit), limit)
    assert float(a * found.x0 + s * found.eps) == pytest.approx(float(x_t), abs=1e-11)
    if abs(float(x0)) <= limit:
        assert float(found.eps) == pytest.approx(float(eps), abs=1e-11)


def test_a_network_that_is_sure_of_3_is_clipped_to_1():
    """In every objective, with the noise that then remains."""
    a, s = 0.6, 0.8
    x_t = torch.full((1, 1, 1, 1), 2.2, dtype=torch.float64)
    for name in OBJECTIVES.names():
        entry = OBJECTIVES.get(name)
        eps = (x_t - a * 3) / s
        output = entry.target(torch.full_like(x_t, 3), eps, a, s)
        found = clipped(entry.prediction(output, x_t, a, s), x_t, a, s)
        assert float(found.x0) == 1.0 and float(found.eps) == pytest.approx((2.2 - 0.6) / 0.8)


# --- somebody else's ------------------------------------------------------------------------------


def test_a_decorator_is_enough(monkeypatch):
    """Predicting −x_0, by name, through the denoiser and the weights of the loss."""
    for table in ("_entries", "_options"):
        monkeypatch.setattr(OBJECTIVES, table, dict(getattr(OBJECTIVES, table)))

    @OBJECTIVES.register("negative")
    class Negative:
        """−x_0."""

        @staticmethod
        def target(x0, eps, a, s):
            return -x0

        @staticmethod
        def prediction(output, x_t, a, s):
            return Prediction(-output, (x_t + a * output) / s)

        @staticmethod
        def per_x0_error(snr):
            return snr * 0 + 1

    schedule = build_schedule("linear", 30)
    x = torch.linspace(-0.9, 0.9, 5).view(5, 1, 1, 1)
    ours = Denoiser(lambda x, t, label, x0: -0.5 * x, schedule, "negative")(x, 12)
    theirs = Denoiser(lambda x, t, label, x0: 0.5 * x, schedule, "x0")(x, 12)
    torch.testing.assert_close(ours.x0, theirs.x0)
    torch.testing.assert_close(ours.eps, theirs.eps)
    found = loss_weights("min_snr", "negative", schedule.snr)
    torch.testing.assert_close(found, loss_weights("min_snr", "x0", schedule.snr))
    with pytest.raises(
        UserError, match="'negativ': did you mean 'negative'.* edm, eps, flow, negative, v, x0"
    ):
        Denoiser(None, schedule, "negativ")
