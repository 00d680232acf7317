"""Draw images with a trained model.

    python -m diffusion_ext.sample samples --path CKPT/checkpoint_last.pt --num 1000 --steps 20
    python -m diffusion_ext.sample samples --path CKPT/checkpoint_last.pt --guidance-sweep 1,1.5,2,3

Writes 000000.png … into the folder and beside it, so that the folder holds samples only, samples.grid.png and
samples.csv, the class of each. Schedule, objective, size and classes are in the checkpoint.
Image k depends on (seed, k) alone: more of them, other batches or several processes give the same ones, and
the command continues where it was stopped.

  --trajectory           also samples.strip.png and samples.gif: how the first images come out of the noise
  --interpolate A.png,B.png   between two images: DDIM leads both back into the noise, where they are mixed
  --image A.png --strength 0.6   other images like this one: it is noised so far, and drawn from there
  --inpaint A.png --mask M.png   draws what is white in the mask, and keeps what is black or transparent
                         (RePaint, Lugmayr et al. 2022)

In place of A.png a folder may stand, of whose images each is drawn once unless --num says more, and in place
of M.png one with a mask of the same name for each. Then samples.grid.png shows before and after, as well.
"""

import csv
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import List, Optional

from diffusion_ext.sample.guidance import (
    GuidanceOptions,
    draw_sweep,
    guidance_of,
    guidance_plan,
    settled,
    without_guidance,
)
from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run
from ext_common.folders import make_durable
from ext_common.manifest import (
    MANIFEST_NAME,
    atomic_json,
    atomic_write,
    beside,
    sha256_file,
    write_manifest,
)

PLAN_NAME = ".plan.json"
NUM = 64
PNG_END = b"IEND\xaeB`\x82"


@dataclass
class SampleOptions(GuidanceOptions):
    """What to draw."""

    path: str = field(metadata={"help": "checkpoint of diffusion_ext.train"})
    num: Optional[int] = field(
        default=None,
        metadata={
            "help": "images; none: 64, and of a folder for --image or --inpaint one for each of its files"
        },
    )
    first: int = field(default=0, metadata={"help": "number of the first image"})
    sampler: Optional[str] = field(
        default=None,
        metadata={
            "help": "name, with options as ddim:eta=0.5, see below; none: dpmpp_2m, and consistency for a"
            " distilled model; --interpolate is always by ddim, --inpaint by ddpm"
        },
    )
    steps: Optional[int] = field(
        default=None,
        metadata={
            "help": "noise levels passed, at most the model's T; none: 20, and 2 of a distilled model"
        },
    )
    spacing: str = field(
        default="trailing", metadata={"help": "which noise levels: trailing (even in t), logsnr"}
    )
    label: Optional[str] = field(
        default=None,
        metadata={
            "help": "class by name or number, counted from 0; none: all classes in turn where the model"
            " has any, and no class with --interpolate, --image and --inpaint"
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
    class_folders: bool = field(
        default=False, metadata={"help": "a sub-folder of OUTPUT for the images of each class"}
    )
    trajectory: bool = field(default=False, metadata={"help": "also a strip and a GIF of the way"})
    interpolate: Optional[List[str]] = field(
        default=None, metadata={"help": "A.png,B.png: --num images from A to B"}
    )
    noise_level: float = field(
        default=0.5, metadata={"help": "with --interpolate: share of T that both are led back by"}
    )
    image: Optional[str] = field(
        default=None, metadata={"help": "image to draw others like it, or a folder of them"}
    )
    strength: float = field(
        default=0.6, metadata={"help": "with --image: share of T that it is noised by"}
    )
    inpaint: Optional[str] = field(
        default=None, metadata={"help": "image to fill, or a folder of them; needs --mask"}
    )
    mask: Optional[str] = field(
        default=None,
        metadata={
            "help": "image of the same shape, white where --inpaint draws, black or transparent where it"
            " does not; or a folder with one for each image"
        },
    )
    resample: int = field(
        default=5, metadata={"help": "with --inpaint: how often each level is gone through"}
    )
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of the plugin that has further parts"}
    )

    def __post_init__(self):
        GuidanceOptions.__post_init__(self)
        least = dict(num=1, batch_size=1, steps=1, resample=1, first=0, ema=-1)
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} has more than 64 bits")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise ValueError("--interpolate takes two images, as A.png,B.png")
        if (self.inpaint is None) != (self.mask is None):
            raise ValueError("--inpaint and --mask belong together")
        edits = self.edits
        if len(edits) > 1:
            raise ValueError(f"{edits[1]} and {edits[0]} exclude each other")
        for flag, share in (("noise-level", self.noise_level), ("strength", self.strength)):
            if not 0 < share <= 1:
                raise ValueError(f"--{flag} must be in (0, 1]")
        if edits:
            self._check_editing(edits[0])

    @property
    def edits(self) -> list[str]:
        """The flags that make images from images."""
        given = {
            "--interpolate": self.interpolate,
            "--image": self.image,
            "--inpaint": self.inpaint,
        }
        return [flag for flag, value in given.items() if value is not None]

    def _check_editing(self, flag):
        sampler = {"--interpolate": "ddim", "--inpaint": "ddpm"}.get(flag, self.sampler)
        if self.sampler not in (None, "dpmpp_2m", sampler):
            raise ValueError(f"{flag} is always by {sampler}: leave --sampler out")
        self.sampler = sampler
        if self.guide or self.guidance_sweep or self.guidance_interval:
            raise ValueError(
                f"--guide, --guidance-interval and --guidance-sweep draw out of noise, not {flag}"
            )
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
    from diffusion_ext.pictures import save_png
    from diffusion_ext.sample.album import draw_pictures

    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write the images into")
    before = Path(options.path).is_file() and sha256_file(options.path)
    model = DiffusionModel.from_checkpoint(
        options.path, options.device, None if options.ema < 0 else options.ema, options.user_dir
    )
    options = settled(model, replace(options, num=number_of(options)))
    plan = plan_of(options)
    if plan["checkpoint"] != before:
        raise UserError(f"{options.path} was replaced while it was read: run the command again")
    numbers = list(range(options.first, options.first + options.num))
    draw = drawer(model, options, numbers)
    labels = labels_of(model, options, numbers)
    classes = [None] * len(numbers) if labels is None else [model.classes[k] for k in labels]
    paths = {
        k: name_of(folder, k, name if options.class_folders else None)
        for k, name in zip(numbers, classes, strict=True)
    }
    begin(folder, plan, options.overwrite)
    missing = [k for k in numbers if not is_whole(paths[k])]
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} images are there already")
    with progress(len(missing), desc="sample", unit="images") as bar:
        for chosen, images in draw(missing):
            for k, image in zip(chosen, images, strict=True):
                save_png(paths[k], image, durable=False)
            bar.update(len(chosen))
    make_durable(folder)
    shown = draw_pictures(model, options, folder, paths, labels, sampling)
    if options.guidance_sweep:
        shown += f", {draw_sweep(model, options, folder, numbers, sampling)} the strengths"
    write_table(beside(folder.resolve(), "csv"), folder, paths, classes, options)
    write_manifest(
        folder,
        inputs={options.path: plan["checkpoint"]},
        counts={"images": len(numbers)},
        options=options,
        seed=options.seed,
        plan=plan,
    )
    _, height, width = model.shape
    print(f"{folder}: {len(numbers)} images of {height} × {width}, {shown}")
    others = len(samples_in(folder)) - len(numbers)
    if others:
        print(f"{others} other images of this model, drawn before, lie there too")


