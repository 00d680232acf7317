"""Distances of samples to real images beside those of real images to each other, on the same footing.

A distance between sets of N images depends on N and on which images they are. So samples are compared with
several random sets of real images, and as many pairs of disjoint sets of real images give the floor.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_ext.evaluate.cache import cached
from diffusion_ext.evaluate.metrics import disjoint_sets, frechet_of, kid, precision_recall
from diffusion_ext.prepare.sets import ImageSet
from ext_common.cli import progress

FEW = 8  # images of a class, below which no number is given of it
Pairs = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Rows:
    """Which images are compared.

    fake, real: rows of samples and real images; in each of `draws` all samples meet `reference` of the
    real images, and for the floor `floor` of the real images meet others of them.
    """

    fake: np.ndarray
    real: np.ndarray
    reference: int
    floor: tuple[int, int]
    draws: int
    seed: int

    def references(self) -> list[np.ndarray]:
        """Positions in `real` of each draw; a single one where all of them are compared."""
        draws = self.draws if self.reference < len(self.real) else 1
        pairs = disjoint_sets(len(self.real), self.reference, 0, self.seed, draws)
        return [first for first, _ in pairs]

    def pairs(self) -> Pairs:
        """Positions in `real` of the two sides of each pair for the floor."""
        return disjoint_sets(len(self.real), *self.floor, self.seed, self.draws)


def compare(
    features: np.ndarray,
    reals: ImageSet,
    rows: Rows,
    extractor: Any,
    cache: Path | None,
    options: Any,
) -> tuple[dict[str, Any], bool]:
    """(distances of the samples' features (N, D), whether those of the real images were in the cache).

    Each: label, value, std between the draws (None for one), n, reference, draws, floor (mean, std, n,
    reference) and the ratio to it, None where a floor is 0 in expectation.
    """
    parts = statistics_parts(reals, rows.real, extractor.key)
    arrays, there = cached(
        cache, "features", parts, lambda: {"features": extractor(reals.pixels[rows.real])}
    )
    real = arrays["features"]
    size = max(2, min(options.kid_subset_size, min(len(features), *rows.floor) // 2))
    settings = {"subset_size": size, "neighbours": options.neighbours}
    subsets = {
        "subsets": options.kid_subsets,
        "seed": options.seed,
        "each_draw": "subsets of its own",
    }
    keys = {**parts, **settings, **subsets, "draws": options.draws, "sizes": rows.floor}

    def averages(pairs: Pairs, draws: int) -> dict[str, np.ndarray]:
        share = max(1, options.kid_subsets // draws)
        return averaged(pairs, options.seed, subsets=share, **settings)

    def floor() -> dict[str, np.ndarray]:
        pairs = progress(list(rows.pairs()), "floor", "pairs of sets")
        return averages(((real[a], real[b]) for a, b in pairs), rows.draws)

    floors, _ = cached(cache, "floor", keys, floor)
    references = rows.references()
    pairs = ((features, real[chosen]) for chosen in progress(references, "distances", "draws"))
    found = averages(pairs, len(references))
    labels = {
        "frechet": extractor.label,
        "kid": f"KID ({extractor.name})",
        "precision": "precision",
        "recall": "recall",
    }
    metrics = {
        key: beside_floor(label, found[key], floors[key], rows) for key, label in labels.items()
    }
    # Unbiased, so that a ratio would be one of two numbers around 0.
    metrics["kid"] |= {"ratio": None, "subset_size": size}
    return metrics, there


def beside_floor(label: str, found: np.ndarray, floor: np.ndarray, rows: Rows) -> dict[str, Any]:
    """One line of the table: values of the draws (K,) and of the pairs of real sets (K,)."""
    value, mean = float(found.mean()), float(floor.mean())
    return {
        "label": label,
        "value": value,
        "std": _spread(found),
        "n": len(rows.fake),
        "reference": rows.reference,
        "draws": len(found),
        "floor": {
            "mean": mean,
            "std": _spread(floor),
            "n": rows.floor[0],
            "reference": rows.floor[1],
            "draws": len(floor),
        },
        "ratio": value / mean if mean > 0 else None,
    }


def averaged(pairs: Pairs, seed: int, **settings: Any) -> dict[str, np.ndarray]:
    """The distances of each pair (fake, real) of features, by name, each float64 (pairs,).

    settings: of `distances`. Each pair has a seed of its own, or KID would see one part of the samples only.
    """
    rows = [distances(*pair, seed=seed + i, **settings) for i, pair in enumerate(pairs)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def distances(
    fake: np.ndarray, real: np.ndarray, subsets: int, subset_size: int, neighbours: int, seed: int
) -> dict[str, float]:
    """All distances of two sets of features (N, D) and (M, D)."""
    return {
        "frechet": frechet_of(fake, real),
        "kid": kid(fake, real, subsets, subset_size, seed).mean,
        **precision_recall(real, fake, neighbours)._asdict(),
    }


def statistics_parts(reals: ImageSet, rows: np.ndarray, extractor_key: str) -> dict[str, Any]:
    """All that features of real images depend on: their pixels as read, size, which rows, extractor."""
    return {
        "data": reals.content_hash,
        "shape": list(reals.shape),
        "n": len(rows),
        "rows": hashlib.sha256(np.asarray(rows, dtype="<i8").tobytes()).hexdigest(),
        "extractor": extractor_key,
    }


def class_counts(
    extractor: Any, images: np.ndarray, labels: np.ndarray, rows: Rows
) -> dict[str, Any] | None:
    """How many samples a classifier sees in each class; None for other extractors.

    images: samples, uint8 (N, C, H, W); labels: int (M,) of the real images in `rows`. distance: total
    variation, half the sum of absolute differences between the shares of the classes in the samples and in
    the real images, beside its floor.
    """
    predict: Callable[..., Any] | None = getattr(extractor, "predict", None)
    if predict is None:
        return None

    def counts(found: np.ndarray) -> np.ndarray:
        return np.bincount(found, minlength=len(extractor.classes))

    ours = counts(predict(images))
    found = [total_variation(ours, counts(labels[chosen])) for chosen in rows.references()]
    floor = [total_variation(*(counts(labels[side]) for side in pair)) for pair in rows.pairs()]
    distance = beside_floor("classes", np.array(found), np.array(floor), rows)
    return {
        "names": list(extractor.classes),
        "samples": ours.tolist(),
        "reals": counts(labels).tolist(),
        "missing": [name for name, n in zip(extractor.classes, ours, strict=True) if n == 0],
        "distance": distance | {"label": "total variation of classes"},
        "accuracy": extractor.accuracy,
        "held_out": extractor.held_out,
    }


def by_class(
    features: np.ndarray, samples: ImageSet, reals: ImageSet, rows: Rows, extractor: Any
) -> list[dict[str, Any]]:
    """The Fréchet distance of each class of labelled samples to the real images of its name.

    features: of the samples in `rows`. Each: name, samples, reals, value, floor (mean over pairs of disjoint
    sets of its real images, of as many as there are samples or half of the real ones), ratio; recognised: the
    share that a classifier takes for the class, None for other extractors. A class with fewer than FEW
    samples or 2 FEW real images is left out, and so are all where samples or real images have no labels.
    """
    labels, known = samples.labels[rows.fake], dict(enumerate(samples.classes))
    predict = getattr(extractor, "predict", None)
    lines = []
    for label, name in known.items():
        ours = np.flatnonzero(labels == label)
        number = reals.classes.index(name) if name in reals.classes else len(reals.classes)
        there = np.flatnonzero(reals.labels == number)
        n = min(len(ours), len(there) // 2)
        if n < FEW:
            continue
        theirs = extractor(reals.pixels[np.sort(there)])
        chosen = features[ours]
        sets = disjoint_sets(len(theirs), n, n, rows.seed, rows.draws)
        found, floor = [], []
        for one, other in sets:
            found.append(frechet_of(chosen[:n], theirs[one]))
            floor.append(frechet_of(theirs[one], theirs[other]))
        value, mean = float(np.mean(found)), float(np.mean(floor))
        line = {
            "name": name,
            "samples": len(ours),
            "reals": len(there),
            "value": value,
            "floor": mean,
        }
        line |= {"ratio": value / mean if mean else None, "recognised": None}
        if predict is not None and name in extractor.classes:
            seen = predict(samples.pixels[rows.fake[ours]])
            line["recognised"] = float(np.mean(seen == extractor.classes.index(name)))
        lines.append(line)
    return lines


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation distance of two vectors of counts (K,), in [0, 1]."""
    return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)


def _spread(values: np.ndarray) -> float | None:
    return float(values.std()) if len(values) > 1 else None
