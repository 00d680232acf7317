"""Images made from images: between two, from one and some noise, and where a mask says so.

What a mask means: a pixel is drawn anew where the mask is light, at least half of white; what is black or
transparent is kept. So a mask painted white on nothing, as image editors save it, means what was painted.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import to_float, to_uint8
from diffusion_ext.prepare.images import BadImage, decode_image, find_images, opened, to_pixels
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.samplers import (
    SAMPLERS,
    Denoise,
    Level,
    Trajectory,
    ddim,
    ddpm,
    trajectory,
    transition,
)
from diffusion_ext.schedules import NoiseSchedule
from ext_common.cli import UserError


def interpolation(
    model: DiffusionModel, options: Any, numbers: Sequence[int]
) -> Callable[..., Any]:
    """draw(numbers): the first of `numbers` is A as it comes back from its latent, the last is B."""
    ends = [read(path, model.shape, model.device) for path in options.interpolate]
    path = lower_part(model, options, options.noise_level, "--noise-level")
    first, last = (invert(denoiser(model, options, 1), image[None], path) for image in ends)

    @torch.no_grad()
    def images_of(part: list[int]) -> np.ndarray:
        count = max(1, len(numbers) - 1)
        latents = torch.cat([slerp(first, last, (k - numbers[0]) / count) for k in part])
        # without eta, ddim draws no noise
        return to_uint8(ddim(denoiser(model, options, len(part)), latents, path, lambda _: latents))

    return lambda chosen: in_batches(images_of, chosen, options.batch_size)


def in_batches(
    images_of: Callable[..., Any], numbers: Sequence[int], size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(numbers, images) batch by batch."""
    for start in range(0, len(numbers), size):
        part = list(numbers[start : start + size])
        yield part, images_of(part)


def denoiser(model: DiffusionModel, options: Any, count: int) -> Denoiser:
    """For `count` images of the class --label, or of none.

    Never used twice: with self-conditioning it remembers its last guess.
    """
    label = None
    if options.label is not None:
        label = torch.full((count,), model.class_index(options.label), device=model.device)
    return model.denoiser(label, options.guidance, options.clip, options.precision == "bf16")


@torch.no_grad()
def invert(denoise: Denoise, image: Tensor, path: Trajectory, tries: int = 3) -> Tensor:
    """The noisy image at the first level of `path` that DDIM brings back to `image` (B, C, H, W).

    DDIM run backwards (Song et al. 2020, arXiv 2010.02502, section 4.3). A step down from y to x uses the ε
    of y, which is sought: it is taken from x, and then `tries` − 1 times from the y that this gives.
    """
    x = image
    up = path.levels[::-1]
    for now, then in zip(up, up[1:], strict=False):
        y = x
        for _ in range(tries):
            eps = denoise(y, then.timestep).eps
            y = then.alpha / now.alpha * (x - now.sigma * eps) + then.sigma * eps
        x = y
    return x


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a (share 0) to b (share 1), each (1, C, H, W), on the great circle: noise keeps its length."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def lower_part(model: DiffusionModel, options: Any, share: float, flag: str) -> Trajectory:
    """The levels from a share of the timesteps down to the image; UserError where that is next to none."""
    trajectory(model.schedule, options.steps, options.spacing)  # no more steps than the model has
    top = max(1, round(share * model.schedule.timesteps)) - 1
    if top < 1:
        raise UserError(f"{flag} is too small: no noise is left to mix in")
    lower = NoiseSchedule(model.schedule.alphas_cumprod[: top + 1])
    return trajectory(lower, min(options.steps, top + 1), options.spacing)


def variation(model: DiffusionModel, options: Any, numbers: Sequence[int]) -> Callable[..., Any]:
    """draw(numbers): each image of --image once more, out of it and as much noise as --strength says.

    SDEdit (Meng et al. 2022, arXiv 2108.01073): the image is noised to that share of the timesteps, and the
    sampler goes on from there. A strength of 1 leaves next to nothing of it.
    """
    images = [read(path, model.shape, model.device) for path in files_of(options.image)]
    path = lower_part(model, options, options.strength, "--strength")
    run = SAMPLERS.bind(options.sampler)
    denoiser(model, options, 1)  # knows the class, or says so before anything is drawn
    first = path.levels[0]

    @torch.no_grad()
    def images_of(part: list[int]) -> np.ndarray:
        noise = ImageNoise(options.seed, part, model.shape, model.device, model.stream)
        known = torch.stack([images[source_of(k, numbers, len(images))] for k in part])
        x = first.alpha * known + first.sigma * noise.start
        return to_uint8(run(denoiser(model, options, len(part)), x, path, noise))

    return lambda chosen: in_batches(images_of, chosen, options.batch_size)