def plan_of(options: SampleOptions) -> dict:
    """All that the images depend on; --num, --first and --batch-size are not among it, but for the
    first two with --interpolate, whose ends they are."""
    ways = ("num", "first", "batch_size", "device", "trajectory", "path", "user_dir", "overwrite")
    plan = {k: v for k, v in asdict(options).items() if k not in ways}
    plan = {**without_guidance(plan), **guidance_plan(options)}
    if options.interpolate:
        plan.update(num=options.num, first=options.first)
    for key in ("image", "inpaint", "mask"):
        if plan[key]:
            plan[key] = hash_of(plan[key])
    if not options.image:
        del plan["image"], plan["strength"]
    if not options.class_folders:
        del plan["class_folders"]
    if options.interpolate:
        plan["interpolate"] = [hash_of(path) for path in options.interpolate]
    return {"checkpoint": sha256_file(options.path), **plan}


def number_of(options: SampleOptions) -> int:
    """How many images: those asked for, or one for each file of a folder that they are made from."""
    from diffusion_ext.sample.editing import files_of

    if options.num is not None:
        return options.num
    source = options.image or options.inpaint
    return len(files_of(source)) if source and Path(source).is_dir() else NUM


def hash_of(path: str) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's images."""
    from diffusion_ext.sample.editing import files_of

    if Path(path).is_dir():
        known = [[Path(name).name, sha256_file(name)] for name in files_of(path)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give the file of an image")
    return sha256_file(path)


def begin(folder: Path, plan: dict, overwrite: bool) -> None:
    """Note what is drawn into a new folder; UserError where one holds images of something else."""
    note = folder / PLAN_NAME
    if note.exists() and json.loads(note.read_text()) != plan:
        drawn = samples_in(folder)
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


def name_of(folder: Path, number: int, name: Optional[str] = None) -> Path:
    """Where an image lies; name: its class, where each has a folder."""
    return (folder / name if name else folder) / f"{number:06}.png"


def samples_in(folder: Path) -> list[Path]:
    """The images that were drawn into a folder, also in the folders of classes."""
    paths = [*folder.glob("*.png"), *folder.glob("*/*.png")]
    return [path for path in paths if path.stem.isdigit()]


def is_whole(path: Path) -> bool:
    """Whether a PNG is there to its end; a power cut may leave an empty file with its name."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:
        return False


def write_table(path: Path, folder: Path, paths: dict, classes: list, options) -> None:
    """samples.csv: of each image its file, class (empty for none) and seed."""
    with atomic_write(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "class", "seed"])
        for (_, image), name in zip(paths.items(), classes, strict=True):
            rows.writerow([image.relative_to(folder).as_posix(), name or "", options.seed])


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
        **guidance_of(options),
    )


def labels_of(model, options: SampleOptions, numbers: List[int]) -> Optional[List[int]]:
    """Class index of each number: the one asked for, else all in turn; None for a model without."""
    if options.label is None:
        return None if options.edits else model.classes_in_turn(numbers)
    return [model.class_index(options.label)] * len(numbers)


def drawer(model, options: SampleOptions, numbers: List[int]):
    """draw(numbers) → batches of (numbers, uint8 images); UserError at once for what cannot be drawn."""
    if options.edits:
        model.check_classes(options.label is not None, options.guidance)
    if options.interpolate:
        from diffusion_ext.sample.editing import interpolation

        return interpolation(model, options, numbers)
    if options.inpaint:
        from diffusion_ext.sample.editing import inpainting

        return inpainting(model, options, numbers)
    if options.image:
        from diffusion_ext.sample.editing import variation

        return variation(model, options, numbers)

    def draw(chosen):
        return model.batches(chosen, **sampling(model, options, chosen))

    draw([])
    return draw


if __name__ == "__main__":
    run(main)
