"""Noise schedules: what the network is shown at each of T timesteps.

A schedule is a table ᾱ of `timesteps` numbers that fall from nearly 1 to nearly 0 (`alphas_cumprod`):
x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε. Everything is computed in float64: in float32 the first noise levels are
off by up to 5e-4, in bfloat16 they are exactly 0.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ext_common.cli import UserError
from ext_common.registry import Registry

SCHEDULES = Registry("beta schedule")
TIME_SAMPLINGS = Registry("time sampling")
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ and what follows from it, float64 (T,); index 0 is the least noisy timestep.

    alpha = √ᾱ is the share of the image, sigma = √(1 − ᾱ) that of the noise.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.ndim != 1 or not len(table):
            raise ValueError("alphas_cumprod must be a float64 vector")
        falls = (table[1:] < table[:-1]).all()
        if not (torch.isfinite(table).all() and falls and table[0] < 1 and table[-1] >= 0):
            raise ValueError("alphas_cumprod must fall strictly, from below 1 to no less than 0")

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def alpha(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    @property
    def sigma(self) -> Tensor:
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """β_t = 1 − ᾱ_t / ᾱ_{t−1}, with ᾱ_{−1} = 1."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep holds nothing of the image (ᾱ_T = 0)."""
        return bool(self.alphas_cumprod[-1] == 0)

    @staticmethod
    def from_betas(betas: Tensor) -> "NoiseSchedule":
        return NoiseSchedule(torch.cumprod(1 - betas.double(), 0))


def check_timesteps(timesteps: int) -> None:
    if timesteps < 2:
        raise UserError(f"--timesteps {timesteps} is too few: 2 is the least, 1000 is usual")


def build_schedule(
    name: str, timesteps: int, zero_terminal_snr: bool = False, options: Any = None
) -> NoiseSchedule:
    """The registered schedule `name`, or "name:option=value,…", over `timesteps` ≥ 2 steps."""
    check_timesteps(timesteps)
    if options is None:
        betas = SCHEDULES.bind(name)(timesteps)
    else:
        betas = SCHEDULES.build(name, timesteps, options=options)
    try:
        schedule = NoiseSchedule.from_betas(betas)
        return rescale_zero_terminal_snr(schedule) if zero_terminal_snr else schedule
    except ValueError as error:
        raise UserError(
            f"--beta-schedule {name} is of no use with --timesteps {timesteps}"
            f" ({error}): choose milder options"
        ) from error


@dataclass
class SigmoidOptions:
    start: float = field(default=-3.0, metadata={"help": "where on the sigmoid timestep 0 lies"})
    end: float = field(default=3.0, metadata={"help": "where on the sigmoid timestep T lies"})
    tau: float = field(default=0.7, metadata={"help": "temperature: smaller is steeper"})
    clamp_min: float = field(default=1e-5, metadata={"help": "least β"})

    def __post_init__(self) -> None:
        if self.end <= self.start or self.tau <= 0 or not 0 < self.clamp_min < MAX_BETA:
            raise ValueError("needs start < end, tau > 0 and 0 < clamp_min < 0.999")


@SCHEDULES.register("sigmoid", options=SigmoidOptions)
def sigmoid_beta_schedule(
    timesteps: int,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 0.7,
    clamp_min: float = 1e-5,
) -> Tensor:
    """Sigmoid in t (Jabri et al. 2022, arXiv 2212.11972; Chen 2023, arXiv 2301.10972, Algorithm 1).

    ᾱ(u) = (σ(end/τ) − σ((start + u (end − start))/τ)) / (σ(end/τ) − σ(start/τ)) at u = (t + 1)/T. The formula
    ends in ᾱ_T = 0 exactly, which no prediction of the noise survives, so β is held in [clamp_min, 0.999].
    Returns β, float64 (timesteps,).
    """
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    curve = torch.sigmoid((start + u * (end - start)) / tau)
    alphas_cumprod = (curve[-1] - curve) / (curve[-1] - curve[0])
    return _betas_of(alphas_cumprod, clamp_min)


@dataclass
class CosineOptions:
    s: float = field(default=0.008, metadata={"help": "offset that keeps the first β from being 0"})

    def __post_init__(self) -> None:
        if self.s <= 0:
            raise ValueError("s must be above 0: without it the first timestep has no noise")


