"""Pixels on their way in and out: 8 bits and [−1, 1], single files, grids, strips and animations."""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ext_common.manifest import atomic_write


def to_float(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]: 0 is −1, 255 is 1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """Images in [−1, 1], (B, C, H, W), to the nearest of 256 values, uint8 (B, C, H, W)."""
    return (x.detach().float() * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8).cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 (N, C, H, W) → one white-ruled picture (C, H', W'), rows first; square by default."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    sheet = np.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def pil_image(image: np.ndarray, scale: int = 1) -> Image.Image:
    """uint8 (C, H, W), C 1 or 3, as a Pillow image, each pixel drawn `scale` times as large."""
    image = image.repeat(scale, 1).repeat(scale, 2)
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def save_png(path: str | os.PathLike[str], image: np.ndarray, scale: int = 1) -> None:
    """Write uint8 (C, H, W) as PNG, whole or not at all."""
    with atomic_write(path, "wb") as file:
        pil_image(image, scale).save(file, "PNG")


def save_gif(path: str | os.PathLike[str], frames: Sequence[np.ndarray], scale: int = 1) -> None:
    """Write frames (C, H, W) as an endless GIF of about 3 seconds, the last frame held for 2."""
    images = [pil_image(frame, scale) for frame in frames]
    times = [max(20, 3000 // len(images))] * (len(images) - 1) + [2000]
    with atomic_write(path, "wb") as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0)


def display_scale(height: int, least: int = 48) -> int:
    """How many times larger small images are drawn, so that they can be looked at."""
    return max(1, round(least / height))
