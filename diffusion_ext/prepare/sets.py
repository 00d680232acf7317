"""Images as evaluation takes them: a folder of images, a prepared folder, an .npy or .npz file, or an array.

Samples decide the size. Real images are read at that size straight from their files, by the one way of
diffusion_ext.prepare.images, and never augmented; what is already decoded in another size is refused.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_ext.prepare.arrays import is_array, read_array
from diffusion_ext.prepare.build import content_hash, image_hash, is_prepared
from diffusion_ext.prepare.images import BadImage, decode_image, find_images, formats
from diffusion_ext.prepare.options import ImageOptions, SplitOptions, StoreOptions
from diffusion_ext.store import Images, held_out, open_images
from ext_common.cli import UserError, progress

# Pictures of samples that somebody keeps among them.
PICTURES = {"grid.png", "strip.png", "trajectory.gif"}
_COLOURS = {1: "gray", 3: "colour"}


@dataclass(frozen=True)
class ImageSet:
    """N images of one size.

    pixels: uint8 (N, C, H, W), C = 1 or 3; labels: int64 (N,), index into `classes`, -1 without; hashes:
    16 hex digits of each image's pixels; held_out: bool (N,), not trained on; name: for messages; left_out:
    files of the folder that are pictures of samples and not samples.
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    hashes: tuple[str, ...]
    held_out: np.ndarray
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.pixels.shape[1:]

    @property
    def size(self) -> str:
        """As messages show it: 16x16 gray."""
        channels, height, width = self.shape
        return f"{height}x{width} {_COLOURS[channels]}"

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of all pixels and labels in order."""
        return content_hash(self.shape, self.hashes, self.labels.tolist())

    @property
    def flat(self) -> np.ndarray:
        """uint8 (N, C·H·W)."""
        return self.pixels.reshape(len(self), -1)


Given = str | os.PathLike[str] | np.ndarray | ImageSet


def open_samples(source: Given) -> ImageSet:
    """Images to be judged, in the size they have.

    source: path or uint8 array (N, C, H, W). Of a folder of images every file must be usable and of one size.
    Raises UserError.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, np.ndarray):
        return array_set(source, "samples")
    path = Path(source)
    if is_array(path):
        return array_set(*read_array(path))
    if is_prepared(path):
        return _store_set(path, Images.open(path), SplitOptions())
    return _sample_folder(path)


def open_reals(
    source: Given, like: ImageSet, split: SplitOptions, store: StoreOptions | None = None
) -> ImageSet:
    """Real images in the size and colours of `like`; `split` says which are held out.

    source: path or uint8 array (N, C, H, W); store: for a folder that is not prepared. Raises UserError,
    also where what is decoded already has another size.
    """
    if isinstance(source, ImageSet):
        return _check_shape(source, like)
    if isinstance(source, np.ndarray):
        return _check_shape(array_set(source, "real images", split=split), like)
    path = Path(source)
    if is_array(path):
        return _check_shape(array_set(*read_array(path), split=split), like)
    if is_prepared(path):
        return _check_shape(_store_set(path, Images.open(path), split), like)
    names = find_images(path)
    channels, height, width = like.shape
    store = store or StoreOptions()
    options = ImageOptions(
        image_size=[height, width],
        channels=channels,
        class_labels=bool(names) and all("/" in name for name in names),
        max_bad=store.max_bad,
        image_store=store.image_store,
    )
    return _store_set(path, open_images(path, options), split)


def array_set(
    pixels: np.ndarray,
    name: str,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
    split: SplitOptions | None = None,
) -> ImageSet:
    """An ImageSet of an array; UserError where it is not uint8 (N, 1 or 3, H, W)."""
    if pixels.ndim != 4 or pixels.shape[1] not in _COLOURS or pixels.dtype != np.uint8:
        raise UserError(
            f"{name} is {pixels.dtype} {pixels.shape}: give images as uint8 (N, channels, height, "
            "width) with 1 or 3 channels"
        )
    if labels is None:
        labels = np.full(len(pixels), -1, dtype=np.int64)
    elif not classes:
        classes = tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
    hashes = tuple(map(image_hash, pixels))
    return ImageSet(name, pixels, labels, classes, hashes, _held_out(hashes, split))


def _sample_folder(folder: Path) -> ImageSet:
    found = find_images(folder)
    names = [name for name in found if name not in PICTURES]
    if not names:
        raise UserError(
            f"{folder} holds no images (jpg, png, bmp, gif, webp, tif): give a folder of samples"
        )
    first = folder / names[0]
    channels, height, width = _shape_of(first)
    pixels = np.empty((len(names), channels, height, width), dtype=np.uint8)
    for row, name in enumerate(progress(names, "reading samples", "images")):
        path = folder / name
        if (shape := _shape_of(path)) != (channels, height, width):
            raise UserError(
                f"{path} is {_show(shape)}, {first} is {_show((channels, height, width))}: "
                "give samples of one size"
            )
        try:
            pixels[row] = decode_image(path, height, width, channels)
        except BadImage as error:
            raise UserError(f"{path} cannot be used ({error}): take it out or repair it") from None
    left_out = tuple(name for name in found if name not in names)
    hashes = tuple(map(image_hash, pixels))
    tops = [name.split("/")[0] for name in names] if all("/" in name for name in names) else []
    classes = tuple(sorted(set(tops)))
    labels = np.array([classes.index(top) for top in tops] or [-1] * len(names), dtype=np.int64)
    held = _held_out(hashes, None)
    return ImageSet(str(folder), pixels, labels, classes, hashes, held, left_out)


def _shape_of(path: Path) -> tuple[int, int, int]:
    try:
        with Image.open(path, formats=formats()) as image:
            return 1 if image.mode in ("1", "L", "I;16") else 3, image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{path} cannot be used (not an image): take it out or repair it") from None


def _store_set(path: Path, images: Images, split: SplitOptions) -> ImageSet:
    return ImageSet(
        os.fspath(path),
        images.pixels,
        images.labels,
        tuple(images.classes),
        tuple(images.hashes),
        _held_out(images.hashes, split),
    )


def _held_out(hashes: Sequence[str], split: SplitOptions | None) -> np.ndarray:
    if split is None or len(hashes) < 2:
        return np.zeros(len(hashes), dtype=bool)
    return held_out(hashes, split.valid_fraction, split.max_valid)


def _check_shape(images: ImageSet, like: ImageSet) -> ImageSet:
    if images.shape != like.shape:
        raise UserError(
            f"{images.name} holds images of {images.size}, the samples are {like.size}: give the "
            "folder of the original images, which is read in any size"
        )
    return images


def _show(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}x{shape[2]} {_COLOURS[shape[0]]}"
