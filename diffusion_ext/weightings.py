"""Weights of the loss over timesteps, as functions of the signal-to-noise ratio.

Each is defined by the weight it gives the squared error of x_0, so that it means the same for every
objective: the weight on an output is w(SNR) divided by `Objective.per_x0_error`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_ext.objectives import OBJECTIVES
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
