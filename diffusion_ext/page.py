"""The diffusion tab of `python -m ext_common.page`: draw, fill what is painted over, go between images."""

import queue
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Optional

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from diffusion_ext.evaluate.neighbours import nearest_neighbours
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import display_scale, grid, pil_image, save_png, to_uint8
from diffusion_ext.prepare.options import ImageOptions
from diffusion_ext.sample import SampleOptions, drawer, sampling
from diffusion_ext.sample.guidance import settled
from diffusion_ext.samplers import SAMPLERS
from diffusion_ext.store import open_images
from ext_common.cli import UserError
from ext_common.page import Loaded, Model, Settings, answered, choice, figure, tab_for

SEEN = 96  # pixels that a drawn image is shown at, at least
PAINTED = 400  # pixels of an image that is painted over
PART = 4  # images that are filled, or go between two, until the next are seen
DRAWN = "Drawn, not real"
ALL = "each in turn"


@tab_for("diffusion")
def tab(models: list[Model], settings: Settings) -> None:
    """Draws it."""
    load = Loaded(
        partial(DiffusionModel.from_checkpoint, device=settings.device, user_dir=settings.user_dir)
    )

    @answered
    def draw(path: str, *chosen: Any) -> Iterator[tuple[str, str]]:
        model = load(path)
        options = options_of(path, *chosen)
        last = np.empty(0)
        for last in watched(model, options):
            yield shown(last, model, DRAWN), ""
        yield shown(last, model, DRAWN), nearest(last, model, settings.data)

    @answered
    def fill(path: str, painted: Any, label: str, steps: int, num: int, seed: int) -> Iterator[str]:
        model = load(path)
        image, mask = taken_apart(painted, model.shape)
        with tempfile.TemporaryDirectory() as folder:
            names: dict[str, Any] = {
                name: str(Path(folder, f"{name}.png")) for name in ("inpaint", "mask")
            }
            save_png(names["inpaint"], image)
            save_png(names["mask"], mask)
            options = options_of(path, label, 1, steps, num, seed, batch_size=PART, **names)
            yield from growing(model, settled(model, options), "Filled, each in its way")

    @answered
    def between(path: str, one: Optional[str], other: Optional[str], *chosen: Any) -> Iterator[str]:
        if one is None or other is None:
            raise UserError("two images are needed: give both")
        label, steps, num, seed = chosen
        model = load(path)
        ends = [one, other]
        options = options_of(path, label, 1, steps, num, seed, batch_size=PART, interpolate=ends)
        yield from growing(model, settled(model, options), "From the one to the other")

    @answered
    def take_drawn(path: str, *chosen: Any) -> Any:
        model = load(path)
        label, guidance, steps, seed, sampler = chosen
        options = options_of(path, label, guidance, steps, 1, seed, sampler)
        return large(pil_image(model.sample(1, **sampling(model, options, [0]))[0]))

    @answered
    def enlarge(painted: Any) -> Any:
        return large(painted["background"]) if painted and painted["background"] else painted

    def fitting(path: str) -> list[Any]:
        """Class, guidance, steps and sampler of a model that is chosen."""
        chosen = load(path)
        classes, (name, usual) = chosen.classes, chosen.usual_sampler
        return [
            gr.update(choices=[ALL, *classes], value=ALL, visible=bool(classes)),
            gr.update(value=1, visible=bool(classes)),
            gr.update(value=min(usual, chosen.schedule.timesteps)),
            gr.update(value=name),
        ]

    first = load(str(models[0].path))
    name, usual = first.usual_sampler
    busy: dict[str, Any] = dict(concurrency_id="diffusion", concurrency_limit=1)
    with gr.Tab("Pictures"):
        model = choice(models)
        with gr.Row():
            label = gr.Dropdown(
                [ALL, *first.classes], value=ALL, label="Class", visible=bool(first.classes)
            )
            guidance = gr.Slider(1, 5, 1, step=0.1, label="Guidance", visible=bool(first.classes))
            steps = gr.Slider(1, 100, min(usual, first.schedule.timesteps), step=1, label="Steps")
            num = gr.Slider(1, 64, 16, step=1, label="Images")
            seed = gr.Number(1, precision=0, label="Seed")
            sampler = gr.Dropdown(SAMPLERS.names(), value=name, label="Sampler")
        model.change(answered(fitting), model, [label, guidance, steps, sampler])
        with gr.Row():
            start, stop = gr.Button("Draw", variant="primary"), gr.Button("Cancel")
        with gr.Row():
            drawn, near = gr.HTML(elem_id="drawn"), gr.HTML(visible=settings.data is not None)
        inputs = [model, label, guidance, steps, num, seed, sampler]
        running = start.click(draw, inputs, [drawn, near], api_name="draw", **busy)
        stop.click(None, cancels=[running])
        with gr.Accordion("Paint over what is to be drawn anew", open=False):
            painted = gr.ImageEditor(
                label="An image, and white over what is to change",
                type="pil",
                format="png",
                image_mode="RGBA",
                transforms=[],
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                sources=["upload", "clipboard"],
            )
            painted.upload(enlarge, painted, painted, api_visibility="private")
            gr.Button("Take the first that was drawn").click(
                take_drawn, [model, label, guidance, steps, seed, sampler], painted, **busy
            )
            filled = gr.HTML(elem_id="filled")
            inputs = [model, painted, label, steps, num, seed]
            with gr.Row():
                begin, end = gr.Button("Fill"), gr.Button("Cancel")
            end.click(None, cancels=[begin.click(fill, inputs, filled, api_name="fill", **busy)])
        with gr.Accordion("From one image to another", open=False):
            with gr.Row():
                one, other = (
                    gr.Image(type="filepath", label=name, buttons=[]) for name in ("From", "To")
                )
            way = gr.HTML(elem_id="way")
            inputs = [model, one, other, label, steps, num, seed]
            with gr.Row():
                begin, end = gr.Button("Go"), gr.Button("Cancel")
            end.click(None, cancels=[begin.click(between, inputs, way, **busy)])


