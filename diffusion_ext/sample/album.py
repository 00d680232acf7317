"""The pictures beside a folder of samples, each with names on it: classes, timesteps, before and after."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import (
    by_class,
    display_scale,
    grid,
    save_gif,
    save_picture,
    sheet,
    to_uint8,
)
from diffusion_ext.sample.editing import files_of, masks_of, read, read_mask, source_of
from diffusion_ext.samplers import trajectory
from ext_common.manifest import beside

# At most so many images in samples.grid.png, a class, rows of before and after, and images in the strip.
SHOWN, EACH, ROWS, SOME = 100, 10, 24, 8
STAGES = 12
FRAMES = 60

Row = list[np.ndarray | None]


def draw_pictures(
    model: DiffusionModel,
    options: Any,
    folder: Path,
    paths: Mapping[int, Path],
    labels: Sequence[int] | None,
    sampling: Callable[..., dict[str, Any]],
) -> str:
    """Draw them and say where, in a clause.

    paths: of each image by its number; labels: its class, None without; sampling(model, options, numbers):
    options of `DiffusionModel.batches`.
    """
    scale = display_scale(model.shape[1])
    numbers = list(paths)
    picture = beside(folder.resolve(), "grid.png")
    steps = "1 step" if options.steps == 1 else f"{options.steps} steps"
    title = (
        f"seed {options.seed}, images {numbers[0]} to {numbers[-1]}, {steps} of {options.sampler}"
    )
    if options.edits:
        image, shown = edited(model, options, paths, title, scale)
    else:
        image, shown = overview(model, paths, labels, title, scale)
    save_picture(picture, image)
    if options.trajectory:
        some = numbers[:SOME]
        names = [str(k) for k in some]
        if labels is not None:
            names = [f"{model.classes[labels[i]]}, {k}" for i, k in enumerate(some)]
        frames = stages_of(model, sampling(model, options, some), some)
        strip = sheet(frames.rows, names, frames.timesteps, f"seed {options.seed}", scale)
        save_picture(beside(folder.resolve(), "strip.png"), strip)
        save_gif(beside(folder.resolve(), "gif"), frames.animation, scale)
    return f"{picture} shows {shown}"


def overview(
    model: DiffusionModel,
    paths: Mapping[int, Path],
    labels: Sequence[int] | None,
    title: str,
    scale: int,
) -> tuple[Image.Image, int]:
    """(sheet, images on it): a class a row, or about a square where there are none."""
    if labels is None:
        images = [read_png(path) for path in list(paths.values())[:SHOWN]]
        columns = int(np.ceil(np.sqrt(len(images))))
        rows: list[Row] = [
            [*images[start : start + columns]] for start in range(0, len(images), columns)
        ]
        return sheet(rows, title=title, scale=scale), len(images)
    chosen = shown_of_each(labels)
    images = [read_png(list(paths.values())[i]) for i in chosen]
    classes, rows = by_class(images, [labels[i] for i in chosen], EACH)
    return sheet(rows, [model.classes[k] for k in classes], title=title, scale=scale), len(images)


def shown_of_each(labels: Sequence[int]) -> list[int]:
    """Positions of the first images of each class, as many of each, at most SHOWN and EACH."""
    most = max(1, min(EACH, SHOWN // len(set(labels))))
    seen: dict[int, int] = {}
    chosen = []
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= most and (len(seen) <= SHOWN or label in list(seen)[:SHOWN]):
            chosen.append(i)
    return chosen


def edited(
    model: DiffusionModel, options: Any, paths: Mapping[int, Path], title: str, scale: int
) -> tuple[Image.Image, int]:
    """(sheet, results on it): before and after side by side; from A to B in one row."""

    def as_read(path: str) -> np.ndarray:
        return np.asarray(to_uint8(read(path, model.shape, "cpu")[None])[0])

    numbers = list(paths)
    if options.interpolate:
        a, b = (as_read(path) for path in options.interpolate)
        between = [paths[k] for k in (numbers[i] for i in spread(len(numbers), STAGES))]
        row: Row = [a, *map(read_png, between), b]
        return sheet([row], above=["A", *[""] * len(between), "B"], title=title, scale=scale), len(
            between
        )
    files = files_of(options.image or options.inpaint)
    results: dict[int, Row] = {}
    for k in numbers:
        row = results.setdefault(source_of(k, numbers, len(files)), [])
        if len(row) < EACH:
            row.append(read_png(paths[k]))
    chosen = list(results)[:ROWS]
    rows = [[as_read(files[i]), *results[i]] for i in chosen]
    above = ["before", "after"]
    if options.inpaint:
        masks = masks_of(options)
        for i, row in zip(chosen, rows, strict=True):
            where = read_mask(masks[i], files[i], model).cpu().numpy()
            row.insert(1, np.repeat(np.uint8(255) * where, model.shape[0], 0))
        above.insert(1, "mask")
    names = [Path(files[i]).stem for i in chosen] if len(files) > 1 else []
    return sheet(rows, names, above, title, scale), sum(len(results[i]) for i in chosen)


class Stages(NamedTuple):
    """rows: of each image as it is after the first step to after the last; timesteps: names of the columns;
    animation: list of grids of all images."""

    rows: list[Row]
    timesteps: list[str]
    animation: list[np.ndarray]


def stages_of(model: DiffusionModel, options: Mapping[str, Any], numbers: list[int]) -> Stages:
    """Draw these images once more, looking on; options as of `DiffusionModel.batches`."""
    frames = []

    def watch(i: int, x: Any, x0: Any) -> None:
        frames.append(to_uint8(x))

    for _ in model.batches(numbers, **{**options, "batch_size": len(numbers)}, watch=watch):
        pass
    levels = trajectory(model.schedule, options["steps"], options["spacing"]).levels[1:]
    # a sampler of someone's own may call more or less often
    names = [f"t {level.timestep}" if level.timestep >= 0 else "image" for level in levels]
    stages = spread(len(frames), STAGES)
    rows: list[Row] = [[frames[stage][row] for stage in stages] for row in range(len(numbers))]
    timesteps = [names[stage] for stage in stages] if len(names) == len(frames) else []
    return Stages(rows, timesteps, [grid(frames[k]) for k in spread(len(frames), FRAMES)])


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 … total − 1, evenly, with the first and the last."""
    return [round(k) for k in np.linspace(0, total - 1, min(count, total))]


def read_png(path: Path) -> np.ndarray:
    """uint8 (C, H, W) of a PNG that was written here."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
