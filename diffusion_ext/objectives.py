"""What the network predicts: the noise, the image, or the velocity between them.

With a = √ᾱ and s = √(1 − ᾱ), a² + s² = 1, the noisy image is x_t = a x_0 + s ε. Any one of ε, x_0 and
v = a ε − s x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4) gives the other two.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from diffusion_ext.schedules import NoiseSchedule
from ext_common.cli import UserError
from ext_common.registry import Registry

OBJECTIVES = Registry("objective")
Share = Tensor | float  # a number for a whole batch, or one an image


class Prediction(NamedTuple):
    """One guess at both parts of x_t, each of its shape."""

    x0: Tensor
    eps: Tensor


class Objective(Protocol):
    """Static functions; a and s broadcast over the images, and are > 0 but for a at ᾱ = 0."""

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
            " (--zero-terminal-snr), and sampling starts there: use --loss-weighting none"
        )


def clipped(
    prediction: Prediction, x_t: Tensor, a: Share, s: Share, limit: float = 1.0
) -> Prediction:
    """x_0 held in [−limit, limit], and ε derived anew from it, so that both still add up to x_t."""
    x0 = prediction.x0.clamp(-limit, limit)
    return Prediction(x0, (x_t - a * x0) / s)
