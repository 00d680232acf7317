"""What benchmarks/diffusion.py compares, how much of it, and the images it does it on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.diffusion.sides import OURS, SIZE, THEIRS, Readers, sampling_side, training_side

LARGE = 64  # pixels of the images that are only read


@dataclass
class Size:
    """How much is done; the quick one only shows that everything runs."""

    batch: int = 32
    steps: int = 10  # their average of weights is brought up to date every 10th update
    sampling_steps: int = 20
    images: int = 10_000
    running: int = 300  # batches read after the first
    updates: int = 200
    curve_batch: int = 32
    seeds: int = 3

    @classmethod
    def quick(cls) -> "Size":
        return cls(
            batch=16,  # what their Trainer asks for at least
            steps=1,
            sampling_steps=2,
            images=150,
            running=2,
            updates=6,
            curve_batch=4,
            seeds=1,
        )


@dataclass
class Comparison:
    """One ratio: `ours` over `theirs`, two sides of a case, which may both be ours."""

    what: str
    ours: str
    theirs: str
    goal: float | None = None


@dataclass
class Case:
    """Sides that do the same work, and which of them are compared.

    seconds: a side does one thing, and its time is shown instead of a rate.
    """

    name: str
    unit: str
    sides: list[str]
    comparisons: list[Comparison]
    build: Callable[[list[str]], tuple[dict, Callable]]  # → sides, what runs before each
    seconds: bool = False
    warmup: int = 1


def default_side() -> str:
    """What `diffusion_ext.train` does here without being told: --autocast auto."""
    import torch

    from benchmarks.diffusion.sides import quiet_fairseq

    quiet_fairseq()
    from diffusion_ext.criterion import computes_bf16

    return "ours, bfloat16" if computes_bf16(torch.device("cpu")) else "ours, float32"


def cases(folder: Path, size: Size, default: str) -> list[Case]:
    """In the order of the tables."""

    def of(side, *arguments):
        return lambda names: (
            {name: side(name, folder, size.batch, *arguments) for name in names},
            lambda name: None,
        )

    def reading(running):
        def build(names):
            readers = Readers(names, folder, LARGE, size.batch, running)
            return {n: lambda n=n: readers.run(n) for n in names}, readers.before

        return build

    bf16, fp32 = "ours, bfloat16", "ours, float32"
    their_bf16, their_fp32 = "theirs, bfloat16", "theirs, float32"
    training = [
        Comparison("our default / their default", default, their_fp32, 2),
        Comparison("both in float32", fp32, their_fp32, 1.4),
        Comparison("both in bfloat16", bf16, their_bf16, 1.4),
        Comparison("ours, bfloat16 / float32", bf16, fp32),
    ]
    ddim, solver = "ours, ddim", "ours, dpmpp_2m"
    sampling = [
        Comparison("DDIM in float32, both", ddim, "theirs, ddim", 1.8),
        Comparison("our default / their DDIM", solver, "theirs, ddim"),
        Comparison(
            "ours with --precision bf16 / their DDIM", f"{solver}, bfloat16", "theirs, ddim"
        ),
    ]
    return [
        Case(
            f"training, {SIZE} × {SIZE}, batch {size.batch}",
            "images/s",
            [*OURS, *THEIRS],
            training,
            of(training_side, size.steps),
        ),
        Case(
            f"sampling, {size.sampling_steps} steps, batch {size.batch}",
            "images/s",
            [ddim, solver, f"{solver}, bfloat16", "theirs, ddim"],
            sampling,
            of(sampling_side, size.sampling_steps),
        ),
        Case(
            f"time to the first batch of {size.images:,} PNG files of {LARGE} × {LARGE}",
            "s",
            ["ours, cold", "ours, warm", "theirs"],
            [
                Comparison("first start", "ours, cold", "theirs"),
                Comparison("every later start", "ours, warm", "theirs"),
            ],
            reading(0),
            seconds=True,
            warmup=0,
        ),
        Case(
            "reading the same once it runs",
            "images/s",
            ["ours, warm", "theirs"],
            [Comparison("images read", "ours, warm", "theirs")],
            reading(size.running),
        ),
    ]


def write_data(folder: Path, size: Size) -> None:
    """folder/small and folder/large: made-up colour images; folder/digits: those of scikit-learn."""
    # 100 are what their Trainer asks for
    write_images(folder / "small", 120, SIZE)
    write_images(folder / "large", size.images, LARGE)
    write_digits(folder / "digits")


def write_images(folder: Path, number: int, pixels: int, seed: int = 1) -> None:
    """PNG files as large as those of photographs: smooth shapes and a little noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC), np.float64)
        noisy = smooth + rng.normal(0, 3, smooth.shape)
        image = Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index:06d}.png")


def write_digits(folder: Path, pixels: int = 16) -> None:
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True)
    for index, digit in enumerate(load_digits().images):
        image = Image.fromarray((digit * 255 / 16).round().astype(np.uint8))
        image = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
        image.save(folder / f"{index:04d}.png")
