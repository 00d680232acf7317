"""Averages of any length, made after the training (Karras et al. 2024, arXiv 2312.02696, section 3).

A track of the power function weighs the weights of time τ by τ^γ. Its length is σ_rel, the standard deviation
of that profile as a share of the training: √(γ + 1) / ((γ + 2) √(γ + 3)). The profile of any other γ, at any
time, is near a sum of the profiles of two tracks at several times, their snapshots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# the tracks that are kept, and the lengths that they hold enough of
TRACKS = (0.05, 0.1)
SHORTEST, LONGEST = 0.04, 0.15


class Profile(NamedTuple):
    """What a track is at a time: weight p(τ) ∝ τ^gamma on 0 … `end`; `end` in any unit, updates say."""

    end: float
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """γ of a length: the largest root of (γ + 1) = σ_rel² (γ + 2)² (γ + 3), in (0, 0.2887)."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"σ_rel {sigma_rel} is not between 0 and 0.2887")
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


def sigma_rel_of(gamma: float) -> float:
    """Length of a profile, as a share of its end."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def power_decay(sigma_rel: float, images_seen: float, images: float) -> float:
    """Share of the old average that an update with `images` images leaves: (1 − images / seen)^(γ + 1).

    images_seen: with those of the update, so that the first leaves nothing.
    """
    return float((1 - images / images_seen) ** (gamma_of(sigma_rel) + 1))


def products(these: Sequence[Profile], those: Sequence[Profile]) -> np.ndarray:
    """∫ p_i(τ) p_j(τ) dτ of each with each, float64 (N, M)."""
    ends_i, gammas_i = np.array(these, dtype=np.float64).T[:, :, None]
    ends_j, gammas_j = np.array(those, dtype=np.float64).T[:, None, :]
    both = np.minimum(ends_i, ends_j)
    # shares of the end first, as end^γ leaves float64
    shares = (both / ends_i) ** gammas_i * (both / ends_j) ** gammas_j
    norms = (gammas_i + 1) * (gammas_j + 1) / (gammas_i + gammas_j + 1)
    found: np.ndarray = norms * shares * both / (ends_i * ends_j)
    return found


def combination(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Factors of the snapshots whose sum is nearest to the profile wanted, float64 (N,); least squares."""
    factors: np.ndarray
    factors, *_ = np.linalg.lstsq(
        products(snapshots, snapshots), products(snapshots, [wanted])[:, 0], rcond=None
    )
    return factors


def misfit(snapshots: Sequence[Profile], factors: np.ndarray, wanted: Profile) -> float:
    """How far the sum is from the profile wanted: L2 norm of the difference, as a share of the wanted's."""
    own = products([wanted], [wanted])[0, 0]
    cross = float(factors @ products(snapshots, [wanted])[:, 0])
    inside = float(factors @ products(snapshots, snapshots) @ factors)
    return float(max(0.0, (inside - 2 * cross + own) / own) ** 0.5)
