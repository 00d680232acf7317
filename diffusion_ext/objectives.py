"""What the network predicts: the noise, the image, or the velocity between them.

With a = √ᾱ and s = √(1 − ᾱ), a² + s² = 1, the noisy image is x_t = a x_0 + s ε. Any one of ε, x_0 and
v = a ε − s x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4) gives the other two. So does what flow
matching and EDM predict: their noisy images are ours divided by a number, which the network is shown
(`shown`), so that every sampler works with every objective.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_ext.schedules import NoiseSchedule, build_schedule, edm_schedule, flow_schedule
from ext_common.cli import UserError
from ext_common.registry import Registry

OBJECTIVES = Registry("objective")
Share = Tensor | float  # a number for a whole batch, or one an image


class Prediction(NamedTuple):
    """One guess at both parts of x_t, each of its shape."""

    x0: Tensor
    eps: Tensor


class Objective(Protocol):
    """Static functions; a and s broadcast over the images, and are > 0 but for a at ᾱ = 0.

    Two more where they are wanted: `shown(x_t, t, a, s)`, what the network is given in place of x_t and t,
    and `schedule(timesteps)`, the `NoiseSchedule` that the objective brings along.
    """

    @staticmethod
    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """What the network should give."""

    @staticmethod
    def prediction(output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        """What its output says of x_0 and ε."""

    @staticmethod
    def per_x0_error(snr: Tensor) -> Tensor:
        """Factor from a squared error of x_0 to the squared error of the output that means the same."""


@OBJECTIVES.register("eps")
class Eps:
    """The noise ε (Ho et al. 2020, arXiv 2006.11239, equation 14); cannot be used where ᾱ_T = 0."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return eps

    @staticmethod
    def prediction(output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        return Prediction((x_t - s * output) / a, output)

    @staticmethod
    def per_x0_error(snr: Tensor) -> Tensor:
        return snr


@OBJECTIVES.register("x0")
class X0:
    """The image x_0."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return x0

    @staticmethod
    def prediction(output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        return Prediction(output, (x_t - a * output) / s)

    @staticmethod
    def per_x0_error(snr: Tensor) -> Tensor:
        return snr * 0 + 1


@OBJECTIVES.register("v")
class V:
    """The velocity v = a ε − s x_0: the noise where there is little of it, the image where there is much."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * eps - s * x0

    @staticmethod
    def prediction(output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        return Prediction(a * x_t - s * output, s * x_t + a * output)

    @staticmethod
    def per_x0_error(snr: Tensor) -> Tensor:
        return snr + 1


@OBJECTIVES.register("flow")
class Flow:
    """The velocity u = ε − x_0 of the straight path (1 − τ) x_0 + τ ε (Lipman et al. 2022, arXiv 2210.02747).

    With τ = s / (a + s) a point of that path is x_t / (a + s), which the network is shown.
    """

    schedule = staticmethod(flow_schedule)

    @staticmethod
    def target(x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return eps - x0

    @staticmethod
    def prediction(output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        return Prediction((x_t - s * output) / (a + s), (x_t + a * output) / (a + s))

    @staticmethod
    def per_x0_error(snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()).square()

    @staticmethod
    def shown(x_t: Tensor, t: Tensor, a: Share, s: Share) -> tuple[Tensor, Tensor]:
        return x_t / (a + s), t


@OBJECTIVES.register("edm")
class Edm:
    """F of D(x; σ) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, arXiv 2206.00364, table 1).

    With σ = s / a their noisy image x_0 + σ ε is x_t / a. The plain error of F is their weight
    λ(σ) = 1 / c_out² on that of D. c_noise = ln(σ) / 4 is moved and stretched to 0 … 999, the range that
    `time_features` is made for, from σ of 0.002 to 80.
    """

    SIGMA_DATA = 0.5
    schedule = staticmethod(edm_schedule)

    @classmethod
    def target(cls, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        out: Tensor = (s / cls.SIGMA_DATA * x0 - cls.SIGMA_DATA * a * eps) / cls._total(a, s)
        return out

    @classmethod
    def prediction(cls, output: Tensor, x_t: Tensor, a: Share, s: Share) -> Prediction:
        total, deviation = cls._total(a, s), cls.SIGMA_DATA
        # c_skip x + c_out F, and the noise without the difference of two large numbers
        x0 = a * (deviation / total) ** 2 * x_t + s * deviation / total * output
        return Prediction(x0, s / total**2 * x_t - a * deviation / total * output)

    @classmethod
    def per_x0_error(cls, snr: Tensor) -> Tensor:
        return snr + 1 / cls.SIGMA_DATA**2

    @classmethod
    def shown(cls, x_t: Tensor, t: Tensor, a: Share, s: Share) -> tuple[Tensor, Tensor]:
        low, high = math.log(0.002), math.log(80)
        sigma = (torch.as_tensor(s, dtype=torch.float64) / a).to(t.device)
        time = ((sigma.log() - low) / (high - low) * 999).float()
        return x_t / cls._total(a, s), time.flatten().expand(len(t))

    @classmethod
    def _total(cls, a: Share, s: Share) -> Any:
        """√(σ² + σ_data²) / √(σ² + 1): the deviation of x_t where that of the images is SIGMA_DATA."""
        return (s**2 + (cls.SIGMA_DATA * a) ** 2) ** 0.5


def shown(
    objective: Objective, x_t: Tensor, t: Tensor, a: Share, s: Share
) -> tuple[Tensor, Tensor]:
    """(images, times) that the network of an objective is given for x_t at the timesteps t (B,)."""
    own = getattr(objective, "shown", None)
    return own(x_t, t, a, s) if own else (x_t, t)


def schedule_of(cfg: Mapping[str, Any]) -> NoiseSchedule:
    """The noise levels that the options of a task describe; UserError for what is not known.

    An objective with a path of its own divides that into `timesteps`, and `beta_schedule` is not asked.
    """
    own = getattr(OBJECTIVES.get(cfg["objective"]), "schedule", None)
    if own is None:
        return build_schedule(cfg["beta_schedule"], cfg["timesteps"], cfg["zero_terminal_snr"])
    if cfg["zero_terminal_snr"]:
        raise UserError(
            f"--zero-terminal-snr changes a --beta-schedule, which --objective {cfg['objective']} has none"
            " of: leave it out"
        )
    found: NoiseSchedule = own(cfg["timesteps"])
    return found


def check_combination(objective: str, weighting: str, schedule: NoiseSchedule) -> None:
    """UserError for an objective or a loss weighting that cannot work with the schedule."""
    if not schedule.ends_in_noise:
        return
    if objective == "eps":
        raise UserError(
            "--objective eps cannot work where the last timestep is pure noise (--zero-terminal-snr):"
            " nothing of the image follows from the noise there; use --objective v"
        )
    if weighting.partition(":")[0] != "none":
        raise UserError(
            f"--loss-weighting {weighting} never trains the last timestep where it is pure noise"
            " (--zero-terminal-snr, --objective flow), and sampling starts there: use --loss-weighting none"
        )


def clipped(
    prediction: Prediction, x_t: Tensor, a: Share, s: Share, limit: float = 1.0
) -> Prediction:
    """x_0 held in [−limit, limit], and ε derived anew from it, so that both still add up to x_t."""
    x0 = prediction.x0.clamp(-limit, limit)
    return Prediction(x0, (x_t - a * x0) / s)
