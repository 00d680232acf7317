"""Draw images with a trained model.

    python -m diffusion_ext.sample samples --path CKPT/checkpoint_last.pt --num 1000 --steps 20

Writes 000000.png … into the folder and samples.grid.png beside it, so that the folder holds samples only.
Schedule, objective, size and classes are in the checkpoint.
Image k depends on (seed, k) alone: more of them, other batches or several processes give the same ones, and
the command continues where it was stopped.

  --trajectory           also samples.strip.png and samples.gif: how the first images come out of the noise
  --interpolate A.png,B.png   between two images: DDIM leads both back into the noise, where they are mixed
  --inpaint A.png --mask M.png   fills what is white in the mask (RePaint, Lugmayr et al. 2022)
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import List, NamedTuple, Optional

import numpy as np

from diffusion_ext.pictures import grid, to_uint8
from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import MANIFEST_NAME, atomic_json, beside, sha256_file, write_manifest

SAMPLER = "dpmpp_2m"
PLAN_NAME = ".plan.json"
STAGES = 12
FRAMES = 60


@dataclass
class SampleOptions:
    """What to draw."""

    path: str = field(metadata={"help": "checkpoint of diffusion_ext.train"})
    num: int = field(default=64, metadata={"help": "images"})
    first: int = field(default=0, metadata={"help": "number of the first image"})
    sampler: str = field(
        default=SAMPLER,
        metadata={
            "help": "name, with options as ddim:eta=0.5, see below; --interpolate is always by ddim,"
            " --inpaint by ddpm"
        },
    )
    steps: int = field(default=20, metadata={"help": "noise levels passed, at most the model's T"})
    spacing: str = field(
        default="trailing", metadata={"help": "which noise levels: trailing (even in t), logsnr"}
    )
    label: Optional[str] = field(
        default=None,
        metadata={
            "help": "class by name; none: all classes in turn where the model has any, and no class"
            " with --interpolate and --inpaint"
        },
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
        default=0.5, metadata={"help": "with --interpolate: share of T that both are led back by"}
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
        least = dict(num=1, batch_size=1, steps=1, resample=1, first=0, ema=-1)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} has more than 64 bits")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise ValueError("--interpolate takes two images, as A.png,B.png")
        if (self.inpaint is None) != (self.mask is None):
            raise ValueError("--inpaint and --mask belong together")
        if self.inpaint and self.interpolate:
            raise ValueError("--inpaint and --interpolate exclude each other")
        if not 0 < self.noise_level <= 1:
            raise ValueError("--noise-level must be in (0, 1]")
        if self.interpolate or self.inpaint:
            self._check_editing()

    def _check_editing(self):
        flag, sampler = ("--interpolate", "ddim") if self.interpolate else ("--inpaint", "ddpm")
        if self.sampler not in (SAMPLER, sampler):
            raise ValueError(f"{flag} is always by {sampler}: leave --sampler out")
        self.sampler = sampler
        if self.trajectory:
            raise ValueError(f"--trajectory shows images that come out of noise, not {flag}")
        if self.guidance != 1 and self.label is None:
            raise ValueError(f"with {flag}, --guidance needs --label")


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
    before = Path(options.path).is_file() and sha256_file(options.path)
    model = DiffusionModel.from_checkpoint(
        options.path, options.device, None if options.ema < 0 else options.ema, options.user_dir
    )
    plan = plan_of(options)
    if plan["checkpoint"] != before:
        raise UserError(f"{options.path} was replaced while it was read: run the command again")
    numbers = list(range(options.first, options.first + options.num))
    draw = drawer(model, options, numbers)
    begin(folder, plan, options.overwrite)
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
    picture = beside(folder.resolve(), "grid.png")
    save_png(picture, grid(np.stack(shown)), scale)
    if options.trajectory:
        some = numbers[:8]
        frames = stages_of(model, sampling(model, options, some), some)
        save_png(beside(folder.resolve(), "strip.png"), frames.strip, scale)
        save_gif(beside(folder.resolve(), "gif"), frames.animation, scale)
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
    others = sum(path.stem.isdigit() for path in folder.glob("*.png")) - len(numbers)
    if others:
        print(f"{others} other images of this model, drawn before, lie there too")


def plan_of(options: SampleOptions) -> dict:
    """All that the images depend on; --num, --first and --batch-size are not among it, but for the
    first two with --interpolate, whose ends they are."""
    ways = ("num", "first", "batch_size", "device", "trajectory", "path", "user_dir", "overwrite")
    plan = {k: v for k, v in asdict(options).items() if k not in ways}
    if options.interpolate:
        plan.update(num=options.num, first=options.first)
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
    note = folder / PLAN_NAME
    if note.exists() and json.loads(note.read_text()) != plan:
        drawn = [path for path in folder.glob("*.png") if path.stem.isdigit()]
        if drawn and not overwrite:
            raise UserError(
                f"{folder} holds samples of another model or other options: give another folder, or"
                " --overwrite to replace them"
            )
        # the note goes last: what is left of a half-emptied folder is still known as samples
        for path in (*drawn, note):
            path.unlink()
    elif not note.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no samples: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(note, plan)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def name_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.png"


def read_png(path: Path) -> np.ndarray:
    """uint8 (C, H, W) of a PNG that was written here."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image)
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
    if options.label is None:
        return model.classes_in_turn(numbers)
    return [model.class_index(options.label)] * len(numbers)


def drawer(model, options: SampleOptions, numbers: List[int]):
    """draw(numbers) → batches of (numbers, uint8 images); UserError at once for what cannot be drawn."""
    if options.interpolate or options.inpaint:
        model.check_classes(options.label is not None, options.guidance)
    if options.interpolate:
        from diffusion_ext.editing import interpolation

        return interpolation(model, options, numbers)
    if options.inpaint:
        from diffusion_ext.editing import inpainting

        return inpainting(model, options)

    def draw(chosen):
        return model.batches(chosen, **sampling(model, options, chosen))

    draw([])
    return draw


class Stages(NamedTuple):
    """strip: uint8 (C, H', W'), a row an image, as it is after the first step to after the last; animation:
    list of grids of all images."""

    strip: np.ndarray
    animation: list[np.ndarray]


def stages_of(model, options: dict, numbers: list[int]) -> Stages:
    """Draw these images once more, looking on; options as of `DiffusionModel.batches`."""
    frames = []

    def watch(i, x, x0):
        frames.append(to_uint8(x))

    for _ in model.batches(numbers, **{**options, "batch_size": len(numbers)}, watch=watch):
        pass
    rows = [
        frames[stage][row] for row in range(len(numbers)) for stage in spread(len(frames), STAGES)
    ]
    strip = grid(np.stack(rows), columns=min(STAGES, len(frames)))
    return Stages(strip, [grid(frames[k]) for k in spread(len(frames), FRAMES)])


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 … total − 1, evenly, with the first and the last."""
    return [round(k) for k in np.linspace(0, total - 1, min(count, total))]


if __name__ == "__main__":
    run(main)
