"""Timesteps, equality with diffusers where its schedulers are right, and what a sampler promises.

What samplers compute is in test_oracle.py.
"""

import math
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_ext.inference import DiffusionModel
from diffusion_ext.objectives import OBJECTIVES, Prediction, clipped
from diffusion_ext.pictures import to_uint8
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.samplers import (
    SAMPLERS,
    SPACINGS,
    LearnedPrediction,
    trajectory,
    transition,
    warn_of_large,
)
from diffusion_ext.schedules import SCHEDULES, build_schedule
from ext_common.cli import UserError

pytestmark = pytest.mark.pairs

TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
names = pytest.mark.parametrize("name", SCHEDULES.names())
objectives = pytest.mark.parametrize("objective", TYPES)
clips = pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
samplers = pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "heun"])


def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


# --- timesteps ------------------------------------------------------------------------------------


@st.composite
def lengths(draw, most=400):
    timesteps = draw(st.integers(2, most))
    return timesteps, draw(st.integers(1, timesteps))


@pytest.mark.parametrize("spacing", SPACINGS.names())
@given(sizes=lengths(), name=st.sampled_from(SCHEDULES.names()), zero=st.booleans())
def test_timesteps_start_at_the_last_fall_and_end_at_the_image(spacing, sizes, name, zero):
    timesteps, steps = sizes
    schedule = build_schedule(name, timesteps, zero)
    levels = trajectory(schedule, steps, spacing).levels
    chosen = [level.timestep for level in levels]
    assert len(chosen) == steps + 1
    assert chosen[0] == timesteps - 1 and chosen[-1] == -1
    assert all(a > b for a, b in zip(chosen, chosen[1:], strict=False))
    assert levels[-1] == (-1, 1.0, 0.0)
    for t, alpha, sigma in levels[:-1]:
        assert (alpha, sigma) == (float(schedule.alpha[t]), float(schedule.sigma[t]))
    if steps == timesteps:
        assert chosen == list(range(timesteps - 1, -2, -1))


