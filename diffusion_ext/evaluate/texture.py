"""Do samples look like real images close up? Their waves, their steps from pixel to pixel, their tones.

A distance on the features of a classifier, or on a few principal components, sees what is in an image and
little of how it is drawn: noise, blocks and blur hardly move it. Here each image becomes a short vector of
numbers, and two sets are compared by Hotelling's T² of their means, beside that of real images alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_ext.evaluate.metrics import disjoint_sets

Features = dict[str, np.ndarray]
BINS = 12  # rings of the spectrum, evenly from 0 to the highest frequency along an axis
PAIRS = 100  # of sets of real images; a pair costs next to nothing
DRAWS = 10  # sets of real images that samples are compared with
LIMIT = 5.0  # standard deviations of the floor; what is squared has a long tail
BLOCK = 256
TINY = 1e-3


def features_of(images: np.ndarray) -> Features:
    """By kind, float64 (N, D): of uint8 (N, C, H, W)."""
    parts = [
        {name: of(images[start : start + BLOCK] / 255.0) for name, of in KINDS.items()}
        for start in range(0, len(images), BLOCK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in KINDS}


def spectrum(x: np.ndarray) -> np.ndarray:
    """Log power in rings of equal width, of the mean of the channels, without the mean of the image.

    The last ring holds the corners, where the finest checkerboard is.
    """
    gray = x.mean(1)
    height, width = gray.shape[1:]
    power = np.abs(np.fft.fft2(gray - gray.mean((1, 2), keepdims=True))) ** 2 / (height * width)
    along = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) * 2
    rings = max(1, min(BINS, min(height, width) // 2))
    ring = np.minimum((along * rings).astype(int), rings)
    found = [power[:, ring == k].mean(1) for k in range(rings + 1) if (ring == k).any()]
    return np.log(np.stack(found, 1) + 1e-7)


def gradients(x: np.ndarray) -> np.ndarray:
    """Of the steps between neighbours the logs of mean, of root mean square and of second differences, and
    the shares that are 0, small and large; down and across."""
    columns = []
    for axis in (2, 3):
        step = np.diff(x, axis=axis).reshape(len(x), -1)
        bend = np.diff(x, 2, axis=axis).reshape(len(x), -1)
        size = np.abs(step)
        columns += [
            np.log(size.mean(1) + TINY),
            np.log(np.sqrt((step**2).mean(1)) + TINY),
            np.log(np.abs(bend).mean(1) + TINY),
            (size < 0.5 / 255).mean(1),
            (size < 4.5 / 255).mean(1),
            (size > 0.25).mean(1),
        ]
    return np.stack(columns, 1)


def tones(x: np.ndarray) -> np.ndarray:
    """Of each channel mean, deviation, and the shares of black and of white; differences of the channels."""
    flat = x.reshape(*x.shape[:2], -1)
    columns = [flat.mean(2), flat.std(2), (flat < 2.5 / 255).mean(2), (flat > 252.5 / 255).mean(2)]
    if x.shape[1] == 3:
        columns.append(np.stack([np.abs(flat[:, 0] - flat[:, k]).mean(1) for k in (1, 2)], 1))
    return np.concatenate(columns, 1)


KINDS = {"spectrum": spectrum, "gradients": gradients, "tones": tones}
LABELS = {"spectrum": "power spectrum", "gradients": "gradients", "tones": "tones"}


@dataclass(frozen=True)
class Metric:
    """Hotelling's T² under the covariance of real features, its weakest directions damped.

    Of sets of the real images it is about the number of features, whatever their sizes.
    """

    inverse: np.ndarray

    @classmethod
    def of(cls, real: np.ndarray) -> "Metric":
        """real: (N, D)."""
        scale = real.std(0)
        scale[scale < 1e-9] = 1.0
        cov = np.cov((real / scale).T).reshape(real.shape[1], -1)
        cov += 1e-3 * np.eye(len(cov))
        return cls(np.linalg.inv(cov) / np.outer(scale, scale))

    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """a: (N, D), b: (M, D)."""
        difference = a.mean(0) - b.mean(0)
        together = len(a) * len(b) / (len(a) + len(b))
        return float(together * difference @ self.inverse @ difference)


def texture(ours: Features, theirs: Features, seed: int) -> list[dict[str, Any]]:
    """Each kind of features of samples and real images as a line of the verdict; see `judged`.

    As many real images are compared as there are samples, or half of them where there are fewer.
    """
    lines = []
    for name, label in LABELS.items():
        fake, real = ours[name], theirs[name]
        metric, n = Metric.of(real), min(len(fake), len(real) // 2)
        found = [
            metric(fake[:n], real[one]) for one, _ in disjoint_sets(len(real), n, 0, seed, DRAWS)
        ]
        pairs = disjoint_sets(len(real), n, n, seed, PAIRS)
        floor = np.array([metric(real[one], real[other]) for one, other in pairs])
        lines.append(judged(label, float(np.mean(found)), floor.mean(), floor.std()))
    return lines


def judged(
    label: str, value: float, mean: float, std: float | None, least: float = 0.0
) -> dict[str, Any]:
    """A line of the verdict: a number of the samples, beside mean and std of real images among themselves.

    z: how many std the samples lie above them; passed: z is at most LIMIT. least: what std is taken to be at
    least, as a share of the mean.
    """
    spread = max(float(std or 0.0), least * abs(mean), 1e-12)
    z = (value - float(mean)) / spread
    passed = bool(z <= LIMIT)
    return {
        "label": label,
        "value": value,
        "floor": float(mean),
        "std": spread,
        "z": z,
        "passed": passed,
    }
