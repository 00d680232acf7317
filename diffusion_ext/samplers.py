"""Samplers: from noise to images along a falling list of noise levels.

A sampler is a function of a denoiser, the noise to start from and a `Trajectory` of levels; it knows neither
network nor objective nor schedule. Someone's own is one decorated function:

    @SAMPLERS.register("mine")
    def mine(denoise, x, path, noise, watch): ...

denoise(x, timestep) → `Prediction` (or a `LearnedPrediction`); x: (B, C, H, W) at the first level; noise(i) →
standard normal of x's shape for step i; watch(i, x, x0) is called after each step. Returns x_0 of x's shape.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_ext.schedules import NoiseSchedule
from ext_common.cli import UserError
from ext_common.registry import Registry

logger = logging.getLogger(__name__)
SAMPLERS = Registry("sampler")
SPACINGS = Registry("spacing")


class LearnedPrediction(NamedTuple):
    """A `Prediction` with the network's word on the variance: 0 is the posterior's, 1 is β."""

    x0: Tensor
    eps: Tensor
    fraction: Tensor


class Guess(Protocol):
    """What samplers read of a `Prediction` or a `LearnedPrediction`."""

    @property
    def x0(self) -> Tensor: ...

    @property
    def eps(self) -> Tensor: ...


Denoise = Callable[[Tensor, int], Guess]
Noise = Callable[[int], Tensor]
Watch = Callable[[int, Tensor, Tensor], None]


class Level(NamedTuple):
    """One noise level: x = alpha x_0 + sigma ε, alpha² + sigma² = 1; `timestep` −1 is the image."""

    timestep: int
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """λ = log(alpha / sigma): −∞ for pure noise, ∞ for the image."""
        if self.alpha == 0 or self.sigma == 0:
            return -math.inf if self.alpha == 0 else math.inf
        return math.log(self.alpha / self.sigma)


@dataclass(frozen=True)
class Trajectory:
    """The levels a sampler passes through, from T − 1 down to the image itself."""

    levels: tuple[Level, ...]

    @property
    def steps(self) -> list[tuple[int, Level, Level]]:
        """(number, from, to) of each step."""
        return [
            (i, *pair) for i, pair in enumerate(zip(self.levels, self.levels[1:], strict=False))
        ]


def trajectory(schedule: NoiseSchedule, steps: int, spacing: str = "trailing") -> Trajectory:
    """`steps` levels of the schedule, from its last timestep T − 1 on, and then the image.

    spacing: how the timesteps are chosen (`SPACINGS`). UserError for steps outside 1 … T.
    """
    total = schedule.timesteps
    if not 1 <= steps <= total:
        raise UserError(
            f"--steps {steps} is not possible: the model was trained with {total} timesteps, give"
            f" 1 to {total}"
        )
    chosen = SPACINGS.build(spacing, schedule, steps)
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    levels = [Level(t, alpha[t], sigma[t]) for t in chosen]
    return Trajectory((*levels, Level(-1, 1.0, 0.0)))


@SPACINGS.register("trailing")
def trailing(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in t from T − 1 on: ⌈T (S − i) / S⌉ − 1 (Lin et al. 2023, arXiv 2305.08891, section 3.3)."""
    total = schedule.timesteps
    return [-(-total * (steps - i) // steps) - 1 for i in range(steps)]


@SPACINGS.register("logsnr")
def even_log_snr(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in log-SNR from T − 1 down to 0 (Lu et al. 2022, arXiv 2206.00927), to the nearest timestep."""
    snr = schedule.snr
    # a last level with next to nothing of the image would draw many steps towards itself, where no timesteps
    # are (cosine and sigmoid at T = 1,000: 999, 998, 997, 996): half the alpha before it ends the scale
    log_snr = snr.clamp(min=float(snr[-2]) / 4).log()
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    nearest = (log_snr[None] - wanted[:, None]).abs().argmin(1).tolist()
    total = schedule.timesteps
    chosen: list[int] = []
    for i, t in enumerate(nearest):
        # strictly falling, and leaving a timestep for each step that is still to come
        t = min(t, chosen[-1] - 1) if chosen else total - 1
        chosen.append(max(t, steps - 1 - i))
    return chosen


def no_watch(i: int, x: Tensor, x0: Tensor) -> None:
    pass


@dataclass
class DdpmOptions:
    variance: str = field(
        default="auto",
        metadata={
            "help": "of the noise added: small (the posterior's for a single image), large (β), learned (by a"
            " model trained so), auto (learned where there is one, else small)",
            "choices": ["auto", "small", "large", "learned"],
        },
    )


@SAMPLERS.register("ddpm", options=DdpmOptions)
def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: Trajectory,
    noise: Noise,
    watch: Watch = no_watch,
    variance: str = "auto",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eq. 6, 7 and 11), on any sub-list of timesteps.

    The last step adds no noise. `large` is better with all 1,000 steps and ruinous with few.
    """
    if variance == "large":
        warn_of_large(len(path.steps), path.levels[0].timestep + 1)
    for i, now, then in path.steps:
        predicted = denoise(x, now.timestep)
        kept, fresh = transition(now, then)
        mean = (then.alpha * fresh / now.sigma**2) * predicted.x0
        mean = mean + (kept * then.sigma**2 / now.sigma**2) * x
        if then.sigma > 0:
            std = _ancestral_std(predicted, fresh, fresh * then.sigma**2 / now.sigma**2, variance)
            mean = mean + std * noise(i)
        x = mean
        watch(i, x, predicted.x0)
    return x


def transition(now: Level, then: Level) -> tuple[float, float]:
    """(√(ᾱ_now/ᾱ_then), 1 − ᾱ_now/ᾱ_then): what a noising step from `then` to `now` keeps and adds."""
    kept = now.alpha / then.alpha
    # not (now.sigma² − then.sigma²) / then.alpha²: between two levels of little but noise that is 0/0
    fresh = (1 - kept) * (1 + kept) if then.sigma > 0 else now.sigma**2
    return kept, fresh


@cache
def warn_of_large(steps: int, total: int) -> None:
    """Once, for fewer steps than timesteps."""
    if steps < total:
        logger.warning(
            f"ddpm:variance=large is for all {total} timesteps: with {steps} it leaves much noise in the"
            " images, variance=small does not"
        )


def _ancestral_std(predicted: Guess, large: float, small: float, variance: str) -> Tensor | float:
    fraction = getattr(predicted, "fraction", None)
    if variance == "learned" and fraction is None:
        raise UserError(
            "variance=learned needs a model trained with --learned-variance: use small or large"
        )
    if variance == "large":
        return math.sqrt(large)
    if variance == "small" or fraction is None:
        return math.sqrt(small)
    return torch.exp(0.5 * (fraction * math.log(large) + (1 - fraction) * math.log(small)))


@dataclass
class DdimOptions:
    eta: float = field(
        default=0.0, metadata={"help": "share of fresh noise: 0 none, 1 that of ancestral sampling"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError("eta must be in [0, 1]")


@SAMPLERS.register("ddim", options=DdimOptions)
def ddim(
    denoise: Denoise,
    x: Tensor,
    path: Trajectory,
    noise: Noise,
    watch: Watch = no_watch,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equations 12 and 16)."""
    for i, now, then in path.steps:
        predicted = denoise(x, now.timestep)
        _, fresh = transition(now, then)
        std = eta * math.sqrt(fresh) * then.sigma / now.sigma
        x = then.alpha * predicted.x0
        x = x + math.sqrt(max(0.0, then.sigma**2 - std**2)) * predicted.eps
        if std > 0:
            x = x + std * noise(i)
        watch(i, x, predicted.x0)
    return x


@SAMPLERS.register("euler")
def euler(
    denoise: Denoise, x: Tensor, path: Trajectory, noise: Noise, watch: Watch = no_watch
) -> Tensor:
    """Euler's method on the path of flow matching, dx/dτ = ε − x_0 (see `straight`); where DDIM ends too."""
    for i, now, then in path.steps:
        predicted = denoise(x, now.timestep)
        (scale, tau), (scale_then, tau_then) = straight(now), straight(then)
        x = scale_then * (x / scale + (tau_then - tau) * (predicted.eps - predicted.x0))
        watch(i, x, predicted.x0)
    return x


def straight(level: Level) -> tuple[float, float]:
    """(alpha + sigma, τ): a level's x divided by the first is (1 − τ) x_0 + τ ε."""
    total = level.alpha + level.sigma
    return total, level.sigma / total


@dataclass
class HeunOptions:
    time: str = field(
        default="angle",
        metadata={
            "help": "in which the ODE is followed: angle (atan of noise / image), straight (the path of flow"
            " matching)",
            "choices": ["angle", "straight"],
        },
    )


@SAMPLERS.register("heun", options=HeunOptions)
def heun(
    denoise: Denoise,
    x: Tensor,
    path: Trajectory,
    noise: Noise,
    watch: Watch = no_watch,
    time: str = "angle",
) -> Tensor:
    """Heun's method on the probability-flow ODE, two evaluations a step but for the last: 2 S − 1.

    In the angle atan(sigma / alpha) the ODE is dx/dangle = v = alpha ε − sigma x_0. Karras et al. 2022 (arXiv
    2206.00364, Algorithm 1) take sigma/alpha instead, in which a step from nearly pure noise is nearly
    infinite: 10 such steps of the sigmoid schedule ended 50 times as far from the solution on digits.
    """
    for i, now, then in path.steps:
        predicted = denoise(x, now.timestep)
        ahead = then.alpha * predicted.x0 + then.sigma * predicted.eps
        if then.sigma > 0 and time == "straight":
            corrected = denoise(ahead, then.timestep)
            (scale, tau), (scale_then, tau_then) = straight(now), straight(then)
            velocity = predicted.eps - predicted.x0 + corrected.eps - corrected.x0
            ahead = scale_then * (x / scale + (tau_then - tau) / 2 * velocity)
        elif then.sigma > 0:
            corrected = denoise(ahead, then.timestep)
            turn = math.atan2(then.sigma, then.alpha) - math.atan2(now.sigma, now.alpha)
            velocity = now.alpha * predicted.eps - now.sigma * predicted.x0
            velocity = velocity + then.alpha * corrected.eps - then.sigma * corrected.x0
            ahead = x + (turn / 2) * velocity
        x = ahead
        watch(i, x, predicted.x0)
    return x


@SAMPLERS.register("dpmpp_2m")
def dpmpp_2m(
    denoise: Denoise, x: Tensor, path: Trajectory, noise: Noise, watch: Watch = no_watch
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): second order, one evaluation a step.

    The first and the last step are of first order; with one step it is DDIM.
    """
    before = None  # (x_0, step in λ) of the step before
    for i, now, then in path.steps:
        predicted = denoise(x, now.timestep)
        x0, h = predicted.x0, then.half_log_snr - now.half_log_snr
        guess = x0
        if before is not None and then.sigma > 0:
            # h / (2 h_before), which is 0 after a first step from pure noise
            weight = h / (2 * before[1])
            guess = (1 + weight) * x0 - weight * before[0]
        # −then.alpha (e^−h − 1) = then.alpha − then.sigma now.alpha / now.sigma
        x = (then.sigma / now.sigma) * x
        x = x + (then.alpha - then.sigma * now.alpha / now.sigma) * guess
        before = x0, h
        watch(i, x, x0)
    return x


@SAMPLERS.register("consistency")
def consistency(
    denoise: Denoise, x: Tensor, path: Trajectory, noise: Noise, watch: Watch = no_watch
) -> Tensor:
    """For a distilled model: each guess noised anew (Song et al. 2023, arXiv 2303.01469, Algorithm 1)."""
    for i, now, then in path.steps:
        x0 = denoise(x, now.timestep).x0
        x = then.alpha * x0 + then.sigma * noise(i) if then.sigma > 0 else x0
        watch(i, x, x0)
    return x
