"""Weights of the loss over timesteps, as functions of the signal-to-noise ratio.

Each is defined by the weight it gives the squared error of x_0, so that it means the same for every
objective: the weight on an output is w(SNR) divided by `Objective.per_x0_error`.

Below them the variational bound, which a learned variance is trained by: Nichol & Dhariwal 2021 (arXiv
2102.09672), sections 2.1 and 3.1; the bound is that of Ho et al. 2020 (arXiv 2006.11239), equation 5. In
float32, in nats a dimension.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_ext.objectives import OBJECTIVES
from diffusion_ext.schedules import NoiseSchedule
from ext_common.registry import Registry

WEIGHTINGS = Registry("loss weighting")


def loss_weights(name: str, objective: str, snr: Tensor) -> Tensor:
    """Weight of the mean squared error of `objective` at each timestep, float64 (T,), finite and ≥ 0.

    name: registered, or "name:option=value,…".
    """
    weights: Tensor = WEIGHTINGS.bind(name)(snr, OBJECTIVES.get(objective).per_x0_error(snr))
    return weights


@WEIGHTINGS.register("none")
def unweighted(snr: Tensor, per_x0: Tensor) -> Tensor:
    """1: the plain error of the output (for eps the L_simple of Ho et al. 2020)."""
    return torch.ones_like(snr)


@dataclass
class MinSnrOptions:
    gamma: float = field(default=5.0, metadata={"help": "largest weight of the error of x_0"})

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError("gamma must be above 0")


@WEIGHTINGS.register("min_snr", options=MinSnrOptions)
def min_snr(snr: Tensor, per_x0: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, γ) on the error of x_0 (Hang et al. 2023, arXiv 2303.09556): eases the low noise levels."""
    return snr.clamp(max=gamma) / per_x0


@dataclass
class P2Options:
    k: float = field(default=1.0, metadata={"help": "k of 1 / (k + SNR)^gamma"})
    gamma: float = field(default=1.0, metadata={"help": "gamma of 1 / (k + SNR)^gamma"})

    def __post_init__(self) -> None:
        if self.k <= 0 or self.gamma < 0:
            raise ValueError("needs k > 0 and gamma ≥ 0")


@WEIGHTINGS.register("p2", options=P2Options)
def p2(snr: Tensor, per_x0: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + SNR)^γ on the error of ε (Choi et al. 2022, arXiv 2204.00227, equation 9)."""
    return snr / (k + snr) ** gamma / per_x0


class PosteriorTables:
    """q(x_{t−1} | x_t, x_0): mean = on_x0 x_0 + on_x x_t, and the logs of its variance and of β.

    The posterior's variance is 0 at t = 0; its logarithm there is that of t = 1: no noise is drawn with it.
    """

    def __init__(self, schedule: NoiseSchedule):
        ac, betas = schedule.alphas_cumprod, schedule.betas
        before = torch.cat([torch.ones(1, dtype=torch.float64), ac[:-1]])
        variance = betas * (1 - before) / (1 - ac)
        variance[0] = variance[1]
        self.on_x0 = (betas * before.sqrt() / (1 - ac)).float()
        self.on_x = ((1 - betas).sqrt() * (1 - before) / (1 - ac)).float()
        self.log_small, self.log_large = variance.log().float(), betas.log().float()

    def to(self, device: torch.device | str) -> "PosteriorTables":
        for name, table in vars(self).items():
            setattr(self, name, table.to(device))
        return self


def bound(
    tables: PosteriorTables, x0: Tensor, x_t: Tensor, t: Tensor, guess: Tensor, fraction: Tensor
) -> Tensor:
    """Term L_t of the bound for each image (B,): a KL divergence, at t = 0 the likelihood of 8-bit values.

    guess: predicted x_0, whose gradient the caller stops; fraction: of the log-variance, 0 posterior, 1 β.
    """
    shape = (-1, *[1] * (x0.ndim - 1))
    on_x0, on_x, small, large = (
        getattr(tables, name)[t].view(shape) for name in ("on_x0", "on_x", "log_small", "log_large")
    )
    mean, guessed = on_x0 * x0 + on_x * x_t, on_x0 * guess + on_x * x_t
    log_variance = fraction * large + (1 - fraction) * small
    divergence = gaussian_kl(mean, small, guessed, log_variance)
    first = -discretised_log_likelihood(x0, guessed, 0.5 * log_variance)
    return torch.where((t == 0).view(shape), first, divergence).flatten(1).mean(1)


def gaussian_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N_1 ‖ N_2), elementwise."""
    ratio = torch.exp(log_var_1 - log_var_2)
    return 0.5 * (
        log_var_2 - log_var_1 + ratio + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2) - 1
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of 8-bit values, scaled to [−1, 1], under a Gaussian: its mass within ± half a step.

    The outermost values take the whole tail. Elementwise; at least log 1e-12.
    """
    inverse, half = torch.exp(-log_std), 1 / 255
    above = _normal_cdf((x - mean + half) * inverse)
    below = _normal_cdf((x - mean - half) * inverse)
    above = torch.where(x > 0.999, torch.ones_like(above), above)
    below = torch.where(x < -0.999, torch.zeros_like(below), below)
    return torch.log((above - below).clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
