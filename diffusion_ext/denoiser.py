"""From a network to what samplers ask for: x_0 and ε at a timestep."""

import math
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

    guide: another network, of the same schedule and objective, in the place of `none` (Karras et al. 2024,
    arXiv 2406.02507), with the same labels or without any. interval: (low, high], the noise / image at which
    there is guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724). none_label: the label that means none,
    with which both halves are one batch.
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
        guide: Optional[Callable[..., Any]] = None,
        interval: tuple[float, float] = (0.0, math.inf),
        none_label: Optional[int] = None,
    ):
        self.network = network
        self.objective: Objective = OBJECTIVES.get(objective)
        self.alpha, self.sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
        self.label, self.guidance, self.clip = label, guidance, clip
        self.self_condition = self_condition
        self.guide, self.none_label = guide, none_label
        wanted = guidance != 1 and not (guide is None and label is None)
        self.guided = [
            wanted and interval[0] < (s / a if a else math.inf) <= interval[1]
            for a, s in zip(self.alpha, self.sigma, strict=True)
        ]
        self.x0: Optional[Tensor] = None

    def __call__(self, x: Tensor, timestep: int) -> Prediction | LearnedPrediction:
        t = torch.full((len(x),), timestep, dtype=torch.long, device=x.device)
        output, fraction = self._output(x, t, self.guided[timestep])
        a, s = self.alpha[timestep], self.sigma[timestep]
        predicted = self.objective.prediction(output, x, a, s)
        if self.clip:
            predicted = clipped(predicted, x, a, s)
        if self.self_condition:
            self.x0 = predicted.x0
        return predicted if fraction is None else LearnedPrediction(*predicted, fraction)

    def _output(self, x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Optional[Tensor]]:
        channels, label, guess = x.shape[1], self.label, self.x0
        if not guided:
            return split_output(self.network(x, t, label, guess).float(), channels)
        if self.guide is None and label is not None and self.none_label is not None:
            labels = torch.cat([label, torch.full_like(label, self.none_label)])
            guesses = None if guess is None else torch.cat([guess, guess])
            both = self.network(torch.cat([x, x]), torch.cat([t, t]), labels, guesses).float()
            said, other = both.chunk(2)
        else:
            said = self.network(x, t, label, guess).float()
            worse = self.guide or self.network
            other = worse(x, t, label if self.guide else None, guess).float()
        output, fraction = split_output(said, channels)
        # the fraction is not extrapolated: it would leave [0, 1], and the noise its bounds
        without, _ = split_output(other, channels)
        return without + self.guidance * (output - without), fraction


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Optional[Tensor]]:
    """(B, C, …) as it is; (B, 2C, …) as prediction and fraction of the variance in [0, 1], given in [−1, 1].

    Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15.
    """
    if output.shape[1] == channels:
        return output, None
    output, fraction = output.split(channels, 1)
    return output, (fraction + 1) / 2
