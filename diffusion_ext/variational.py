"""The variational bound, which is what a learned variance is trained by.

Nichol & Dhariwal 2021 (arXiv 2102.09672), sections 2.1 and 3.1; the bound is that of Ho et al. 2020 (arXiv
2006.11239), equation 5. All in float32, in nats a dimension.
"""

import math

import torch
from torch import Tensor

from diffusion_ext.schedules import NoiseSchedule


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