@given(sizes=lengths(2000))
def test_trailing_is_even_in_t(sizes):
    """Counted from the image, from 1 on, number i of S is the first timestep not before T i / S."""
    timesteps, steps = sizes
    schedule = SimpleNamespace(timesteps=timesteps)
    found = SPACINGS.get("trailing")(schedule, steps)[::-1]
    for i, t in enumerate(found):
        assert t * steps < timesteps * (i + 1) <= (t + 1) * steps
    gaps = np.diff(found)
    assert steps < 2 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "timesteps, steps", [(1000, 50), (1000, 20), (1000, 1000), (100, 4), (10, 1)]
)
def test_trailing_as_diffusers_where_it_divides(timesteps, steps):
    peer = diffusers().DDIMScheduler(timesteps, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    levels = trajectory(build_schedule("cosine", timesteps), steps).levels
    assert [level.timestep for level in levels[:-1]] == peer.timesteps.tolist()


@names
@pytest.mark.parametrize("zero", [False, True])
def test_logsnr_is_even_in_log_snr(name, zero):
    """As near as whole timesteps allow: no other timestep is nearer to the wanted value."""
    schedule = build_schedule(name, 4000, zero)
    chosen = SPACINGS.get("logsnr")(schedule, 12)
    assert chosen[0] == 3999 and chosen[-1] == 0
    snr = schedule.snr.numpy().copy()
    # where β is near 1 the scale ends at half the alpha, a quarter of the SNR, of the level before
    snr[-1] = max(snr[-1], snr[-2] / 4)
    scale = np.log(snr)
    wanted = np.linspace(scale[-1], scale[0], 12)
    for t, value in zip(chosen, wanted, strict=True):
        assert abs(scale[t] - value) == pytest.approx(np.abs(scale - value).min(), abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS.names())
@pytest.mark.parametrize("steps", [0, -1, 11, 1000])
def test_impossible_numbers_of_steps(spacing, steps):
    said = f"--steps {steps} is not possible: the model was trained with 10 timesteps, give 1 to 10"
    with pytest.raises(UserError, match=re.escape(said)):
        trajectory(build_schedule("linear", 10), steps, spacing)


def test_unknown_spacing_and_sampler():
    with pytest.raises(UserError, match="did you mean 'trailing'.* known: logsnr, trailing"):
        trajectory(build_schedule("linear", 10), 5, "trail")
    with pytest.raises(
        UserError,
        match="did you mean 'heun'.* known: consistency, ddim, ddpm, dpmpp_2m, euler, heun",
    ):
        SAMPLERS.get("huen")


@names
@given(sizes=lengths())
def test_transition_is_the_forward_step(name, sizes):
    """Noising x_then by (kept, fresh) gives the level x_now: kept · alpha, kept² sigma² + fresh."""
    schedule = build_schedule(name, sizes[0], sizes[0] % 2 == 0)
    for _, now, then in trajectory(schedule, sizes[1]).steps:
        kept, fresh = transition(now, then)
        assert kept * then.alpha == pytest.approx(now.alpha, rel=1e-12)
        assert kept**2 * then.sigma**2 + fresh == pytest.approx(now.sigma**2, rel=1e-10)
        assert 0 < fresh <= 1


@names
@pytest.mark.parametrize("timesteps", [5, 10, 15, 1000])
def test_transition_of_neighbours_is_beta(name, timesteps):
    """Also where linear holds several β at 0.999, and ᾱ is 1e-15."""
    schedule = build_schedule(name, timesteps)
    fresh = [transition(now, then)[1] for _, now, then in trajectory(schedule, timesteps).steps]
    np.testing.assert_allclose(fresh, schedule.betas.flip(0), rtol=1e-10)


# --- against diffusers ----------------------------------------------------------------------------


def curved(x, t):
    """Stands for a network: bounded, not linear, different at every timestep."""
    return torch.tanh(1.3 * x + math.sin(t)) + 0.3 * torch.cos(x * 2 - t / 7)


def denoiser(schedule, objective, clip):
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()

    def denoise(x, t):
        found = OBJECTIVES.get(objective).prediction(curved(x, t), x, alpha[t], sigma[t])
        return clipped(found, x, alpha[t], sigma[t]) if clip else found

    return denoise


def peer_of(kind, schedule, objective, exactly, **options):
    """A scheduler of diffusers with our β; `exactly`: and with our ᾱ in float64 instead of its float32."""
    peer = getattr(diffusers(), kind)(
        schedule.timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=TYPES[objective],
        **options,
    )
    if exactly:
        peer.alphas_cumprod = schedule.alphas_cumprod.clone()
    return peer


def start(seed=0, shape=(2, 1, 4, 4), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noises(seed, like):
    source = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(like.shape, generator=source, dtype=like.dtype)


def walk(peer, x, **options):
    """All its steps; of the last the image it predicts: DDPMScheduler adds noise there unless t is 0."""
    for t in peer.timesteps:
        step = peer.step(curved(x, int(t)), t, x, **options)
        x = step.prev_sample
    return getattr(step, "pred_original_sample", x)


@names
@objectives
@pytest.mark.parametrize(
    "clip, exactly, tolerance",
    # unclipped from near noise √(1/ᾱ_T) is large, and only equal tables can be compared
    [(True, True, 1e-10), (False, True, 1e-10), (True, False, 1e-4)],
    ids=["clipped", "unclipped", "clipped-float32"],
)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [100, 10, 7])
def test_ddpm_as_diffusers(name, objective, clip, exactly, tolerance, variance, steps):
    """On any list of timesteps."""
    schedule = build_schedule(name, 100)
    path = trajectory(schedule, steps)
    peer = peer_of(
        "DDPMScheduler",
        schedule,
        objective,
        exactly,
        clip_sample=clip,
        variance_type=f"fixed_{variance}",
    )
    peer.set_timesteps(timesteps=[level.timestep for level in path.levels[:-1]])
    x = start()
    expected = walk(peer, x, generator=torch.Generator().manual_seed(5))
    found = SAMPLERS.build(
        "ddpm",
        denoiser(schedule, objective, clip),
        x,
        path,
        noises(5, x),
        options={"variance": variance},
    )
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@names
@objectives
@clips
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 20, 4])
def test_ddim_as_diffusers(name, objective, clip, eta, steps):
    """Trailing where S divides T, elsewhere its previous timestep is wrong; ε derived anew when clipped."""
    schedule = build_schedule(name, 100)
    peer = peer_of(
        "DDIMScheduler", schedule, objective, True, clip_sample=clip, timestep_spacing="trailing"
    )
    peer.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    peer.set_timesteps(steps)
    x = start()
    source = torch.Generator().manual_seed(5)
    expected = walk(peer, x, eta=eta, generator=source, use_clipped_model_output=clip)
    found = SAMPLERS.build(
        "ddim",
        denoiser(schedule, objective, clip),
        x,
        trajectory(schedule, steps),
        noises(5, x),
        options={"eta": eta},
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@names
@objectives
@pytest.mark.parametrize("steps", [100, 20, 10, 7, 2, 1])
@pytest.mark.parametrize("spacing", SPACINGS.names())
def test_dpmpp_as_diffusers(name, objective, steps, spacing):
    """DPM-Solver++ 2M, midpoint, last step of first order; with our levels in its float32 list."""
    schedule = build_schedule(name, 100)
    path = trajectory(schedule, steps, spacing)
    peer = peer_of(
        "DPMSolverMultistepScheduler", schedule, objective, True, algorithm_type="dpmsolver++"
    )
    assert (peer.config.solver_order, peer.config.solver_type) == (2, "midpoint")
    peer.set_timesteps(timesteps=[level.timestep for level in path.levels[:-1]])
    levels = torch.tensor([level.sigma / level.alpha for level in path.levels], dtype=torch.float64)
    torch.testing.assert_close(peer.sigmas.double(), levels, rtol=1e-5, atol=0)
    peer.sigmas = levels
    x = start()
    # its own arithmetic is float32 in part, whatever its tables
    expected = walk(peer, x)
    found = SAMPLERS.get("dpmpp_2m")(denoiser(schedule, objective, False), x, path, None)
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=5e-6)


