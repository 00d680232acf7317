"""From a network to what samplers ask for: x_0 and ε at a timestep."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from diffusion_ext.objectives import OBJECTIVES, Objective, Prediction, clipped
from diffusion_ext.samplers import LearnedPrediction
from diffusion_ext.schedules import NoiseSchedule


class Denoiser:
    """denoise(x, timestep) for one batch on its way from noise to images.

    network(x, t, label, x0) → output (B, C or 2C, H, W), where x0 is what self-conditioning feeds back (None
    for a model without). label: (B,) or None; guidance: weight w of classifier-free guidance (Ho & Salimans
    2022, arXiv 2207.12598): out = none + w (label − none), 1 is the label alone; the label's is the learned
    variance. clip: x_0 held in [−1, 1].
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: NoiseSchedule,
        objective: str,
        *,
        label: Optional[Tensor] = None,
        guidance: float = 1.0,
        clip: bool = True,
        self_condition: bool = False,
    ):
        self.network = network
        self.objective: Objective = OBJECTIVES.get(objective)
        self.alpha, self.sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
        self.label, self.guidance, self.clip = label, guidance, clip
        self.self_condition = self_condition
        self.x0: Optional[Tensor] = None

    def __call__(self, x: Tensor, timestep: int) -> Prediction | LearnedPrediction:
        t = torch.full((len(x),), timestep, dtype=torch.long, device=x.device)
        output, fraction = self._output(x, t)
        a, s = self.alpha[timestep], self.sigma[timestep]
        predicted = self.objective.prediction(output, x, a, s)
        if self.clip:
            predicted = clipped(predicted, x, a, s)
        if self.self_condition:
            self.x0 = predicted.x0
        return predicted if fraction is None else LearnedPrediction(*predicted, fraction)

    def _output(self, x: Tensor, t: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        channels = x.shape[1]
        output, fraction = split_output(self.network(x, t, self.label, self.x0).float(), channels)
        if self.label is not None and self.guidance != 1:
            # the fraction is not extrapolated: it would leave [0, 1], and the noise its bounds
            without, _ = split_output(self.network(x, t, None, self.x0).float(), channels)
            output = without + self.guidance * (output - without)
        return output, fraction


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Optional[Tensor]]:
    """(B, C, …) as it is; (B, 2C, …) as prediction and fraction of the variance in [0, 1], given in [−1, 1].

    Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15.
    """
    if output.shape[1] == channels:
        return output, None
    output, fraction = output.split(channels, 1)
    return output, (fraction + 1) / 2
