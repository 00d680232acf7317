"""Randomness that belongs to a record: what is drawn for it does not depend on what is done with it."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def line_seed(seed: int, line: int, round: int, rank: int = 0) -> int:
    """64 bits for a line of a corpus: BLAKE2b of (seed, line, round, rank).

    rank: which of several outputs of the line.
    """
    text = f"{seed} {line} {round} {rank}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def generator(seed: int) -> np.random.Generator:
    """The generator of a line's seed (Philox, which is counted and not stepped)."""
    return np.random.Generator(np.random.Philox(key=seed))


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """float64 (B, steps) in [0, 1): row b depends on `seeds[b]` only, its beginning not on `steps`."""
    return np.stack([generator(seed).random(steps) for seed in seeds])
