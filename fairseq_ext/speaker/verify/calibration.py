"""From scores to log-likelihood ratios: logistic regression on the score and measures of quality."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

# Keeps the slope finite where the scores separate the classes; elsewhere it changes no printed digit.
RIDGE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """log-likelihood ratio = features · weights + offset. weights: float64 (F,)."""

    weights: np.ndarray
    offset: float

    def llr(self, features: np.ndarray) -> np.ndarray:
        """Natural log-likelihood ratios float64 (N,) of features (N, F)."""
        ratios: np.ndarray = np.asarray(features, dtype=np.float64) @ self.weights + self.offset
        return ratios


def fit_calibration(features: np.ndarray, targets: np.ndarray, prior: float = 0.5) -> Calibration:
    """Prior-weighted logistic regression (Brümmer & du Preez 2006; training log-odds taken off).

    features: (N, F), the score first; targets: bool (N,). With l = features · weights + offset and
    τ = log(prior / (1 − prior)) it minimises prior · mean over targets of log(1 + e^−(l+τ)) +
    (1 − prior) · mean over the others of log(1 + e^(l+τ)): how many of each there are does not matter.
    ValueError where one class is empty or no feature varies.
    """
    x, targets = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=bool)
    if targets.all() or not targets.any():
        raise ValueError("calibration needs targets and non-targets, there is one kind only")
    centre, scale = x.mean(0), x.std(0)
    if not (scale > 0).any():
        raise ValueError("all scores are equal: nothing can be calibrated")
    scale = np.where(scale > 0, scale, 1.0)
    design = np.concatenate([(x - centre) / scale, np.ones((len(x), 1))], axis=1)
    shift = np.log(prior / (1 - prior))
    share = np.where(targets, prior / targets.sum(), (1 - prior) / (~targets).sum())
    sign = np.where(targets, -1.0, 1.0)

    def loss(solution: np.ndarray) -> tuple[float, np.ndarray]:
        signed = sign * (design @ solution + shift)
        slope = design.T @ (share * sign * expit(signed))
        slope[:-1] += RIDGE * solution[:-1]
        total = share @ np.logaddexp(0, signed) + RIDGE / 2 * (solution[:-1] @ solution[:-1])
        return float(total), slope

    start = np.zeros(design.shape[1])
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    weights = found[:-1] / scale
    return Calibration(weights, float(found[-1] - weights @ centre))


def quality_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Measures of both sides, each (N, Q), as features that do not depend on their order, (N, 2 Q).

    The smaller one and the difference of each: the worse recording decides, and unlike ones are harder.
    """
    return np.concatenate([np.minimum(first, second), np.abs(first - second)], axis=1)
