"""Which pairs are held out: a seeded split after which no valid or test sentence occurs in training.

The unit is the connected component of pairs that share a source or a target. Of the 29,155 rows of Tatoeba's
English–Chinese, 6,248 share their Chinese side with another: a split by row would test on what was trained.
"""

import hashlib

import numpy as np

from ext_common.cli import UsageError

SPLITS = ("train", "valid", "test")
"""The meaning of the codes 0, 1, 2."""


def split(
    source_keys: np.ndarray,
    target_keys: np.ndarray,
    seed: int = 1,
    valid: float = 0.02,
    test: float = 0.02,
    minimum: int = 100,
) -> np.ndarray:
    """int8 (N,): the code in SPLITS of each pair; the order of the pairs does not matter.

    source_keys, target_keys: uint64 (N,), hashes of the two sides (`hashes.key_hash`); equal means the
    same sentence. valid, test: fractions of the pairs. minimum: so many pairs each, at least, where
    there are ten times as many.

    Components are drawn in the order of a hash of the seed and their smallest source key. One that is
    larger than a tenth of a split stays in train, lest a few sentences with many translations fill
    it; a split is thus at most a tenth larger than wanted, and smaller where there are too few
    small components. Raises UsageError for fractions that leave nothing to train on.
    """
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise UsageError(f"valid and test need fractions of less than 1 together: {valid}, {test}")
    codes = np.zeros(len(source_keys), dtype=np.int8)
    if not len(codes):
        return codes
    component = components(source_keys, target_keys)
    sizes = np.bincount(component)
    smallest = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, component, source_keys)
    order = np.lexsort((smallest, _mix(smallest + _mix(np.array([seed % 2**64], dtype=np.uint64)))))
    chosen = np.zeros(len(sizes), dtype=np.int8)
    for code, fraction in ((1, valid), (2, test)):
        wanted = wanted_pairs(len(codes), fraction, minimum)
        free = order[(chosen[order] == 0) & (sizes[order] <= max(1, wanted // 10))]
        before = np.cumsum(sizes[free]) - sizes[free]
        chosen[free[before < wanted]] = code
    return np.asarray(chosen[component])


def wanted_pairs(pairs: int, fraction: float, minimum: int) -> int:
    """How many of `pairs` a split is to have; at least 1 and at most a third of them."""
    if fraction == 0:
        return 0
    wanted = max(round(fraction * pairs), 1, minimum if pairs >= 10 * minimum else 0)
    return min(wanted, pairs // 3)


def components(source_keys: np.ndarray, target_keys: np.ndarray) -> np.ndarray:
    """int32 (N,): the number of the connected component of each pair, from 0."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    sources, source = np.unique(source_keys, return_inverse=True)
    targets, target = np.unique(target_keys, return_inverse=True)
    nodes = len(sources) + len(targets)
    edges = (np.ones(len(source), dtype=np.int8), (source, target + len(sources)))
    _, labels = connected_components(coo_matrix(edges, shape=(nodes, nodes)), directed=False)
    return np.asarray(labels[source])


def shared_rows(keys: np.ndarray) -> int:
    """How many rows have a key that another row has too."""
    _, counts = np.unique(keys, return_counts=True)
    return int(counts[counts > 1].sum())


def split_sha256(codes: np.ndarray, source_keys: np.ndarray, target_keys: np.ndarray) -> str:
    """Hex SHA-256 that two equal splits share, whatever the order of their pairs.

    Hashed are the sorted rows (code: 1 byte, source key, target key: 8 bytes each, little endian).
    """
    rows = np.empty(len(codes), dtype=[("code", "u1"), ("source", "<u8"), ("target", "<u8")])
    order = np.lexsort((target_keys, source_keys, codes))
    rows["code"], rows["source"], rows["target"] = (
        column[order] for column in (codes, source_keys, target_keys)
    )
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014), element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