def inpainting(
    model: DiffusionModel, options: Any, numbers: Sequence[int] = (0,)
) -> Callable[..., Any]:
    """draw(numbers): what is white in the mask drawn anew, the rest as in the image."""
    files = files_of(options.inpaint)
    masks = [
        read_mask(mask, path, model) for mask, path in zip(masks_of(options), files, strict=True)
    ]
    images = [read(path, model.shape, model.device) for path in files]
    path = trajectory(model.schedule, options.steps, options.spacing)
    denoiser(model, options, 1)  # knows the class, or says so before anything is drawn

    @torch.no_grad()
    def images_of(part: list[int]) -> np.ndarray:
        noise = ImageNoise(options.seed, part, model.shape, model.device, model.stream)
        denoise = denoiser(model, options, len(part))
        chosen = [source_of(k, numbers, len(images)) for k in part]
        known, where = (torch.stack([of[i] for i in chosen]) for of in (images, masks))
        return to_uint8(repaint(denoise, known, where, path, noise, options.resample))

    return lambda chosen: in_batches(images_of, chosen, options.batch_size)


def source_of(number: int, numbers: Sequence[int], count: int) -> int:
    """Which of `count` files the image `number` is made from: all in turn, from the first number on."""
    return (number - numbers[0]) % count


def files_of(given: str) -> list[str]:
    """An image, or all of a folder in order. UserError where there is none."""
    if not os.path.isdir(given):
        return [given]
    names = find_images(given)
    if not names:
        raise UserError(f"{given} holds no images: give an image, or a folder of them")
    return [os.path.join(given, name) for name in names]


def masks_of(options: Any) -> list[str]:
    """The mask of each image of --inpaint: the one there is, or that of the same name in a folder."""
    files = files_of(options.inpaint)
    if not os.path.isdir(options.mask):
        return [options.mask] * len(files)
    by_name = {Path(path).stem: path for path in files_of(options.mask)}
    for path in files:
        if Path(path).stem not in by_name:
            raise UserError(
                f"{options.mask} holds no mask for {path}: give one named {Path(path).stem}.png"
            )
    return [by_name[Path(path).stem] for path in files]


def read_mask(path: str, image: str, model: DiffusionModel) -> Tensor:
    """bool (1, H, W): where to draw. UserError where that is nowhere, or the mask is of another shape."""
    (mask_w, mask_h), (w, h) = size_of(path), size_of(image)
    if mask_w * h != mask_h * w:
        raise UserError(
            f"{path} has {mask_w} × {mask_h} pixels, {image} {w} × {h}: give a mask of the same shape"
        )
    _, height, width = model.shape
    try:
        with opened(path) as mask:
            pixels = to_pixels(mask, height, width, 1, behind="black")
    except BadImage as error:
        raise UserError(f"{path} cannot be used ({error}): give the file of a mask") from None
    where = torch.from_numpy(pixels.copy()) > 127
    if not where.any():
        raise UserError(
            f"{path} is black or transparent everywhere, so that nothing would be drawn: paint white"
            " what --inpaint is to draw"
        )
    return where.to(model.device)


def size_of(path: str) -> tuple[int, int]:
    """(width, height) of an image file, upright."""
    try:
        with opened(path) as image:
            return image.size
    except BadImage as error:
        raise UserError(f"{path} cannot be used ({error}): give the file of an image") from None


def repaint(
    denoise: Denoise, image: Tensor, mask: Tensor, path: Trajectory, noise: ImageNoise, times: int
) -> Tensor:
    """RePaint (Lugmayr et al. 2022, arXiv 2201.09865, Algorithm 1) with jumps of one level.

    image: (C, H, W) or (B, C, H, W); mask: bool, True where to draw; noise.start: (B, C, H, W).
    At every level the known pixels are those of the image, noised to that level; each level is gone through
    `times` times.
    """
    x = noise.start
    for _, now, then in path.steps:
        repeats = times if then.sigma > 0 else 1
        for k in range(repeats):
            x = one_step(denoise, x, now, then, noise)
            known = then.alpha * image + (then.sigma * noise.draw() if then.sigma > 0 else 0)
            x = torch.where(mask, x, known)
            if k < repeats - 1:
                kept, fresh = transition(now, then)
                x = kept * x + math.sqrt(fresh) * noise.draw()
    return x


def one_step(denoise: Denoise, x: Tensor, now: Level, then: Level, noise: ImageNoise) -> Tensor:
    """One step of ancestral sampling."""
    return ddpm(denoise, x, Trajectory((now, then)), noise)


def read(path: str, shape: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """An image file as the model's own images are, float (C, H, W) in [−1, 1]."""
    channels, height, width = shape
    try:
        pixels = decode_image(path, height, width, channels)
    except BadImage as error:
        raise UserError(f"{path} cannot be used ({error}): give the file of an image") from None
    return to_float(torch.from_numpy(pixels.copy())).to(device)
