"""Are samples copies? Distances to the nearest training image, beside those of held-out images.

On any vectors (N, D): raw pixels, where a copy is at 0, or features. uint8 is fine and saves memory.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_ext.evaluate.metrics import squared_distances


class Neighbours(NamedTuple):
    """distances: float64 (N,), Euclidean, exactly 0 for a copy; indices: int64 (N,) into the bank."""

    distances: np.ndarray
    indices: np.ndarray


class Memorisation(NamedTuple):
    """Samples beside held-out images, each by its nearest training image; n, held_out, train: how many.

    median, median_held_out: Euclidean distances. below_1, below_5: shares of the samples nearer than the 1st
    and 5th percentile of held-out images, 0.01 and 0.05 where nothing is memorised. authentic,
    authentic_held_out: shares that are farther from their nearest training image than that image is from its
    own nearest other one, the AuthPct of Alaa et al. 2022 as a share. copies: samples at distance 0.
    """

    median: float
    median_held_out: float
    below_1: float
    below_5: float
    authentic: float
    authentic_held_out: float
    copies: int
    n: int
    held_out: int
    train: int


def nearest_neighbours(
    queries: ArrayLike, bank: ArrayLike, exclude: ArrayLike | None = None
) -> Neighbours:
    """The row of bank (M, D) nearest to each of queries (N, D); of equal ones the first.

    exclude: int (N,), a row of the bank that is not considered for each query: itself, among its own kind.
    ValueError where nothing is left to be nearest.
    """
    queries, bank = np.asarray(queries), np.asarray(bank)
    if len(bank) < (1 if exclude is None else 2):
        raise ValueError(f"no neighbour among {len(bank)} rows")
    indices = np.empty(len(queries), dtype=np.int64)
    for start, block in squared_distances(queries, bank):
        rows = slice(start, start + len(block))
        if exclude is not None:
            block[np.arange(len(block)), np.asarray(exclude)[rows]] = np.inf
        indices[rows] = block.argmin(axis=1)
    distances = np.empty(len(queries))
    # Again, from the differences: |a|² + |b|² − 2ab of a copy is not 0 in floating point.
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        difference = queries[rows].astype(np.float64) - bank[indices[rows]].astype(np.float64)
        distances[rows] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return Neighbours(distances, indices)


def memorisation(fake: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Memorisation:
    """Whether `fake` (N, D) lies nearer to `train` (M, D) than the unseen `held_out` (K, D) does.

    Only against held-out images of the same source can a distance be called small. ValueError where a set is
    empty or there is but one training image.
    """
    if min(len(fake), len(held_out)) < 1 or len(train) < 2:
        raise ValueError(f"{len(fake)} samples, {len(train)} training, {len(held_out)} held-out")
    ours, theirs = nearest_neighbours(fake, train), nearest_neighbours(held_out, train)
    low, high = np.percentile(theirs.distances, [1, 5])
    return Memorisation(
        median=float(np.median(ours.distances)),
        median_held_out=float(np.median(theirs.distances)),
        below_1=float(np.mean(ours.distances < low)),
        below_5=float(np.mean(ours.distances < high)),
        authentic=float(np.mean(_authentic(ours, train))),
        authentic_held_out=float(np.mean(_authentic(theirs, train))),
        copies=int(np.sum(ours.distances == 0)),
        n=len(fake),
        held_out=len(held_out),
        train=len(train),
    )


def _authentic(found: Neighbours, train: np.ndarray) -> np.ndarray:
    near, back = np.unique(found.indices, return_inverse=True)
    spacing = nearest_neighbours(np.asarray(train)[near], train, exclude=near).distances
    return np.asarray(found.distances > spacing[back])
