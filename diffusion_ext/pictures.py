"""Pixels on their way in and out: 8 bits and [−1, 1], files, grids, animations, sheets with names on them."""

import math
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ext_common.manifest import atomic_write

GAP = 2  # pixels around each image, before it is drawn larger
TEXT = 12  # pixels, height of letters
PAD = 4


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


def save_png(
    path: str | os.PathLike[str], image: np.ndarray, scale: int = 1, durable: bool = True
) -> None:
    """Write uint8 (C, H, W) as PNG, whole or not at all; durable: as of `atomic_write`."""
    save_picture(path, pil_image(image, scale), durable)


def save_picture(path: str | os.PathLike[str], image: Image.Image, durable: bool = True) -> None:
    """Write a Pillow image as PNG, whole or not at all."""
    with atomic_write(path, "wb", durable=durable) as file:
        image.save(file, "PNG")


def save_gif(path: str | os.PathLike[str], frames: Sequence[np.ndarray], scale: int = 1) -> None:
    """Write frames (C, H, W) as an endless GIF of about 3 seconds, the last frame held for 2."""
    images = [pil_image(frame, scale) for frame in frames]
    times = [max(20, 3000 // len(images))] * (len(images) - 1) + [2000]
    with atomic_write(path, "wb") as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0)


def display_scale(height: int, least: int = 48) -> int:
    """How many times larger small images are drawn, so that they can be looked at."""
    return max(1, round(least / height))


def sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    beside: Sequence[str] = (),
    above: Sequence[str] = (),
    title: str = "",
    scale: int = 1,
) -> Image.Image:
    """Rows of images, uint8 (C, H, W), of one size each, on white; None leaves a place empty.

    beside: a name for each row; above: one for each column; title: a line over all. scale: how large a pixel
    of the images is drawn; letters are not enlarged. Gray where all images are.
    """
    images = [image for row in rows for image in row if image is not None]
    title, beside, above = in_ascii(title), [*map(in_ascii, beside)], [*map(in_ascii, above)]
    channels, height, width = images[0].shape
    mode, white = ("RGB", (255, 255, 255)) if channels == 3 else ("L", 255)
    font = ImageFont.load_default(TEXT)
    cell_h, cell_w = (height + GAP) * scale, (width + GAP) * scale
    above = [shortened(name, font, cell_w - PAD) for name in above]
    left = max((round(font.getlength(name)) + PAD for name in beside), default=0)
    line = TEXT + PAD
    top = line * (bool(title) + any(above))
    columns = max(map(len, rows))
    body = left + columns * cell_w + GAP * scale
    size = (
        max(body, round(font.getlength(title)) + PAD),
        top + len(rows) * cell_h + GAP * scale,
    )
    canvas = Image.new(mode, size, white)
    draw = ImageDraw.Draw(canvas)
    black = 0 if mode == "L" else (0, 0, 0)
    if title:
        draw.text((PAD // 2, 0), title, black, font)
    for column, name in enumerate(above):
        draw.text((left + column * cell_w + GAP * scale, top - line), name, black, font)
    for number, row in enumerate(rows):
        y = top + number * cell_h + GAP * scale
        if number < len(beside):
            middle = y + (height * scale - TEXT) // 2
            draw.text((PAD // 2, middle), beside[number], black, font)
        for column, image in enumerate(row):
            if image is not None:
                place = (left + column * cell_w + GAP * scale, y)
                canvas.paste(pil_image(image, scale), place)
    return canvas


def in_ascii(name: str) -> str:
    """A name in the letters that Pillow's own font has: é as e, others as ?."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "replace").decode()


def shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a name as fits into so many pixels."""
    while name and font.getlength(name) > width:
        name = name[:-1]
    return name


def by_class(
    images: Sequence[np.ndarray], labels: Sequence[int], most: int
) -> tuple[list[int], list[list[np.ndarray | None]]]:
    """(classes, rows): a row a class, in order, at most `most` images each."""
    classes = sorted(set(labels))
    rows: list[list[np.ndarray | None]] = []
    for label in classes:
        own = [image for image, k in zip(images, labels, strict=True) if k == label]
        rows.append([*own[:most]])
    return classes, rows
