"""Images in an array: .npy, or .npz with "images" (or one array alone) and, if there are any, "labels"."""

import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from diffusion_ext.prepare.build import Recipe
from diffusion_ext.prepare.images import to_pixels
from diffusion_ext.prepare.options import asked_size
from ext_common.cli import UserError
from ext_common.manifest import known_sha256

ENDINGS = {".npy", ".npz"}


def is_array(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of an array, by its ending."""
    return Path(path).suffix.lower() in ENDINGS


def read_array(path: Path) -> tuple[np.ndarray, str, np.ndarray | None]:
    """(pixels, name, labels or None) of a file; UserError where it cannot be read."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, str(path), None
        with loaded:
            others = [key for key in loaded.files if key != "labels"]
            key = "images" if "images" in others else others[0] if len(others) == 1 else None
            if key is None:
                raise UserError(
                    f"{path} holds the arrays {', '.join(loaded.files) or 'none'}: name the one with "
                    "the images 'images'"
                )
            pixels = loaded[key]
            labels = loaded["labels"].astype(np.int64) if "labels" in loaded.files else None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a folder of images, .npy or .npz") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): write it with numpy.save") from error
    if labels is not None and labels.shape != pixels.shape[:1]:
        raise UserError(f"{path} has {len(pixels)} images and labels {labels.shape}: give one each")
    return pixels, str(path), labels


def rows_last(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 (N, H, W), (N, C, H, W) or (N, H, W, C), C 1 or 3 → (N, H, W) or (N, H, W, 3).

    UserError for anything else; where both could be the channels, the second axis is.
    """
    shape = pixels.shape
    if pixels.dtype == np.uint8 and pixels.ndim in (3, 4) and len(pixels):
        if pixels.ndim == 4 and shape[1] in (1, 3):
            pixels = pixels.transpose(0, 2, 3, 1)
        if pixels.ndim == 3:
            return pixels
        if pixels.shape[-1] in (1, 3):
            return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    raise UserError(
        f"{name} is {pixels.dtype} {shape}: give images as uint8 (N, height, width), (N, channels, height,"
        " width) or (N, height, width, channels), with 1 or 3 channels"
    )


def array_recipe(path: Path, options: Any) -> Recipe:
    """What to make of an array; its own size and channels where `options` leave them open."""
    pixels, name, labels = read_array(path)
    rows = rows_last(pixels, name)
    height, width = asked_size(options) or rows.shape[1:3]
    channels = options.channels or (3 if rows.ndim == 4 else 1)
    if labels is not None and labels.min(initial=0) < 0:
        raise UserError(f"{path} has a label below 0: number the classes from 0")
    count = 0 if labels is None else int(labels.max(initial=-1)) + 1

    def load(number: int) -> np.ndarray:
        return to_pixels(Image.fromarray(rows[number]), height, width, channels)

    return Recipe(
        source=str(path.resolve()),
        names=[f"{path.name}/{number}" for number in range(len(rows))],
        labels=[-1] * len(rows) if labels is None else [int(label) for label in labels],
        classes=[str(k) for k in range(count)],
        height=height,
        width=width,
        channels=channels,
        load=load,
        state=known_sha256(path),
    )
