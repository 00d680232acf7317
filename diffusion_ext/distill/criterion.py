"""`--criterion consistency`: two looks at one noisy image, a little apart on its way, see the same image.

Consistency tuning (Geng et al. 2024, arXiv 2406.14548), from a diffusion model on: f(x_t, t) is the x_0
that the network says; f(x_t, t) is drawn to f(x_r, r), r below t with the same image and noise, and to the
image itself where r would be below the first noise level. The two come nearer while it trains.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
from fairseq.criterions import register_criterion
from omegaconf import II
from torch import Tensor

from diffusion_ext.criterion import DdpmCriterion, DdpmCriterionConfig, uses_own_guess
from diffusion_ext.denoiser import split_output
from diffusion_ext.schedules import TIME_SAMPLINGS, NoiseSchedule
from ext_common.cli import UserError


@dataclass
class ConsistencyConfig(DdpmCriterionConfig):
    halvings: int = field(
        default=8,
        metadata={
            "help": "how often in the training the two looks come twice as near; 0: always to the image"
        },
    )
    max_update: int = II("optimization.max_update")


@register_criterion("consistency", dataclass=ConsistencyConfig)
class ConsistencyCriterion(DdpmCriterion):
    """Squared difference of two guesses at x_0, weighted as the objective's own error would be."""

    def __init__(self, cfg, task):
        super().__init__(cfg, task)
        nothing = torch.zeros(1)
        if self.objective.prediction(nothing + 1, nothing, 1.0, 0.0).x0 != 0:
            raise UserError(
                f"--objective {task.cfg.objective} does not give back an image without noise: distil a"
                " model of v, flow or edm"
            )
        if cfg.halvings < 0:
            raise UserError(f"--halvings {cfg.halvings} must be at least 0")
        self.tables["noise"] = noise_of(self.schedule)
        per_x0 = self.objective.per_x0_error(self.schedule.snr)
        self.tables["per_x0"] = per_x0 * self.tables["weight"]
        if cfg.time_sampling == "auto":
            self.times = usual_times(task.cfg.objective)

    def losses(self, model, batch: Dict) -> tuple[Tensor, Tensor]:
        """(loss to minimise, squared difference of the two guesses), each (B,)."""
        if uses_own_guess(model):
            raise UserError("--self-condition and --criterion consistency exclude each other")
        t, x0 = batch["t"], batch["x0"]
        distance = self.distance(self.table("noise", t.device)[t])
        r = partner(t, self.table("noise", t.device), distance)
        near = {**batch, "t": r.clamp(min=0), "x_t": self.noised(batch, r)}
        # what is random in the network (dropout) is the same in both looks
        devices = [t.device] if t.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            goal = torch.where((r < 0)[:, None, None, None], x0, self.guess(model, near))
        plain = ((self.guess(model, batch) - goal) ** 2).flatten(1).mean(1)
        weight = self.table("per_x0", t.device)[t] / distance
        return weight * plain, plain.detach()

    def guess(self, model, batch: Dict) -> Tensor:
        output, _ = split_output(self.output(model, batch, None), batch["x_t"].shape[1])
        return self.objective.prediction(output, batch["x_t"], *self.levels(batch["t"])).x0

    def noised(self, batch: Dict, r: Tensor) -> Tensor:
        """The same image and noise at the timesteps r."""
        a, s = self.levels(r.clamp(min=0))
        return a * batch["x0"] + s * batch["noise"]

    def distance(self, noise: Tensor) -> Tensor:
        """Share of the noise (B,) by which the nearer look has less; in validation that of the end."""
        share = self.num_updates / max(1, self.cfg.max_update) if self.training else 1.0
        return distance(noise, min(self.cfg.halvings, int(share * (self.cfg.halvings + 1))))


def noise_of(schedule: NoiseSchedule) -> Tensor:
    """σ = noise / image of each timestep, float64 (T,); for pure noise twice that of the level before."""
    noise = schedule.sigma / schedule.alpha
    return torch.where(noise.isinf(), 2 * noise[-2], noise)


def distance(noise: Tensor, stage: int) -> Tensor:
    """min(1, (1 + 8 sigmoid(−σ)) / 2^stage): 1 − r/t, r and t as σ (section 4.2, k = 8, b = 1, q = 2)."""
    return ((1 + 8 * torch.sigmoid(-noise)) / 2**stage).clamp(max=1.0)


def partner(t: Tensor, noise: Tensor, distance: Tensor) -> Tensor:
    """The timestep (B,) below t with σ at most (1 − distance) of that of t; −1 is the image itself."""
    wanted = noise[t] * (1 - distance)
    return torch.minimum(torch.searchsorted(noise, wanted, right=True) - 1, t - 1)


def usual_times(objective: str) -> Optional[Callable[..., Tensor]]:
    """ln σ ~ N(−1.1, 2²) on the levels of edm; uniform, which trains the first step as often, on others."""
    return TIME_SAMPLINGS.bind("edm:mean=-1.1,std=2") if objective == "edm" else None
