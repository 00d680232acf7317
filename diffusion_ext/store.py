"""Images as training, sampling and evaluation read them: decoded once, memory-mapped from then on.

>>> images = open_images("faces", ImageOptions(image_size=[64]))
>>> images.pixels[0]                                # uint8 (3, 64, 64)
>>> images.rows("train", valid_fraction=0.05, max_valid=1000)
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_ext.prepare.arrays import array_recipe, is_array
from diffusion_ext.prepare.build import (
    NAME,
    Recipe,
    build,
    check_bad,
    fingerprint_of,
    is_prepared,
    printable,
    read_meta,
)
from diffusion_ext.prepare.images import ImageFiles, Source, decode_image, left_out_text
from diffusion_ext.prepare.options import ImageOptions, asked_size, check_split
from ext_common.cli import UserError
from ext_common.folders import partial_folder
from ext_common.manifest import user_cache
from ext_common.store import JoinedRows, joined_rows, open_store, parts_of

SPLITS = ("train", "valid")


@dataclass
class Images:
    """N decoded images.

    pixels: read-only memory map, uint8 (N, channels, height, width); labels: int64 (N,), index
    into `classes`, -1 without; names: paths in the source; hashes: 16 hex digits of each image's
    pixels; content_hash: of all pixels and labels in order.
    """

    path: Path
    pixels: np.ndarray
    labels: np.ndarray
    classes: list
    names: list
    hashes: list
    content_hash: str
    skipped: list  # (name, reason) each
    gray: int = 0  # of the images that are kept in colour, how many have none
    unused: int = 0  # classes that were prepared and are not asked for

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Images":
        """The finished store in the folder `path`; UserError where it is none, or damaged."""
        path = Path(path)
        meta = read_meta(path)
        if meta is None:
            raise UserError(f"{path} is not a prepared folder: run diffusion_ext.prepare first")
        pixels = open_store(path, NAME).data
        try:
            images = cls(
                path=path,
                pixels=pixels,
                labels=np.array(meta["labels"], dtype=np.int64),
                classes=meta["classes"],
                names=meta["names"],
                hashes=meta["hashes"],
                content_hash=meta["content_hash"],
                skipped=[tuple(pair) for pair in meta["skipped"]],
                gray=meta.get("gray", 0),
            )
            whole = pixels.shape == (meta["images"], *meta["shape"])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged: delete it and prepare it again")
        return images

    def __len__(self):
        return len(self.pixels)

    @property
    def remark(self) -> str:
        """What a user should know of the images, or empty."""
        said = []
        if self.gray and self.gray == len(self):
            said.append(
                "all images are gray, kept in three equal channels: --channels 1 keeps and draws one"
            )
        if self.unused:
            said.append(f"their {self.unused} classes are not learnt: --class-labels does")
        return "; ".join(said)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[2]

    @property
    def width(self) -> int:
        return self.pixels.shape[3]

    def rows(self, split: str, valid_fraction: float, max_valid: int) -> np.ndarray:
        """Rows of the split "train" or "valid", ascending, int64; see `held_out`.

        UserError where all images are the same one and none could be held out.
        """
        if split not in SPLITS:
            raise UserError(f"{self.path} has no split {split!r}; it has: {', '.join(SPLITS)}")
        check_split(valid_fraction, max_valid)
        valid = held_out(self.hashes, valid_fraction, max_valid)
        if valid.all():
            raise UserError(f"all {len(self)} images of {self.path} are the same: add others")
        return np.flatnonzero(valid if split == "valid" else ~valid)

    def __getstate__(self):
        # A pickled memory map is all it maps, and a spawned loading worker gets its dataset pickled.
        return {**self.__dict__, "pixels": None}

    def __setstate__(self, state):
        parts = parts_of(state["path"])
        hashes = [(read_meta(part) or {}).get("content_hash") for part in parts]
        if None in hashes or joined_hash(hashes) != state["content_hash"]:
            raise UserError(f"{state['path']} was replaced while it was in use: start again")
        self.__dict__.update(state, pixels=joined_rows(parts, NAME))


def open_images(data, options) -> Images:
    """The images in `data`: a folder that diffusion_ext.prepare made, or any folder of images.

    The latter are decoded at the first call; after that the store is found by the folder's path and
    the options, and used while names, sizes and times of change of its files are the same. Several are one,
    as "A:B". options:
    ImageOptions, or what has its fields. Raises UserError.
    """
    if len(parts := parts_of(data)) > 1:
        return joined([open_images(part, options) for part in parts])
    data = Path(data)
    ImageOptions(**{name: getattr(options, name) for name in ImageOptions.__dataclass_fields__})
    if is_prepared(data):
        images = Images.open(data)
        check_asked(images, options)
    else:
        if not data.exists() and partial_folder(data).exists():
            raise UserError(
                f"{data} is still being prepared, or its preparation was interrupted: run the same "
                "prepare command again, it continues"
            )
        recipe = recipe_of(data, options)
        store = store_folder(data, options, recipe)
        if fingerprint_of(store) != recipe.fingerprint:
            build(store, recipe, options.max_bad)
        images = Images.open(store)
        check_bad(recipe.source, images.skipped, len(recipe.names), options.max_bad)
    if not options.class_labels:
        images.unused = len(images.classes)
        images.labels, images.classes = np.full_like(images.labels, -1), []
    elif not images.classes:
        raise UserError(f"{data} was prepared without classes: leave --class-labels out")
    return images


def joined(parts: list[Images]) -> Images:
    """Several sets of images as one, one behind the other; classes of one name are one.

    UserError where their sizes differ, or only some have classes.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.pixels.shape[1:] != first.pixels.shape[1:]:
            sizes = [
                f"{p.path} has {'×'.join(map(str, p.pixels.shape[1:]))}" for p in (part, first)
            ]
            raise UserError(f"{', '.join(sizes)}: give --image-size and --channels for all")
    classes = sorted({name for part in parts for name in part.classes})
    maps = [np.array([*map(classes.index, part.classes), -1], dtype=np.int64) for part in parts]
    return Images(
        path=Path(":".join(str(part.path) for part in parts)),
        pixels=JoinedRows([part.pixels for part in parts]),  # type: ignore[arg-type]
        labels=np.concatenate([m[part.labels] for m, part in zip(maps, parts, strict=True)]),
        classes=classes,
        names=[name for part in parts for name in part.names],
        hashes=[digest for part in parts for digest in part.hashes],
        content_hash=joined_hash([part.content_hash for part in parts]),
        skipped=[pair for part in parts for pair in part.skipped],
        gray=sum(part.gray for part in parts),
        unused=max(part.unused for part in parts),
    )


