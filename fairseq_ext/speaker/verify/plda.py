"""Probabilistic linear discriminant analysis with two covariances, and what goes before it.

An embedding is x = μ + y + ε with y ~ N(0, B) for the person and ε ~ N(0, W) for the recording (Brümmer &
de Villiers 2010). In the basis where W = I and B = diag ψ the log-likelihood ratio of "the same person" is a
sum over dimensions (Kaldi's form of Ioffe 2006).
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh


@dataclass(frozen=True)
class Plda:
    """μ float64 (D,); transform (D, D), after which W = I and B = diag ψ; psi (D,), descending."""

    mean: np.ndarray
    transform: np.ndarray
    psi: np.ndarray

    def project(self, x: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) in the basis of the scores, float64 (N, D)."""
        projected: np.ndarray = (np.asarray(x, dtype=np.float64) - self.mean) @ self.transform.T
        return projected

    def llr(self, enrolled: np.ndarray, counts: np.ndarray, tests: np.ndarray) -> np.ndarray:
        """Natural log-likelihood ratios float64 (M, T) of people against recordings, all projected.

        enrolled: (M, D), each the mean of `counts` (M,) recordings of a person; tests: (T, D). With n of
        them it is log N(t; nψ/(nψ+1) ē, 1 + ψ/(nψ+1)) − log N(t; 0, 1 + ψ), summed over dimensions.
        """
        left, right = self.sides(enrolled, counts, tests)
        ratios: np.ndarray = left @ right.T
        return ratios

    def sides(
        self, enrolled: np.ndarray, counts: np.ndarray, tests: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (M, 2 D + 1) and (T, 2 D + 1) whose inner products are the ratios of `llr`."""
        n = np.asarray(counts, dtype=np.float64)[:, None]
        shrunk = n * self.psi / (n * self.psi + 1) * enrolled
        variance = 1 + self.psi / (n * self.psi + 1)
        alone = 1 + self.psi
        constant = -0.5 * (np.log(variance / alone) + shrunk**2 / variance).sum(1, keepdims=True)
        left = [shrunk / variance, -0.5 * (1 / variance - 1 / alone), constant]
        right = [tests, tests**2, np.ones((len(tests), 1))]
        return np.concatenate(left, axis=1), np.concatenate(right, axis=1)


def fit_plda(x: np.ndarray, labels: np.ndarray, iterations: int = 10) -> Plda:
    """Maximum likelihood by EM from embeddings (N, D) and speakers (N,).

    ValueError where fewer than two speakers, or none with two recordings, are there.
    """
    x = np.asarray(x, dtype=np.float64)
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    _refuse_lone(counts)
    mean = x.mean(0)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, index, x - mean)
    means = sums / counts[:, None]
    scatter = (x - mean).T @ (x - mean)
    within = (scatter - (means * counts[:, None]).T @ means) / max(len(x) - len(counts), 1)
    between = means.T @ means / len(counts)
    # a direction in which nothing varies within or between speakers would be divided by zero
    floor = 1e-6 * np.trace(scatter) / len(x) / x.shape[1] * np.eye(x.shape[1])
    within, between = within + floor, between + floor
    for _ in range(iterations):
        within, between = _em_step(x - mean, index, counts, sums, within, between)
        within, between = within + 1e-3 * floor, between + 1e-3 * floor
    psi, vectors = eigh(between, within)
    return Plda(mean, vectors.T[::-1], np.maximum(psi[::-1], 0.0))


def _em_step(
    x: np.ndarray,
    index: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    within: np.ndarray,
    between: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(W, B) that maximise the expected likelihood of centred x (N, D) under the old ones."""
    precision_w, precision_b = np.linalg.inv(within), np.linalg.inv(between)
    hidden = np.empty_like(sums)
    spread_b, spread_w = np.zeros_like(between), np.zeros_like(within)
    for n in np.unique(counts):
        chosen = counts == n
        covariance = np.linalg.inv(precision_b + n * precision_w)
        hidden[chosen] = sums[chosen] @ precision_w @ covariance
        spread_b += chosen.sum() * covariance
        spread_w += chosen.sum() * n * covariance
    residual = x - hidden[index]
    between = (spread_b + hidden.T @ hidden) / len(counts)
    within = (spread_w + residual.T @ residual) / len(x)
    return (within + within.T) / 2, (between + between.T) / 2


def fit_lda(x: np.ndarray, labels: np.ndarray, dimensions: int) -> np.ndarray:
    """Linear discriminants, float64 (dimensions, D): the largest eigenvalues of W⁻¹ B (Fisher 1936).

    x: (N, D), labels: (N,). Projected, the pooled covariance within speakers is I. ValueError for more
    dimensions than speakers less one, and as of `fit_plda`.
    """
    x = np.asarray(x, dtype=np.float64)
    names, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    _refuse_lone(counts)
    most = min(len(names) - 1, x.shape[1])
    if not 1 <= dimensions <= most:
        raise ValueError(
            f"LDA of {len(names)} speakers has 1 to {most} dimensions, not {dimensions}"
        )
    means = np.zeros((len(names), x.shape[1]))
    np.add.at(means, index, x)
    means /= counts[:, None]
    residual = x - means[index]
    within = residual.T @ residual / max(len(x) - len(names), 1)
    within += 1e-6 * np.trace(within) / len(within) * np.eye(len(within))
    centred = means - x.mean(0)
    between = (centred * counts[:, None]).T @ centred / len(x)
    _, vectors = eigh(between, within)
    discriminants: np.ndarray = vectors.T[::-1][:dimensions]
    return discriminants


def _refuse_lone(counts: np.ndarray) -> None:
    if len(counts) < 2 or counts.max() < 2:
        raise ValueError(
            "it needs several speakers, and several recordings of a speaker: give more, or cut them"
            " (--piece 3)"
        )


def scale_to_sphere(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length √D, as Gaussian ones have (Garcia-Romero & Espy-Wilson 2011)."""
    x = np.asarray(x, dtype=np.float64)
    length = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    scaled: np.ndarray = x * (np.sqrt(x.shape[1]) / length)
    return scaled
