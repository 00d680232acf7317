"""Draw images with a trained model.

    python -m diffusion_ext.sample samples --path CKPT/checkpoint_last.pt --num 1000 --steps 20

Writes 000000.png … into the folder and samples.grid.png beside it, so that the folder holds samples only.
Schedule, objective, size and classes are in the checkpoint.
Image k depends on (seed, k) alone: more of them, other batches or several processes give the same ones, and
the command continues where it was stopped.

  --trajectory           also samples.strip.png and samples.gif: how the first images come out of the noise
  --interpolate A.png,B.png   between two images: both are noised and mixed (Ho et al. 2020, figure 8)
  --inpaint A.png --mask M.png   fills what is white in the mask (RePaint, Lugmayr et al. 2022)
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import List, Optional

import numpy as np

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import MANIFEST_NAME, atomic_json, sha256_file, write_manifest


@dataclass
class SampleOptions:
    """What to draw."""

    path: str = field(metadata={"help": "checkpoint of diffusion_ext.train"})
    num: int = field(default=64, metadata={"help": "images"})
    first: int = field(default=0, metadata={"help": "number of the first image"})
    sampler: str = field(
        default="dpmpp_2m", metadata={"help": "name, with options as ddim:eta=0.5; see below"}
    )
    steps: int = field(default=20, metadata={"help": "noise levels passed, at most the model's T"})
    spacing: str = field(
        default="trailing", metadata={"help": "which noise levels: trailing (even in t), logsnr"}
    )
    label: Optional[str] = field(
        default=None,
        metadata={"help": "class by name; none: all classes in turn where the model has any"},
    )
    guidance: float = field(
        default=1.0, metadata={"help": "weight of the class: 1 as trained, more is more typical"}
    )
    clip: bool = field(default=True, metadata={"help": "hold every guess at the image in [0, 255]"})
    ema: int = field(
        default=0,
        metadata={"help": "which average of the weights, counted from 0; -1: none of them"},
    )
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    precision: str = field(
        default="fp32", metadata={"help": "of the network", "choices": ["fp32", "bf16"]}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1; auto: cuda if there"})
    seed: int = field(default=1, metadata={"help": "of the noise"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace samples of another model or other options"}
    )
    trajectory: bool = field(default=False, metadata={"help": "also a strip and a GIF of the way"})
    interpolate: Optional[List[str]] = field(
        default=None, metadata={"help": "A.png,B.png: --num images from A to B"}
    )
    noise_level: float = field(
        default=0.5, metadata={"help": "with --interpolate: share of T that both are noised by"}
    )
    inpaint: Optional[str] = field(default=None, metadata={"help": "image to fill; needs --mask"})
    mask: Optional[str] = field(
        default=None, metadata={"help": "image of the same shape, white where --inpaint draws"}
    )
    resample: int = field(
        default=5, metadata={"help": "with --inpaint: how often each level is gone through"}
    )
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of the plugin that has further parts"}
    )

    def __post_init__(self):
        for name, least in (
            ("num", 1),
            ("batch_size", 1),
            ("steps", 1),
            ("resample", 1),
            ("first", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise ValueError("--interpolate takes two images, as A.png,B.png")
        if (self.inpaint is None) != (self.mask is None):
            raise ValueError("--inpaint and --mask belong together")
        if self.inpaint and self.interpolate:
            raise ValueError("--inpaint and --interpolate exclude each other")
        if not 0 < self.noise_level <= 1:
            raise ValueError("--noise-level must be in (0, 1]")


def main(argv: List[str]) -> None:
    """The command."""
    from diffusion_ext.samplers import SAMPLERS, SPACINGS

    parser = Parser(
        prog="python -m diffusion_ext.sample",
        description=__doc__,
        epilog=f"samplers:\n{SAMPLERS.describe()}\nspacings:\n{SPACINGS.describe()}",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    add_dataclass(parser, SampleOptions)
    args = parser.parse_args(argv)
    sample(args.output, from_args(SampleOptions, args))


def sample(output: str, options: SampleOptions) -> None:
    """Write the folder; raises UserError."""
    from diffusion_ext.inference import DiffusionModel
    from diffusion_ext.pictures import display_scale, grid, save_gif, save_png

    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write the images into")
    if not Path(options.path).is_file():
        raise UserError(
            f"--path {options.path} does not exist: give a checkpoint of diffusion_ext.train"
        )
    model = DiffusionModel.from_checkpoint(
        options.path, options.device, None if options.ema < 0 else options.ema, options.user_dir
    )
    plan = plan_of(options)
    begin(folder, plan, options.overwrite)
    numbers = list(range(options.first, options.first + options.num))
    draw = drawer(model, options, numbers)
    missing = [k for k in numbers if not name_of(folder, k).exists()]
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} images are there already")
    with progress(len(missing), desc="sample", unit="images") as bar:
        for chosen, images in draw(missing):
            for k, image in zip(chosen, images, strict=True):
                save_png(name_of(folder, k), image)
            bar.update(len(chosen))
    shown = [read_png(name_of(folder, k)) for k in numbers[:100]]
    scale = display_scale(model.shape[1])
    picture = beside(folder, "grid.png")
    save_png(picture, grid(np.stack(shown)), scale)
    if options.trajectory:
        from diffusion_ext.trajectories import stages_of

        some = numbers[:8]
        frames = stages_of(model, sampling(model, options, some), some)
        save_png(beside(folder, "strip.png"), frames.strip, scale)
        save_gif(beside(folder, "gif"), frames.animation, scale)
    write_manifest(
        folder,
        inputs={options.path: plan["checkpoint"]},
        counts={"images": len(numbers)},
        options=options,
        seed=options.seed,
        plan=plan,
    )
    _, height, width = model.shape
    print(f"{folder}: {len(numbers)} images of {height} × {width}, {picture} shows {len(shown)}")


def plan_of(options: SampleOptions) -> dict:
    """All that the images depend on; --num, --first and --batch-size are not among it."""
    ways = ("num", "first", "batch_size", "device", "trajectory", "path", "user_dir", "overwrite")
    plan = {k: v for k, v in asdict(options).items() if k not in ways}
    if options.interpolate:
        plan["num"] = options.num
    for key in ("inpaint", "mask"):
        if plan[key]:
            plan[key] = hash_of(plan[key])
    if options.interpolate:
        plan["interpolate"] = [hash_of(path) for path in options.interpolate]
    return {"checkpoint": sha256_file(options.path), **plan}


def hash_of(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give the file of an image")
    return sha256_file(path)


def begin(folder: Path, plan: dict, overwrite: bool) -> None:
    """Note what is drawn into a new folder; UserError where one holds images of something else."""
    note = folder / ".plan.json"
    if overwrite and note.exists() and json.loads(note.read_text()) != plan:
        # the note goes last: what is left of a half-emptied folder is still known as samples
        for path in (*folder.glob("[0-9]*.png"), note):
            path.unlink()
    if note.exists():
        if json.loads(note.read_text()) != plan:
            raise UserError(
                f"{folder} holds samples of another model or other options: give another one or --overwrite"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no samples: give a new folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_json(note, plan)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def name_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.png"


def beside(folder: Path, ending: str) -> Path:
    """A picture of all samples, outside of the folder."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.{ending}")