def joined_hash(hashes: Sequence[str]) -> str:
    """Of one its own, of several that of all."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def recipe_of(data: str | os.PathLike[str], options: Any) -> Recipe:
    """What to make of a folder or zip of images, or of an array; of the former nothing is decoded."""
    if is_array(data) and Path(data).is_file():
        return array_recipe(Path(data), options)
    return folder_recipe(data, options)


def folder_recipe(folder, options) -> Recipe:
    """What to make of a folder or zip of images; nothing is decoded."""
    folder = Path(folder)
    files = ImageFiles(folder)
    sources = files.sources
    left_out = left_out_text(files.left_out)
    if not sources:
        raise UserError(
            f"{folder} holds no images (jpg, png, bmp, gif, webp, tif, …): give a folder of images"
            + (f" ({left_out})" if left_out else "")
        )
    if len(sources) == 1:
        raise UserError(
            f"{folder} holds a single image, {sources[0].name}: at least 2 are needed, one of them "
            "to validate on"
        )
    size = asked_size(options)
    if size is None:
        raise UserError(f"{folder} holds images of any size: give --image-size, in pixels")
    names = [source.name for source in sources]
    top = next((name for name in names if "/" not in name), None)
    if options.class_labels and top is not None:
        raise UserError(
            f"--class-labels: {top} lies directly in {folder}: put every image into the sub-folder "
            "of its class"
        )
    # Noted whether asked for or not: training without them needs no other store.
    folders = [] if top is not None else [name.split("/")[0] for name in names]
    classes = sorted(set(folders))
    index = {name: label for label, name in enumerate(classes)}
    (height, width), channels = size, options.channels or 3

    def load(number):
        return decode_image(files.file(names[number]), height, width, channels)

    return Recipe(
        source=str(folder.resolve()),
        names=names,
        labels=[index[name] for name in folders] or [-1] * len(names),
        classes=classes,
        height=height,
        width=width,
        channels=channels,
        load=load,
        state=listing_hash(sources),
        left_out=left_out,
    )


def store_folder(data, options, recipe: Recipe) -> Path:
    """Where the store of a folder of images is kept."""
    root = Path(options.image_store or user_cache("diffusion_ext")).resolve()
    check_outside(root, data, "--image-store")
    key = hashlib.sha256(json.dumps([printable(recipe.source), recipe.shape]).encode())
    return root / f"{Path(recipe.source).name or 'images'}-{key.hexdigest()[:12]}"


def check_outside(place, data, what: str) -> None:
    """UserError where `place` lies in the images' folder, visibly."""
    place, data = Path(place).resolve(), Path(data).resolve()
    inside = place.relative_to(data).parts if place.is_relative_to(data) else None
    if inside is not None and not any(part.startswith(".") for part in inside):
        raise UserError(f"{what} {place} lies in the folder of images {data}: give another place")


def check_asked(images: Images, options) -> None:
    """UserError where other images are asked for than a prepared folder holds."""
    size, path = asked_size(options), images.path
    if size is not None and size != (images.height, images.width):
        raise UserError(
            f"{path} holds images of {images.height}x{images.width} pixels, --image-size asks for "
            f"{size[0]}x{size[1]}: leave it out, or prepare the images again in that size"
        )
    if options.channels and options.channels != images.channels:
        raise UserError(
            f"{path} holds images of {images.channels} channels, --channels asks for "
            f"{options.channels}: leave it out, or prepare the images again"
        )


def held_out(hashes, valid_fraction: float, max_valid: int) -> np.ndarray:
    """Which images are for validation, bool (N,).

    Those with the smallest content hash: identical images are always on the same side, and neither
    order nor seed has a part in it. The number is the rounded share of N, but at least 1 and at
    most `max_valid`; of 2 to 29 images at 5 % it is 1. Images that occur more often than there is
    room for are passed over; where all do, the least frequent is taken whole. A share of 0 holds
    out nothing.
    """
    if valid_fraction == 0:
        return np.zeros(len(hashes), dtype=bool)
    room = min(max_valid, max(1, round(valid_fraction * len(hashes))), len(hashes) - 1)
    distinct, group, counts = np.unique(
        np.asarray(hashes, dtype=str), return_inverse=True, return_counts=True
    )
    if counts.min() > room:
        return group == counts.argmin()
    chosen = np.zeros(len(distinct), dtype=bool)
    for number in np.flatnonzero(counts <= room):
        if counts[number] <= room:
            chosen[number], room = True, room - counts[number]
        if room == 0:
            break
    return chosen[group]


def listing_hash(sources: list[Source]) -> str:
    """Hex SHA-256 over names, sizes and times of change."""
    digest = hashlib.sha256()
    for source in sources:
        line = f"{source.name}\0{source.size}\0{source.mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
