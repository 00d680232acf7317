"""Data sets known by name, in place of a folder of images.

Every entry of IMAGE_DATASETS is `entry(root, download) -> Labelled`: root is a folder for files that have to
be fetched, which is done only where download is true. Raises UserError.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_ext.prepare.build import Recipe
from diffusion_ext.prepare.images import to_pixels
from diffusion_ext.prepare.options import asked_size
from ext_common.cli import UserError
from ext_common.registry import Registry

IMAGE_DATASETS = Registry("image dataset")


@dataclass
class Labelled:
    """pixels: uint8 (N, H, W) or (N, H, W, 3); labels: ints (N,), index into classes."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: list[Any]


@IMAGE_DATASETS.register("digits")
def digits(root: Path, download: bool) -> Labelled:
    """1,797 handwritten digits in gray, 8x8, ten classes; they come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "image dataset 'digits' comes with scikit-learn, which is not installed: "
            "pip install 'fairseq-ext[digits]'"
        ) from None
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return Labelled(pixels, data.target, [str(n) for n in range(10)])


@IMAGE_DATASETS.register("cifar10")
def cifar10(root: Path, download: bool) -> Labelled:
    """50,000 training photographs in colour, 32x32, ten classes (163 MB)."""
    return from_torchvision("cifar10", "CIFAR10", root, download)


@IMAGE_DATASETS.register("mnist")
def mnist(root: Path, download: bool) -> Labelled:
    """60,000 handwritten training digits in gray, 28x28, ten classes (11 MB)."""
    return from_torchvision("mnist", "MNIST", root, download)


@IMAGE_DATASETS.register("fashion_mnist")
def fashion_mnist(root: Path, download: bool) -> Labelled:
    """60,000 training pictures of clothes in gray, 28x28, ten classes (29 MB)."""
    return from_torchvision("fashion_mnist", "FashionMNIST", root, download)


def from_torchvision(name: str, cls: str, root: Path, download: bool) -> Labelled:
    """The training split of a data set of torchvision that keeps `data` and `targets` in memory."""
    try:
        from torchvision import datasets
    except ImportError:
        raise UserError(
            f"image dataset {name!r} needs torchvision, which is not installed: "
            "pip install torchvision"
        ) from None
    try:
        data = getattr(datasets, cls)(str(root), train=True, download=download)
    except Exception as error:  # of urllib, of hashes, of archives: torchvision has no own
        # Its sentence for absent files names a Python argument, which is no flag.
        if download:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"image dataset {name!r} could not be fetched into {root} ({text}): try again, or "
                "name a folder that has it with --dataset-root"
            ) from error
        raise UserError(
            f"image dataset {name!r} is not in {root}, or damaged: --download fetches it, "
            "--dataset-root names a folder that has it"
        ) from error
    classes = [str(label) for label in data.classes]
    return Labelled(np.asarray(data.data), np.asarray(data.targets), classes)


def dataset_recipe(name: str, options: Any, root: str | os.PathLike[str], download: bool) -> Recipe:
    """What to make of a data set; its own size and channels where `options` leave them open."""
    data = IMAGE_DATASETS.get(name)(Path(root), download)
    colour = data.pixels.ndim == 4
    height, width = asked_size(options) or data.pixels.shape[1:3]
    channels = options.channels or (3 if colour else 1)
    # buffers to hashlib, but not to mypy
    pixels: Any = np.ascontiguousarray(data.pixels)
    labels: Any = np.asarray(data.labels, dtype=np.int64)
    digest = hashlib.sha256(pixels)
    digest.update(labels)

    def load(number: int) -> np.ndarray:
        return to_pixels(Image.fromarray(data.pixels[number]), height, width, channels)

    return Recipe(
        source=name,
        names=[f"{name}/{number}" for number in range(len(data.pixels))],
        labels=[int(label) for label in data.labels],
        classes=data.classes,
        height=height,
        width=width,
        channels=channels,
        load=load,
        state=digest.hexdigest(),
    )
