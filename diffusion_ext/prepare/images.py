"""Image files: which of a folder are images, and how each becomes 8-bit pixels of one size.

What is done to a file, in this order (POLICY is its version; a store decoded under another is decoded anew):

1. the first frame or page of it is taken, and turned upright as its EXIF orientation says;
2. 16-bit gray is divided by 257 and rounded, so that white stays white; 16-bit colour is what Pillow makes of
   it, the high byte; floating-point pixels are refused, they do not say what white is;
3. palettes become colours; CMYK and other colour spaces become RGB by Pillow's formulae, without profiles;
4. transparency, be it an alpha channel, a palette's or a key colour, is laid over white;
5. colour becomes gray as 0.299 R + 0.587 G + 0.114 B (ITU-R 601) where one channel is wanted, gray becomes
   three equal channels where three are;
6. the image is scaled so that it just covers the target, with its aspect kept, and cut at the centre: down
   with an antialiased Lanczos filter, up with bicubic; where one side fits already nothing is resampled.
"""

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ext_common.cli import UserError

POLICY = 1
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
# Not all that Pillow knows: its EPS reader would run Ghostscript on a text file called .png.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")


class BadImage(Exception):
    """A file that cannot be used; the message is the reason, a clause without the file's name."""


class Source(NamedTuple):
    """One file of a folder: POSIX path below the folder, bytes, time of change in ns."""

    name: str
    size: int
    mtime_ns: int


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """POSIX paths, relative to `folder`, of all image files below it, sorted by code point.

    Known by extension, in any case. Hidden files and folders are skipped, links are followed.
    UserError where `folder` is no readable folder.
    """
    return [source.name for source in list_images(folder)]


def list_images(folder: str | os.PathLike[str]) -> list[Source]:
    """As find_images, with what tells a changed file: nothing is opened, so 71,000 take a second."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder with the images")
    found: list[Source] = []
    _walk(folder, "", frozenset(), found)
    return sorted(found)


def decode_image(
    path: str | os.PathLike[str], height: int, width: int, channels: int
) -> np.ndarray:
    """The image in `path` as uint8 (channels, height, width); the module says how.

    channels: 1 or 3. Raises BadImage with the reason where that is not possible.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size == 0:
            raise BadImage("empty file")
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(image)
            image.load()
            return to_pixels(_upright(image), height, width, channels)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage(_bomb()) from None
    # Pillow's decoders raise nearly anything on damaged bytes.
    except Exception as error:
        raise BadImage(_reason(error)) from None


def to_pixels(image: Image.Image, height: int, width: int, channels: int) -> np.ndarray:
    """Steps 2 to 6 of the policy: a loaded image as uint8 (channels, height, width)."""
    image = cover(flatten(image, "L" if channels == 1 else "RGB"), height, width)
    pixels = np.asarray(image).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`, "L" or "RGB", over white where it is transparent."""
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.mode == "F":
        raise BadImage("floating-point pixels")
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert(mode)


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image scaled to just cover height × width and cut at the centre.

    The centre with the target's aspect is resampled straight to the target: a size between, rounded
    to whole pixels, would squash by up to half a pixel.
    """
    w, h = image.size
    scale = max(width / w, height / h)
    if scale == 1:
        left, top = (w - width) // 2, (h - height) // 2
        return image.crop((left, top, left + width, top + height))
    box_w, box_h = min(w, width / scale), min(h, height / scale)
    x, y = (w - box_w) / 2, (h - box_h) / 2
    box = (x, y, min(w, x + box_w), min(h, y + box_h))
    kernel = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.resize((width, height), kernel, box=box)


def _walk(folder: Path, prefix: str, above: frozenset[Any], found: list[Source]) -> None:
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that it lies in
            return
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here}, found)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            try:
                status = entry.stat()
                size, mtime_ns = status.st_size, status.st_mtime_ns
            except OSError:  # a broken link is reported where it is opened
                size = mtime_ns = -1
            found.append(Source(prefix + entry.name, size, mtime_ns))


def _check_pixels(image: Image.Image) -> None:
    w, h = image.size
    if Image.MAX_IMAGE_PIXELS and w * h > Image.MAX_IMAGE_PIXELS:
        raise BadImage(_bomb())


def _bomb() -> str:
    return f"decompression bomb, more than {Image.MAX_IMAGE_PIXELS} pixels"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels, which are loaded
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("gray values outside 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror})"
    if "truncated" in str(error).lower():
        return "truncated"
    text = " ".join(str(error).split())[:100] or type(error).__name__
    return f"cannot be decoded ({text})"