def options_of(
    path: str,
    label: Optional[str],
    guidance: float,
    steps: int,
    num: int,
    seed: int,
    sampler: Optional[str] = None,
    **more: Any,
) -> SampleOptions:
    """Options of the command; its words about what does not fit are the page's."""
    label = None if label == ALL else label
    try:
        return SampleOptions(
            path=path,
            guidance=guidance,
            steps=int(steps),
            num=int(num),
            seed=int(seed),
            label=label,
            sampler=sampler,
            **more,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def watched(model: DiffusionModel, options: SampleOptions) -> Iterator[np.ndarray]:
    """uint8 (B, C, H, W) after each step; who no longer looks stops the drawing."""
    stages: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def watch(_step: int, _x: Tensor, x0: Tensor) -> None:
        if left.is_set():
            raise InterruptedError
        stages.put(to_uint8(x0))

    def work() -> None:
        try:
            numbers = list(range(options.num))
            for _, images in model.batches(
                numbers, **sampling(model, options, numbers), watch=watch
            ):
                stages.put(images)
            stages.put(None)
        except BaseException as error:
            stages.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (stage := stages.get()) is not None:
            if isinstance(stage, BaseException):
                raise stage
            yield stage
    finally:
        left.set()


def growing(model: DiffusionModel, options: SampleOptions, caption: str) -> Iterator[str]:
    """What a `drawer` draws, as one picture that grows; who no longer looks stops it between two batches."""
    numbers, images = list(range(options.num)), []
    for _, batch in drawer(model, options, numbers)(numbers):
        images += [*batch]
        yield shown(np.stack(images), model, caption)


def shown(images: np.ndarray, model: DiffusionModel, caption: str) -> str:
    """A grid of uint8 (N, C, H, W)."""
    return figure(pil_image(grid(images), display_scale(model.shape[1], SEEN)), caption)


def large(image: Any) -> Any:
    """A Pillow image, its pixels drawn as squares so large that they can be painted over."""
    scale = max(1, round(PAINTED / max(image.size)))
    return image.resize([side * scale for side in image.size], Image.Resampling.NEAREST)


def taken_apart(
    painted: Optional[dict[str, Any]], shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask) uint8 (C, H, W) and (1, H, W), 255 where something was painted, of the model's size.

    A pixel of the model's is drawn anew where anything in it was painted over, and kept otherwise.
    """
    if not painted or painted["background"] is None:
        raise UserError("there is no image yet: give one and paint over what is to change")
    channels, height, width = shape
    size = painted["background"].size
    over = np.zeros((size[1], size[0]), dtype=bool)
    for layer in painted["layers"]:
        over |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
    if not over.any():
        raise UserError("nothing is painted over: paint what is to be drawn anew")
    rows, columns = np.nonzero(over)
    mask = np.zeros((1, height, width), dtype=np.uint8)
    mask[0, rows * height // size[1], columns * width // size[0]] = 255
    mode = "L" if channels == 1 else "RGB"
    image = painted["background"].convert("RGBA")
    ground = Image.new("RGBA", size, "white")
    ground.alpha_composite(image)
    small = ground.convert(mode)
    if small.size != (width, height):
        small = small.resize((width, height), Image.Resampling.BOX)
    pixels = np.asarray(small)
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), mask


def nearest(images: np.ndarray, model: DiffusionModel, data: Optional[str]) -> str:
    """The nearest training image of each, by pixels, as one picture; nothing without `data`."""
    if data is None:
        return ""
    bank = training_images(data, model.shape)
    found = nearest_neighbours(images.reshape(len(images), -1), bank.reshape(len(bank), -1))
    return shown(bank[found.indices], model, "The nearest training image of each")


@lru_cache(maxsize=4)
def training_images(data: str, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (N, C, H, W) of a prepared folder or a folder of images, at the size of the model."""
    channels, height, width = shape
    return open_images(data, ImageOptions(image_size=[height, width], channels=channels)).pixels