@SCHEDULES.register("cosine", options=CosineOptions)
def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """Squared cosine in t (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17), β at most 0.999.

    Returns β, float64 (timesteps,).
    """
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    curve = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    return _betas_of(curve / curve[0], 0.0)


@dataclass
class LinearOptions:
    first: float = field(default=1e-4, metadata={"help": "first β of 1,000 steps"})
    last: float = field(default=0.02, metadata={"help": "last β of 1,000 steps"})

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1:
            raise ValueError("needs 0 < first ≤ last < 1")


@SCHEDULES.register("linear", options=LinearOptions)
def linear_beta_schedule(timesteps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """β linear in t (Ho et al. 2020, arXiv 2006.11239), scaled by 1000/T as fewer steps need more noise.

    Below T = 20 the scaled β would pass 1; it is held at 0.999. Returns β, float64 (timesteps,).
    """
    scale = 1000 / timesteps
    betas = torch.linspace(scale * first, scale * last, timesteps, dtype=torch.float64)
    return betas.clamp(max=MAX_BETA)


def flow_schedule(timesteps: int) -> NoiseSchedule:
    """The straight path (1 − τ) x_0 + τ ε at τ = 1/T … 1, divided by √((1 − τ)² + τ²) as ours must be.

    The last level is pure noise.
    """
    check_timesteps(timesteps)
    tau = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return NoiseSchedule((1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2))


def edm_schedule(
    timesteps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseSchedule:
    """σ from `sigma_min` to `sigma_max`, even in σ^(1/ρ) (Karras et al. 2022, arXiv 2206.00364, equation 5).

    ᾱ = 1 / (1 + σ²), as x_0 + σ ε divided by √(1 + σ²) is x_t.
    """
    check_timesteps(timesteps)
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return NoiseSchedule(
        1 / (1 + torch.linspace(*ends, timesteps, dtype=torch.float64) ** (2 * rho))
    )


def rescale_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """√ᾱ stretched so that ᾱ_T = 0 and ᾱ_1 stays (Lin et al. 2023, arXiv 2305.08891, Algorithm 1)."""
    root = schedule.alpha
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule(root**2)


def _betas_of(alphas_cumprod: Tensor, least: float) -> Tensor:
    """β of a curve ᾱ (T + 1,) that begins at 1."""
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(least, MAX_BETA)


@TIME_SAMPLINGS.register("uniform")
def uniform_times(u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Every timestep as often as any other."""
    return _index(u, schedule)


@dataclass
class LogitNormalOptions:
    mean: float = field(default=0.0, metadata={"help": "above 0: more noise"})
    std: float = field(default=1.0, metadata={"help": "smaller: nearer to the middle"})

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError("std must be above 0")


@TIME_SAMPLINGS.register("logit_normal", options=LogitNormalOptions)
def logit_normal_times(
    u: Tensor, schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """logit(t / T) ~ N(mean, std²) (Esser et al. 2024, arXiv 2403.03206, section 3.1): the middle often."""
    return _index(torch.sigmoid(mean + std * _normal(u)), schedule)


@dataclass
class EdmTimeOptions:
    mean: float = field(default=-1.2, metadata={"help": "of ln σ"})
    std: float = field(default=1.2, metadata={"help": "of ln σ"})

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError("std must be above 0")


@TIME_SAMPLINGS.register("edm", options=EdmTimeOptions)
def edm_times(u: Tensor, schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln σ ~ N(mean, std²), σ = noise / image (Karras et al. 2022, table 1): the nearest timestep in ln σ."""
    # pure noise has no ln σ; no normal number comes near this one
    levels = (-0.5 * schedule.snr.log()).clamp(max=50.0).to(u.device)
    between = (levels[1:] + levels[:-1]) / 2
    return torch.searchsorted(between, mean + std * _normal(u))


def _normal(u: Tensor) -> Tensor:
    """Uniform numbers of 24 bits as normal ones, by the inverse of the distribution."""
    z: Tensor = torch.special.ndtri(u.double() + 2.0**-25)
    return z


def _index(share: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Shares in [0, 1) of the T timesteps as int64 indices."""
    last = schedule.timesteps - 1
    return (share.double() * schedule.timesteps).long().clamp(max=last)
