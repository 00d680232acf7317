"""Has the augmentation leaked into the samples? Their colours and their left and right beside raw images.

Colour jitter that a network has learnt as part of the data widens the moments of the colours; flips make the
mean image symmetric. Images are uint8 (N, C, H, W) with C = 1 or 3; values are in units of [0, 1].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ext_common.cli import UserError

RESAMPLES = 500
_CHANNELS = {1: ("gray",), 3: ("red", "green", "blue")}
_BLOCK = 256  # images that are floating point at once
ASYMMETRY = "left-right asymmetry"
ASYMMETRY_KEPT = "left-right asymmetry kept"


class Estimate(NamedTuple):
    """A statistic and its bootstrap standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class LeakRow:
    """One statistic of real images and samples.

    z: their difference (fake − real) in standard errors, None where the error is 0.
    """

    name: str
    real: Estimate
    fake: Estimate
    z: float | None


def leak_report(
    real: ArrayLike, fake: ArrayLike, seed: int = 1, resamples: int = RESAMPLES
) -> list[LeakRow]:
    """The leak meter: :func:`colour_moments` and asymmetry of samples beside raw real images.

    real, fake: uint8 (N, C, H, W) of one shape, the real ones not augmented. Standard errors are by bootstrap
    over images. The last row is the share of the real images' asymmetry that is kept, as their direction
    (:func:`mirror_difference` of one half of them) shows in the other half and in the samples: as much where
    all is kept, 0 where every image is as likely mirrored as not.
    """
    real, fake = _images(real), _images(fake)
    if real.shape[1:] != fake.shape[1:]:
        raise UserError(
            f"real images are {real.shape[1:]} and samples {fake.shape[1:]} (channels, height, width): "
            "give both in one size"
        )
    if min(len(real) // 2, len(fake)) < 2:
        raise UserError(
            f"{len(real)} real images and {len(fake)} samples are too few for standard errors: "
            "give four and two or more"
        )
    random = np.random.default_rng(seed)
    names = moment_names(real.shape[1])
    columns = [_resampled(moments, _sums(images), resamples, random) for images in (real, fake)]
    rows = [_row(name, *pair) for name, *pair in zip(names, *columns, strict=True)]
    rows.append(_row(ASYMMETRY, *(_asymmetry(one, resamples, random) for one in (real, fake))))
    half = random.permutation(len(real))
    direction = mirror_difference(real[np.sort(half[::2])])
    if np.any(direction):
        kept = (real[np.sort(half[1::2])], fake)
        rows.append(
            _row(ASYMMETRY_KEPT, *(_mean(_projections(one, direction)) for one in kept)),
        )
    return rows


def colour_moments(images: ArrayLike) -> dict[str, float]:
    """Moments of the colours of images (N, C, H, W), by name.

    For each channel mean, std and skewness over all pixels of all images; "brightness spread" and "contrast
    spread", how much the mean of an image and the std of its pixels differ between images (as std); for
    colour images also mean and spread of an image's saturation, (max − min) / max as in HSV.
    """
    checked = _images(images)
    values = moments(_sums(checked).mean(axis=0))
    return dict(zip(moment_names(checked.shape[1]), map(float, values), strict=True))


def left_right_asymmetry(images: ArrayLike) -> float:
    """Root mean square of :func:`mirror_difference`, less what N random images owe to chance.

    0 where a mean image and its mirror image differ no more than by chance.
    """
    return _asymmetry_of(*_asymmetry_sums(_images(images)))


def mirror_difference(images: ArrayLike) -> np.ndarray:
    """Mean image less its mirror image, float64 (C, H, W)."""
    checked = _images(images)
    mean = np.asarray(sum(block.sum(axis=0) for block in _blocks(checked)) / len(checked))
    return np.asarray(mean - mean[..., ::-1])


def moment_names(channels: int) -> list[str]:
    """The names of :func:`colour_moments`, in order."""
    names = [f"{name} {what}" for what in ("mean", "std", "skew") for name in _CHANNELS[channels]]
    names += ["brightness spread", "contrast spread"]
    return names + (["saturation mean", "saturation spread"] if channels == 3 else [])


def moments(means: np.ndarray) -> np.ndarray:
    """Colour moments (..., K) of averages over images of the statistics in :func:`_sums`."""
    channels = 3 if means.shape[-1] == 15 else 1
    mean, square, cube = (means[..., i * channels : (i + 1) * channels] for i in range(3))
    variance = np.maximum(square - mean**2, 0)
    std = np.sqrt(variance)
    third = cube - 3 * mean * square + 2 * mean**3
    # A picture of one colour has no skewness; 0 keeps the table readable.
    skew = np.divide(third, std**3, out=np.zeros_like(third), where=std > 1e-6)
    pairs = means[..., 3 * channels :].reshape(*means.shape[:-1], -1, 2)
    spread = np.sqrt(np.maximum(pairs[..., 1] - pairs[..., 0] ** 2, 0))
    out = [mean, std, skew, spread[..., :2]]
    if channels == 3:
        out += [pairs[..., 2:3, 0], spread[..., 2:3]]
    return np.concatenate(out, axis=-1)


def _images(given: ArrayLike) -> np.ndarray:
    images = np.asarray(given)
    if images.ndim != 4 or images.shape[1] not in _CHANNELS or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {images.shape}")
    return images


def _blocks(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _BLOCK):
        yield images[start : start + _BLOCK] / 255.0


def _sums(images: np.ndarray) -> np.ndarray:
    """(N, K) of each image: channels' mean, mean square and mean cube; then pairs value and value² of
    brightness, contrast and, in colour, saturation."""
    rows = []
    for block in _blocks(images):
        powers = [(block**power).mean(axis=(2, 3)) for power in (1, 2, 3)]
        contrast = np.sqrt(np.maximum(powers[1] - powers[0] ** 2, 0)).mean(axis=1)
        single = [powers[0].mean(axis=1), contrast]
        if block.shape[1] == 3:
            top, bottom = block.max(axis=1), block.min(axis=1)
            saturation = np.divide(top - bottom, top, out=np.zeros_like(top), where=top > 0)
            single.append(saturation.mean(axis=(1, 2)))
        pairs = [part[:, None] ** power for part in single for power in (1, 2)]
        rows.append(np.concatenate(powers + pairs, axis=1))
    return np.concatenate(rows)


def _weights(count: int, resamples: int, random: np.random.Generator) -> np.ndarray:
    """How often each image is in each bootstrap resample, as shares, (resamples, count)."""
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(drawn / count)


def _resampled(
    formula: Callable[[np.ndarray], np.ndarray],
    rows: np.ndarray,
    resamples: int,
    random: np.random.Generator,
) -> list[Estimate]:
    spread = formula(_weights(len(rows), resamples, random) @ rows).std(axis=0)
    return [
        Estimate(float(v), float(e)) for v, e in zip(formula(rows.mean(0)), spread, strict=True)
    ]


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _projections(images: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Each image's own difference to its mirror image along `direction`, as a share of it."""
    weight = np.tensordot(direction, direction, 3)
    found = [np.tensordot(b - b[..., ::-1], direction, 3) / weight for b in _blocks(images)]
    return np.concatenate(found)


def _differences(images: np.ndarray) -> np.ndarray:
    """The left half of each image less its mirror image, float32 (N, C·H·(W // 2)): the right repeats it."""
    half = images.shape[-1] // 2
    right = images[..., ::-1][..., :half]
    left = images[..., :half].astype(np.float32)
    return np.asarray((left - right) / 255).reshape(len(images), -1)


def _asymmetry_sums(images: np.ndarray) -> tuple[float, float]:
    differences = _differences(images)
    squares = np.square(differences.mean(axis=0, dtype=np.float64)).sum()
    chance = differences.var(axis=0, ddof=1, dtype=np.float64).sum() / len(images)
    width = images[0].size / 2  # an odd width has a middle column that differs by 0
    return squares / width, chance / width


def _asymmetry_of(squares: float, chance: float) -> float:
    return float(np.sqrt(max(squares - chance, 0)))


def _asymmetry(images: np.ndarray, resamples: int, random: np.random.Generator) -> Estimate:
    squares, chance = _asymmetry_sums(images)
    differences = _differences(images)
    width = images[0].size / 2
    means = _weights(len(images), resamples, random).astype(np.float32) @ differences
    # A resampled mean has the chance of the sample on top of that of the resampling.
    again = np.square(means, dtype=np.float64).sum(axis=1) / width - 2 * chance
    return Estimate(_asymmetry_of(squares, chance), float(np.sqrt(np.maximum(again, 0)).std()))


def _row(name: str, real: Estimate, fake: Estimate) -> LeakRow:
    error = float(np.hypot(real.error, fake.error))
    # Of images that are all alike only rounding is left.
    z = (fake.value - real.value) / error if error > 1e-9 else None
    return LeakRow(name, real, fake, z)
