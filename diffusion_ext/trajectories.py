"""How images come out of the noise: a strip of stages, and an animation."""

from typing import NamedTuple

import numpy as np

from diffusion_ext.pictures import grid, to_uint8

STAGES = 12
FRAMES = 60


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