@names
@pytest.mark.parametrize("steps", [50, 5])
def test_zero_terminal_snr_as_diffusers(name, steps):
    """DDIM and DDPM with v, of which the first step holds no image at all."""
    schedule = build_schedule(name, 50, True)
    x, path = start(), trajectory(schedule, steps)
    peer = peer_of(
        "DDIMScheduler", schedule, "v", True, clip_sample=False, timestep_spacing="trailing"
    )
    peer.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    peer.set_timesteps(steps)
    found = SAMPLERS.get("ddim")(denoiser(schedule, "v", False), x, path, None)
    torch.testing.assert_close(found, walk(peer, x), rtol=1e-10, atol=1e-10)

    peer = peer_of("DDPMScheduler", schedule, "v", True, clip_sample=False)
    peer.set_timesteps(timesteps=[level.timestep for level in path.levels[:-1]])
    expected = walk(peer, x, generator=torch.Generator().manual_seed(2))
    found = SAMPLERS.get("ddpm")(denoiser(schedule, "v", False), x, path, noises(2, x))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@names
@pytest.mark.parametrize("steps", [60, 6])
def test_learned_variance_as_diffusers(name, steps):
    """`learned_range` of Improved DDPM: log-variances between the posterior's and β."""
    schedule = build_schedule(name, 60)
    path, x = trajectory(schedule, steps), start()
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()

    def denoise(x, t):
        found = OBJECTIVES.get("v").prediction(curved(x, t), x, alpha[t], sigma[t])
        return LearnedPrediction(*found, (torch.sin(3 * x) + 1) / 2)

    peer = peer_of(
        "DDPMScheduler", schedule, "v", True, clip_sample=False, variance_type="learned_range"
    )
    peer.set_timesteps(timesteps=[level.timestep for level in path.levels[:-1]])
    expected, source = x, torch.Generator().manual_seed(9)
    for t in peer.timesteps:
        output = torch.cat([curved(expected, int(t)), torch.sin(3 * expected)], 1)
        step = peer.step(output, t, expected, generator=source)
        expected = step.prev_sample
    expected = step.pred_original_sample
    for variance in ("auto", "learned"):
        found = SAMPLERS.build(
            "ddpm", denoise, x, path, noises(9, x), options={"variance": variance}
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- promises -------------------------------------------------------------------------------------


def run(name, denoise, x, path, noise, **options):
    return SAMPLERS.build(name, denoise, x, path, noise, options=options)


@names
@pytest.mark.parametrize("zero", [False, True])
def test_learned_fraction_0_is_small_and_1_is_large(name, zero):
    schedule = build_schedule(name, 40, zero)
    path, x = trajectory(schedule, 13), start()
    plain = denoiser(schedule, "v", True)
    for fraction, variance in ((0.0, "small"), (1.0, "large")):

        def learned(x, t, fraction=fraction):
            return LearnedPrediction(*plain(x, t), torch.full_like(x, fraction))

        expected = run("ddpm", plain, x, path, noises(1, x), variance=variance)
        for asked in ("learned", "auto"):
            found = run("ddpm", learned, x, path, noises(1, x), variance=asked)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        # who asks for another gets it
        found = run("ddpm", learned, x, path, noises(1, x), variance="small")
        torch.testing.assert_close(
            found, run("ddpm", plain, x, path, noises(1, x), variance="small")
        )


def test_auto_without_a_learned_variance_is_small():
    schedule = build_schedule("linear", 40)
    path, x, denoise = trajectory(schedule, 13), start(), denoiser(schedule, "v", True)
    small, auto, large = (
        run("ddpm", denoise, x, path, noises(1, x), variance=v) for v in ("small", "auto", "large")
    )
    assert torch.equal(small, auto) and not torch.allclose(small, large)


def test_learned_variance_that_was_not_learned():
    schedule = build_schedule("linear", 40)
    x, path = start(), trajectory(schedule, 13)
    with pytest.raises(UserError, match="variance=learned needs .* --learned-variance"):
        run("ddpm", denoiser(schedule, "v", True), x, path, noises(1, x), variance="learned")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("ddpm:variance=smal", "bad value 'smal' for variance: did you mean 'small'?"),
        ("ddim:eta=1.5", "eta must be in [0, 1]"),
        ("ddim:eta=-0.1", "eta must be in [0, 1]"),
        ("ddim:etta=1", "unknown option 'etta': did you mean 'eta'?"),
        ("dpmpp_2m:eta=1", "unknown option 'eta'; it has no options"),
    ],
)
def test_bad_options(spec, said):
    name, _, given_options = spec.partition(":")
    with pytest.raises(UserError, match=re.escape(said)):
        SAMPLERS.options(name, given_options)


