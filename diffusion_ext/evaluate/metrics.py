"""How far samples are from real images, on features (N, D): Fréchet distance, KID, precision and recall.

All in float64 and in blocks, so that memory is bounded. A number means little without the same number between
two sets of real images of the same size: its floor, see `comparison`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_CELLS = 4_000_000  # of a matrix of distances or kernel values that is held at once


class Kid(NamedTuple):
    """Mean and standard deviation (ddof 0) of the estimates on the subsets."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians: |m1 − m2|² + tr(C1 + C2 − 2 (C1 C2)^½), at least 0.

    means: (D,); covariances: (D, D), symmetric and positive semi-definite, singular ones included.
    Dowson & Landau 1982, equation 16; on Inception features it is the FID of Heusel et al. 2017. The trace of
    the root is the sum of the singular values of C1^½ C2^½, the roots of the eigenvalues of the symmetric
    product C1^½ C2 C1^½: never complex, and without the root's amplification of rounding near zero.
    """
    m1, m2 = (np.asarray(mean, dtype=np.float64) for mean in (mean1, mean2))
    c1, c2 = (np.atleast_2d(np.asarray(cov, dtype=np.float64)) for cov in (cov1, cov2))
    dim = m1.size
    if m1.shape != (dim,) or m2.shape != (dim,) or not (c1.shape == c2.shape == (dim, dim)):
        shapes = [array.shape for array in (m1, c1, m2, c2)]
        raise ValueError(f"means must be (D,) and covariances (D, D), got {shapes}")
    shared = np.linalg.svd(_root(c1) @ _root(c2), compute_uv=False).sum()
    return _frechet(m1 - m2, np.trace(c1), np.trace(c2), shared)


def frechet_of(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """:func:`frechet_distance` of the means and unbiased covariances of features (N, D) and (M, D).

    Where one set has fewer rows than columns, from the smaller (N, M) product of the centred features instead
    of the (D, D) covariances, which gives the same number: 12,288 pixels need no matrix of 12,288².
    """
    a, b = _features(features_a), _features(features_b)
    _same_width(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs two rows or more")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a = (a - mean_a) / np.sqrt(len(a) - 1)
    b = (b - mean_b) / np.sqrt(len(b) - 1)
    if min(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(mean_a, a.T @ a, mean_b, b.T @ b)
    # A = U C_a^½ and B = V C_b^½ with partial isometries, which leave singular values as they are.
    shared = np.linalg.svd(_short(a) @ _short(b).T, compute_uv=False).sum()
    return _frechet(mean_a - mean_b, np.vdot(a, a), np.vdot(b, b), shared)


def kid(
    a: ArrayLike, b: ArrayLike, subsets: int = 100, subset_size: int = 1000, seed: int = 1
) -> Kid:
    """Unbiased squared MMD of features (N, D) and (M, D) under the kernel (x·y / D + 1)³.

    Bińkowski et al. 2018, section 4: mean and spread over random subsets drawn without replacement from each
    set; negative values occur, the expectation between equal distributions is 0. ValueError where a set has
    fewer rows than subset_size.
    """
    a, b = _features(a), _features(b)
    _same_width(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subsets of {subset_size} from {len(a)} and {len(b)} rows")
    random = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        x = a[random.choice(len(a), subset_size, replace=False)]
        y = b[random.choice(len(b), subset_size, replace=False)]
        found.append(mmd2(x, y))
    return Kid(float(np.mean(found)), float(np.std(found)))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator of the squared MMD, equation 4 of Bińkowski et al. 2018, on all rows."""
    m, n = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (m * (m - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (n * (n - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (m * n)


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Precision: share of samples within the real images' manifold; recall: the reverse.

    real: (N, D); fake: (M, D). The manifold of a set is the union of balls around each member that reach to
    its k-th nearest other member (Kynkäänniemi et al. 2019, equations 1 and 2). ValueError where a set has
    not more than k rows.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    return PrecisionRecall(
        float(_inside(fake, real, _radii(real, k)).mean()),
        float(_inside(real, fake, _radii(fake, k)).mean()),
    )


def disjoint_sets(
    total: int, n: int, reference: int, seed: int, splits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random rows of `total`: `splits` times two disjoint sets of n and reference, int64."""
    random = np.random.default_rng(seed)
    for _ in range(splits):
        order = random.permutation(total)[: n + reference]
        yield order[:n], order[n:]


def floor_note(total: int, asked: tuple[int, int], sizes: tuple[int, int]) -> str:
    """Why a floor has other sizes than were asked for; empty where it has not."""
    if sizes == asked:
        return ""
    return (
        f"{total} real images are not enough: the floor is of {sizes[0]} against {sizes[1]} "
        f"instead of {asked[0]} against {asked[1]}"
    )


def floor_sizes(total: int, n: int, reference: int) -> tuple[int, int]:
    """Sizes of two disjoint sets from `total` rows: (n, reference), or shrunk in proportion."""
    if n + reference <= total:
        return n, reference
    return total * n // (n + reference), total * reference // (n + reference)


def squared_distances(queries: np.ndarray, bank: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Squared Euclidean distances of queries (N, D) to all of bank (M, D), some rows at a time.

    Yields (index of the first query, float64 (rows, M)). The bank may be uint8: it becomes float64 in blocks.
    """
    rows = max(1, _CELLS // max(len(bank), 1))
    columns = max(1, _CELLS // max(bank.shape[1], 1))
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows].astype(np.float64)
        out = np.empty((len(block), len(bank)))
        for left in range(0, len(bank), columns):
            other = bank[left : left + columns].astype(np.float64)
            out[:, left : left + columns] = np.einsum("ij,ij->i", other, other) - 2 * (
                block @ other.T
            )
        out += np.einsum("ij,ij->i", block, block)[:, None]
        yield start, np.maximum(out, 0, out=out)


def _features(given: ArrayLike) -> np.ndarray:
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"features must be (N, D), got {array.shape}")
    return array


def _same_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} columns")


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    # What rounding leaves of a zero eigenvalue would come back from the root eight digits larger.
    values[values < len(values) * np.finfo(float).eps * max(values[-1], 0)] = 0
    root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
    return root


def _short(centred: np.ndarray) -> np.ndarray:
    """A matrix (min(N, D), D) with the same product AᵀA: the side that is longer is taken away."""
    rows, columns = centred.shape
    if rows <= columns:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _frechet(difference: np.ndarray, trace1: float, trace2: float, shared: float) -> float:
    return max(0.0, float(difference @ difference + trace1 + trace2 - 2 * shared))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    rows = max(1, _CELLS // len(y))
    blocks = (x[start : start + rows] for start in range(0, len(x), rows))
    return sum(float(((block @ y.T / x.shape[1] + 1) ** 3).sum()) for block in blocks)


def _kernel_diagonal(x: np.ndarray) -> float:
    return float(((np.einsum("ij,ij->i", x, x) / x.shape[1] + 1) ** 3).sum())


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point."""
    if not 1 <= k < len(points):
        raise ValueError(f"the {k}-th nearest other of {len(points)} rows")
    radii = np.empty(len(points))
    for start, block in squared_distances(points, points):
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf
        radii[start : start + len(block)] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radii


def _inside(queries: np.ndarray, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether each query lies in the ball of any point; radii squared."""
    found = [(block <= radii).any(axis=1) for _, block in squared_distances(queries, points)]
    return np.concatenate(found)
