"""Sets of images that a sound evaluation must find wanting, made from real ones.

A covariance Gaussian and averages have the data's second moments or its look from afar, and must score
clearly worse than real images; copies are perfect by every distance, and only the memorisation check tells.
"""

import numpy as np


def covariance_gaussian(images: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n samples of the Gaussian with the pixel mean and covariance of uint8 (N, C, H, W), as uint8.

    Rounded to the nearest of 0 to 255, which moves the moments a little. Drawn as random combinations of the
    images' deviations, so that no covariance matrix is formed.
    """
    images = np.asarray(images)
    flat = images.reshape(len(images), -1).astype(np.float64)
    mean = flat.mean(axis=0)
    weights = np.random.default_rng(seed).standard_normal((n, len(flat)))
    samples = mean + weights @ (flat - mean) / np.sqrt(max(len(flat) - 1, 1))
    return _to_uint8(samples).reshape(n, *images.shape[1:])


def averaged_images(
    images: np.ndarray, n: int, k: int, seed: int, labels: np.ndarray | None = None
) -> np.ndarray:
    """n averages of k different random images of uint8 (N, C, H, W), as uint8 (n, C, H, W).

    labels: int (N,); where given, the k images share the label of a random one, as far as there are so many.
    """
    images = np.asarray(images)
    random = np.random.default_rng(seed)
    out = np.empty((n, *images.shape[1:]), dtype=np.uint8)
    everywhere = np.arange(len(images))
    for row in range(n):
        first = random.integers(len(images))
        pool = everywhere if labels is None else np.flatnonzero(labels == labels[first])
        chosen = random.choice(pool, min(k, len(pool)), replace=False)
        out[row] = _to_uint8(images[chosen].mean(axis=0, dtype=np.float64))
    return out


def noisy(images: np.ndarray, std: float, seed: int) -> np.ndarray:
    """uint8 images with Gaussian noise of `std`, in units of 1/255, on each value."""
    noise = np.random.default_rng(seed).normal(0, std, np.shape(images))
    return _to_uint8(np.asarray(images) + noise)


def copies(images: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the images, drawn without replacement as far as there are so many: perfect memorisation."""
    images = np.asarray(images)
    random = np.random.default_rng(seed)
    return images[random.choice(len(images), n, replace=n > len(images))]


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
