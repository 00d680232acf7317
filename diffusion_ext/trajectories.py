"""How images come out of the noise: a strip of stages, and an animation."""

from pathlib import Path

import numpy as np

from diffusion_ext.pictures import grid, save_gif, save_png, to_uint8

STAGES = 12


def save_trajectory(folder: Path, model, options: dict, numbers: list[int], scale: int) -> None:
    """Write strip.png (a row an image, from noise to image) and trajectory.gif for these images."""
    frames = []

    def watch(i, x, x0):
        frames.append(to_uint8(x))

    for _ in model.batches(numbers, **{**options, "batch_size": len(numbers)}, watch=watch):
        pass
    stages = sorted({round(k) for k in np.linspace(0, len(frames) - 1, min(STAGES, len(frames)))})
    rows = [frames[stage][row] for row in range(len(numbers)) for stage in stages]
    save_png(folder / "strip.png", grid(np.stack(rows), columns=len(stages)), scale)
    shown = frames if len(frames) <= 60 else [frames[k] for k in np.linspace(0, len(frames) - 1, 60).round().astype(int)]
    save_gif(folder / "trajectory.gif", [grid(frame) for frame in shown], scale)