def read_png(path: Path) -> np.ndarray:
    """uint8 (C, H, W) of a PNG that was written here."""
    from PIL import Image

    pixels = np.asarray(Image.open(path))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def sampling(model, options: SampleOptions, numbers: List[int]) -> dict:
    """Options of `DiffusionModel.batches`."""
    return dict(
        sampler=options.sampler,
        steps=options.steps,
        spacing=options.spacing,
        seed=options.seed,
        batch_size=options.batch_size,
        labels=labels_of(model, options, numbers),
        guidance=options.guidance,
        clip=options.clip,
        bf16=options.precision == "bf16",
    )


def labels_of(model, options: SampleOptions, numbers: List[int]) -> Optional[List[int]]:
    """Class index of each number: the one asked for, else all in turn; None for a model without."""
    if options.label is None and not model.classes:
        if options.guidance != 1:
            raise UsageError("--guidance needs a model trained with --class-labels")
        return None
    if options.label is None:
        return [k % len(model.classes) for k in numbers]
    if options.label not in model.classes:
        known = ", ".join(model.classes) or "none, it was trained without --class-labels"
        raise UserError(f"--label {options.label} is no class of the model; known: {known}")
    return [model.classes.index(options.label)] * len(numbers)


def drawer(model, options: SampleOptions, numbers: List[int]):
    """draw(numbers) → batches of (numbers, uint8 images)."""
    if options.interpolate:
        from diffusion_ext.editing import interpolation

        return interpolation(model, options, numbers)
    if options.inpaint:
        from diffusion_ext.editing import inpainting

        return inpainting(model, options)
    return lambda chosen: model.batches(chosen, **sampling(model, options, chosen))


if __name__ == "__main__":
    run(main)
