"""Twelve ways to damage images, each weakly, middling and strongly; fixed before what is to see them."""

from io import BytesIO

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

# kind → (weak, middle, strong)
STRENGTHS = {
    "noise": (6, 12, 25),  # σ of 256
    "salt": (0.003, 0.01, 0.03),  # share of pixels that are black or white
    "checkerboard": (6, 12, 25),  # ± of 256
    "blocks": (0.25, 0.5, 1.0),  # share of the 2 × 2 means
    "blur": (0.4, 0.6, 1.0),  # σ in pixels
    "sharpen": (0.4, 0.8, 1.6),  # times what a blur of σ 1 takes away
    "brightness": (8, 16, 32),  # of 256
    "contrast": (0.9, 0.8, 0.6),  # times the distance from the middle
    "tint": (8, 16, 32),  # red up, blue down
    "posterise": (64, 32, 16),  # levels left
    "jpeg": (75, 50, 20),  # quality
    "square": (4, 8, 16),  # side of a gray square at a random place, pixels of 64
}


def damaged(images: np.ndarray, kind: str, strength: float, seed: int = 0) -> np.ndarray:
    """uint8 (N, C, H, W) → the same, damaged."""
    random = np.random.default_rng(seed)
    x = images.astype(np.float64)
    height, width = x.shape[2:]
    if kind == "noise":
        x += strength * random.standard_normal(x.shape)
    elif kind == "salt":
        hit = random.random((len(x), 1, height, width)) < strength
        x = np.where(hit, 255.0 * (random.random(hit.shape) < 0.5), x)
    elif kind == "checkerboard":
        x += strength * (1 - 2 * (np.indices((height, width)).sum(0) % 2))
    elif kind == "blocks":
        means = x.reshape(*x.shape[:2], height // 2, 2, width // 2, 2).mean((3, 5))
        x = (1 - strength) * x + strength * means.repeat(2, 2).repeat(2, 3)
    elif kind == "blur":
        x = gaussian_filter(x, (0, 0, strength, strength))
    elif kind == "sharpen":
        x += strength * (x - gaussian_filter(x, (0, 0, 1, 1)))
    elif kind == "brightness":
        x += strength
    elif kind == "contrast":
        x = 127.5 + strength * (x - 127.5)
    elif kind == "tint":
        x[:, 0] += strength
        x[:, -1] -= strength
    elif kind == "posterise":
        step = 256 / strength
        x = np.floor(x / step) * step + step / 2
    elif kind == "jpeg":
        return np.stack([_jpeg(image, int(strength)) for image in images])
    elif kind == "square":
        side = round(strength * height / 64)
        for image in x:
            top, left = random.integers(height - side + 1), random.integers(width - side + 1)
            image[:, top : top + side, left : left + side] = 128
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)
