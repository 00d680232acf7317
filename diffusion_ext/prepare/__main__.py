r"""Images become one folder of decoded pixels to train on.

python -m diffusion_ext.prepare IMAGES DATA --image-size 64
python -m diffusion_ext.prepare DATA --image-dataset digits --image-size 16
python -m diffusion_ext.prepare --prune IMAGES
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from diffusion_ext.prepare.build import (
    build,
    by_reason,
    check_bad,
    check_replaceable,
    fingerprint_of,
    read_meta,
)
from diffusion_ext.prepare.known import IMAGE_DATASETS, dataset_recipe
from diffusion_ext.prepare.options import ImageOptions
from diffusion_ext.store import Images, check_outside, recipe_of
from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import user_cache

EXAMPLE_TEXT = """
data sets for --image-dataset:
{datasets}

How files are decoded, scaled and cut is written in diffusion_ext/prepare/images.py. Preparing is not
needed to train: training does the same with IMAGES and keeps the result in a cache, out of which --prune
takes it. Interrupted, the same command continues. Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class PrepareOptions:
    """Where images come from when not from a folder, and how they are written."""

    image_dataset: Optional[str] = field(
        default=None, metadata={"help": "a data set by name, in place of IMAGES; see below"}
    )
    download: bool = field(
        default=False, metadata={"help": "fetch a data set's files where they are absent"}
    )
    dataset_root: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder of the data sets' files; none: torchvision in $XDG_CACHE_HOME or ~/.cache"
        },
    )
    workers: Optional[int] = field(
        default=None, metadata={"help": "threads that decode; none: one for each CPU"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace what was prepared before from other images"}
    )
    prune: bool = field(
        default=False,
        metadata={
            "help": "write nothing, but take what training has decoded of IMAGES out of the cache; without "
            "IMAGES, what was decoded of folders that are gone"
        },
    )

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.image_dataset is not None:
            IMAGE_DATASETS.get(self.image_dataset)


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m diffusion_ext.prepare",
        description=__doc__,
        epilog=EXAMPLE_TEXT.replace("{datasets}", IMAGE_DATASETS.describe()),
        usage="%(prog)s IMAGES DATA [--flags]\n       %(prog)s DATA --image-dataset NAME [--flags]"
        "\n       %(prog)s --prune [IMAGES]",
    )
    parser.add_argument(
        "paths",
        metavar="IMAGES DATA",
        nargs="*",
        help="images (a folder, .zip, .npy or .npz), and folder to write",
    )
    add_dataclass(parser, ImageOptions)
    add_dataclass(parser, PrepareOptions)
    args = parser.parse_args(argv)
    options, choices = from_args(ImageOptions, args), from_args(PrepareOptions, args)
    if choices.prune:
        if len(args.paths) > 1:
            raise UsageError("--prune takes IMAGES, or no path")
        clean(options.image_store or user_cache("diffusion_ext"), *args.paths)
        return
    named = choices.image_dataset is not None
    if len(args.paths) != 2 - named:
        raise UsageError(
            f"{len(args.paths)} paths given: name IMAGES and DATA, or DATA alone with --image-dataset"
        )
    prepare(None if named else args.paths[0], args.paths[-1], options, choices)


def prepare(source, dest, options=None, choices=None) -> Images:
    """Write the folder `dest` and print what is in it; raises UserError.

    source: folder of images, or None for `choices.image_dataset`; options: ImageOptions; choices:
    PrepareOptions.
    """
    options, choices = options or ImageOptions(), choices or PrepareOptions()
    dest, began = Path(dest), time.monotonic()
    if source is None:
        root = choices.dataset_root or user_cache("torchvision")
        recipe = dataset_recipe(choices.image_dataset, options, root, choices.download)
    else:
        recipe = recipe_of(source, options)
        check_outside(dest, source, "DATA")
    done = fingerprint_of(dest) == recipe.fingerprint
    if not done:
        if not choices.overwrite:
            refuse_another(dest, recipe)
        build(dest, recipe, options.max_bad, choices.workers)
    images = Images.open(dest)
    check_bad(recipe.source, images.skipped, len(recipe.names), options.max_bad)
    print(summary(images))
    for said in filter(None, (recipe.left_out, images.remark)):
        print(said)
    state = "is up to date" if done else f"written in {time.monotonic() - began:.0f} s"
    print(f"{dest} {state}")
    return images


def clean(cache, source=None) -> None:
    """Take decoded images out of a cache, and say which."""
    from diffusion_ext.prepare.prune import prune

    removed = prune(cache, source)
    for store, why, size in removed:
        print(f"removed {store}, {why} ({size / 1e6:.1f} MB)")
    if not removed:
        print(f"{cache} holds nothing decoded of {source or 'folders that are gone'}")


def refuse_another(dest: Path, recipe) -> None:
    """UserError where `dest` already holds a store of something else."""
    check_replaceable(dest)
    meta = read_meta(dest)
    if meta is None:
        return
    was = f"{meta['source']}, {size_text(meta['shape'])}"
    now = f"{recipe.source}, {size_text(recipe.shape)}"
    change = f"from {was}, not from {now}" if was != now else f"when {was} held other files"
    raise UserError(
        f"{dest} was prepared {change}: use --overwrite to replace it, or another folder"
    )


def summary(images: Images) -> str:
    """One line: how many images of which size, what was skipped and why, duplicates, classes."""
    parts = [f"{len(images)} images of {size_text(images.pixels.shape[1:])}"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in by_reason(images.skipped).items())
    parts.append(f"{len(images.skipped)} skipped" + (f" ({reasons})" if reasons else ""))
    copies = len(images) - len(set(images.hashes))
    parts.append(f"{copies} duplicates")
    parts.append(f"{len(images.classes)} classes" if images.classes else "no classes")
    return ", ".join(parts)


def size_text(shape) -> str:
    """(C, H, W) in words."""
    channels, height, width = shape
    return f"{height}x{width} pixels in {'colour' if channels == 3 else 'gray'}"


if __name__ == "__main__":
    run(main)