@pytest.mark.parametrize(
    "name, options, noisy",
    [
        ("ddpm", {}, True),
        ("ddpm", {"variance": "large"}, True),
        ("ddim", {}, False),
        ("ddim", {"eta": 1.0}, True),
        ("dpmpp_2m", {}, False),
        ("heun", {}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("zero", [False, True])
def test_the_last_step_is_the_predicted_image_and_asks_for_no_noise(name, options, noisy, zero):
    schedule = build_schedule("sigmoid", 30, zero)
    path, x, guesses, asked = trajectory(schedule, 8), start(dtype=torch.float32), [], []
    plain = denoiser(schedule, "v", True)

    def denoise(x, t):
        guesses.append(plain(x, t))
        return guesses[-1]

    def noise(i):
        asked.append(i)
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(i))

    seen = []
    found = SAMPLERS.build(
        name, denoise, x, path, noise, watch=lambda *step: seen.append(step), options=options
    )
    assert torch.equal(found, guesses[-1].x0)
    assert asked == (list(range(7)) if noisy else [])
    # watch is told of each step: its number, x after it, the image predicted in it
    assert [step[0] for step in seen] == list(range(8))
    assert torch.equal(seen[-1][1], found) and torch.equal(seen[-1][2], guesses[-1].x0)
    first = guesses[0].x0
    assert torch.equal(seen[0][2], first) and seen[0][1].shape == x.shape
    assert found.dtype == torch.float32 and found.isfinite().all()


def evaluations(name, path):
    """How many times a sampler asks the network."""
    asked = []

    def denoise(x, timestep):
        asked.append(timestep)
        return Prediction(x, x)

    nothing = torch.zeros(())
    SAMPLERS.get(name)(denoise, nothing, path, lambda i: nothing)
    return len(asked)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_evaluations(zero, steps):
    path = trajectory(build_schedule("cosine", 20, zero), steps)
    counted = {name: evaluations(name, path) for name in ("ddim", "ddpm", "dpmpp_2m", "heun")}
    assert counted == dict(ddim=steps, ddpm=steps, dpmpp_2m=steps, heun=2 * steps - 1)


@samplers
def test_inputs_are_left_alone(name):
    schedule = build_schedule("sigmoid", 30)
    x = start()
    before = x.clone()
    drawn = torch.full_like(x, 0.5)
    SAMPLERS.get(name)(denoiser(schedule, "v", True), x, trajectory(schedule, 5), lambda i: drawn)
    assert torch.equal(x, before) and (drawn == 0.5).all()


@samplers
@pytest.mark.parametrize("name_of_schedule", SCHEDULES.names())
@objectives
@clips
def test_finite_in_float32_for_all_timesteps(name, name_of_schedule, objective, clip):
    """Also unclipped with eps from ᾱ_T = 1e-9 on, where √(1/ᾱ) is 3e4."""
    schedule = build_schedule(name_of_schedule, 200)
    x = start(dtype=torch.float32)
    denoise = denoiser(schedule, objective, clip)
    found = SAMPLERS.get(name)(denoise, x, trajectory(schedule, 200), noises(3, x))
    assert found.isfinite().all()
    assert not clip or found.abs().max() <= 1


# --- somebody else's ------------------------------------------------------------------------------


@dataclass
class OwnOptions:
    scale: float = field(default=1.0, metadata={"help": "of the image"})


class Still(nn.Module):
    """Stands for a trained model: v = −x, of which x_0 = (a + s) x."""

    self_condition = False

    def __init__(self):
        super().__init__()
        self.ema = SimpleNamespace(weights=[1.0])

    def forward(self, x, t, label, x0, average):
        return -x


def test_a_decorator_is_enough(fresh_samplers):
    """A sampler of somebody's own is asked for by name, with its options, as ours are."""

    @fresh_samplers.register("mine", options=OwnOptions)
    def mine(denoise, x, path, noise, watch=None, scale=1.0):
        """One look, from where everything is noise."""
        return scale * denoise(x, path.levels[0].timestep).x0

    cfg = dict(beta_schedule="cosine", timesteps=50, zero_terminal_snr=False, objective="v")
    spec = dict(height=4, width=4, channels=1, classes=[], condition_size=0)
    model = DiffusionModel(Still(), cfg, spec)
    found = model.sample(3, sampler="mine:scale=0.25", steps=10, seed=4)
    schedule = build_schedule("cosine", 50)
    noise = ImageNoise(4, [0, 1, 2], (1, 4, 4)).start
    x0 = ((schedule.alpha[-1] + schedule.sigma[-1]).float() * noise).clamp(-1, 1) * 0.25
    np.testing.assert_array_equal(found, to_uint8(x0))
    assert evaluations("mine", trajectory(schedule, 10)) == 1
    with pytest.raises(
        UserError, match="known: consistency, ddim, ddpm, dpmpp_2m, euler, heun, mine"
    ):
        model.sample(1, sampler="yours")


def test_a_spacing_of_ones_own(monkeypatch):
    monkeypatch.setattr(SPACINGS, "_entries", dict(SPACINGS._entries))
    monkeypatch.setattr(SPACINGS, "_options", dict(SPACINGS._options))

    @SPACINGS.register("squares")
    def squares(schedule, steps):
        return [schedule.timesteps - 1 - i * i for i in range(steps)]

    levels = trajectory(build_schedule("linear", 30), 5, "squares").levels
    assert [level.timestep for level in levels] == [29, 28, 25, 20, 13, -1]


@pytest.mark.parametrize(
    "steps, variance, said", [(7, "large", 1), (8, "large", 0), (7, "small", 0), (8, "auto", 0)]
)
def test_too_much_variance_is_said_once(caplog, steps, variance, said):
    warn_of_large.cache_clear()
    path = trajectory(build_schedule("linear", 8, False), steps)
    x = torch.zeros(1, 1, 2, 2)
    for _ in range(2):
        SAMPLERS.bind(f"ddpm:variance={variance}")(
            lambda x, t: SimpleNamespace(x0=x, eps=x), x, path, lambda i: x
        )
    assert len([r for r in caplog.records if "all 8 timesteps: with 7" in r.message]) == said
