"""Image files: which of a folder or a zip are images, and how each becomes 8-bit pixels of one size.

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

import contextlib
import functools
import importlib.util
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from ext_common.cli import UserError

POLICY = 1
EXTENSIONS = set(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .jp2 .j2k .jpx .ppm .pgm .pbm .pnm .tga".split()
)
# Read where what decodes them is there: the one by a new enough Pillow, the others by pillow-heif.
AVIF, HEIF = {".avif"}, {".heic", ".heif", ".hif"}
HEIF_REMEDY = "pip install 'fairseq-ext[heif]'"
File = str | os.PathLike[str] | BytesIO


class BadImage(Exception):
    """A file that cannot be used; the message is the reason, a clause without the file's name."""


class Source(NamedTuple):
    """One file of a folder: POSIX path below it, bytes, time of change in ns (of a zip: checksum)."""

    name: str
    size: int
    mtime_ns: int


@functools.cache
def formats() -> tuple[str, ...]:
    """What is decoded, by Pillow's names, whatever a file's ending.

    Not all that Pillow knows: its EPS reader would run Ghostscript on a text file called .png.
    """
    found = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "JPEG2000", "PPM", "TGA"]
    if features.check("avif"):
        found.append("AVIF")
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    return tuple(found)


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of files that can be decoded here."""
    found = set(EXTENSIONS)
    if features.check("avif"):
        found |= AVIF
    if importlib.util.find_spec("pillow_heif"):
        found |= HEIF
    return frozenset(found)


class ImageFiles:
    """The image files of a folder or a zip. sources: sorted; left_out: how many others, by ending.

    Hidden files and folders are passed over, links are followed. UserError where there is no such place.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place)
        self._zip: ZipFile | None = None
        self._process = os.getpid()
        self._prefix = ""
        found: list[Source] = []
        others: Counter[str] = Counter()
        if not self.place.exists():
            raise UserError(f"{place} does not exist: give a folder of images")
        if self.place.is_dir():
            _walk(self.place, "", frozenset(), found, others)
        elif self.place.suffix.lower() == ".zip":
            self._list_zip(found, others)
        else:
            raise UserError(
                f"{place} is a file: give the folder with the images, .zip, .npy or .npz"
            )
        self.sources, self.left_out = sorted(found), dict(others.most_common())

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def file(self, name: str) -> File:
        """What `decode_image` takes for one of the names."""
        if self._zip is None:
            return os.path.join(self.place, name)
        if self._process != os.getpid():
            # an open file has one place for all processes that inherit it
            self._zip, self._process = ZipFile(self.place), os.getpid()
        return BytesIO(self._zip.read(self._prefix + name))

    def _list_zip(self, found: list[Source], others: Counter[str]) -> None:
        try:
            self._zip = ZipFile(self.place)
        except (BadZipFile, OSError) as error:
            raise UserError(f"{self.place} is no readable zip ({error})") from None
        members = [
            entry
            for entry in self._zip.infolist()
            if not entry.is_dir()
            and not any(part.startswith((".", "__MACOSX")) for part in entry.filename.split("/"))
        ]
        # most zips hold the one folder that was packed
        tops = {entry.filename.partition("/")[0] for entry in members if "/" in entry.filename}
        if len(tops) == 1 and all("/" in entry.filename for entry in members):
            self._prefix = f"{tops.pop()}/"
        for entry in members:
            name = entry.filename.removeprefix(self._prefix)
            _sort_in(Source(name, entry.file_size, entry.CRC), found, others)


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """POSIX paths, relative to `folder`, of all image files below it, sorted by code point.

    Known by extension, in any case. Hidden files and folders are skipped, links are followed.
    UserError where `folder` is no readable folder.
    """
    return ImageFiles(folder).names


def list_images(folder: str | os.PathLike[str]) -> list[Source]:
    """As find_images, with what tells a changed file: nothing is opened, so 71,000 take a second."""
    return ImageFiles(folder).sources


def left_out_text(left_out: Mapping[str, int]) -> str:
    """A clause on the files that are no images by their ending; empty where there are none."""
    if not left_out:
        return ""
    parts = [
        f"{count} {ending or 'without'}" + (f" ({HEIF_REMEDY})" if ending in HEIF else "")
        for ending, count in left_out.items()
    ]
    return f"{sum(left_out.values())} files left out by their ending: {', '.join(parts)}"


def decode_image(file: File, height: int, width: int, channels: int) -> np.ndarray:
    """The image in a file as uint8 (channels, height, width); the module says how.

    channels: 1 or 3. Raises BadImage with the reason where that is not possible.
    """
    with opened(file) as image:
        return to_pixels(image, height, width, channels)


@contextlib.contextmanager
def opened(file: File) -> Iterator[Image.Image]:
    """A file's image, loaded and upright; BadImage for all that goes wrong, in the block, too."""
    try:
        if not isinstance(file, BytesIO):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            if status.st_size == 0:
                raise BadImage("empty file")
        with Image.open(file, formats=formats()) as image:
            _check_pixels(image)
            image.load()
            yield _upright(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage(_bomb()) from None
    # Pillow's decoders raise nearly anything on damaged bytes.
    except Exception as error:
        raise BadImage(_reason(error)) from None


def to_pixels(
    image: Image.Image, height: int, width: int, channels: int, behind: str = "white"
) -> np.ndarray:
    """Steps 2 to 6 of the policy: a loaded image as uint8 (channels, height, width).

    behind: the colour that shows through what is transparent.
    """
    image = cover(flatten(image, "L" if channels == 1 else "RGB", behind), height, width)
    pixels = np.asarray(image).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def flatten(image: Image.Image, mode: str, behind: str = "white") -> Image.Image:
    """The image in `mode`, "L" or "RGB", over a colour where it is transparent."""
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.mode == "F":
        raise BadImage("floating-point pixels")
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
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


def _walk(
    folder: Path,
    prefix: str,
    above: frozenset[Any],
    found: list[Source],
    others: Counter[str],
) -> None:
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
            _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here}, found, others)
        else:
            try:
                status = entry.stat()
                size, mtime_ns = status.st_size, status.st_mtime_ns
            except OSError:  # a broken link is reported where it is opened
                size = mtime_ns = -1
            _sort_in(Source(prefix + entry.name, size, mtime_ns), found, others)


def _sort_in(source: Source, found: list[Source], others: Counter[str]) -> None:
    ending = os.path.splitext(source.name)[1].lower()
    if ending in extensions():
        found.append(source)
    else:
        others[ending] += 1


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
