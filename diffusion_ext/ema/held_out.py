"""The error of weights on the images that a training held out, outside of training."""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from diffusion_ext.denoiser import split_output
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.network import options_of
from diffusion_ext.objectives import OBJECTIVES, shown
from diffusion_ext.pictures import to_float
from diffusion_ext.prepare.options import ImageOptions
from diffusion_ext.randomness import validation_draws
from diffusion_ext.store import Images, open_images
from ext_common.cli import UserError

BATCH = 64


class HeldOut:
    """A model and the rows of images that it never saw; `error` is that of validation, unweighted."""

    def __init__(self, model: DiffusionModel, images: Images, rows: np.ndarray):
        self.model, self.images, self.rows = model, images, rows

    @classmethod
    def of(cls, path: str, state: Mapping[str, Any], data: Optional[str], device: str) -> "HeldOut":
        """What the checkpoint `path` (its state) held out; UserError where these images are gone."""
        cfg = state["cfg"]["task"]
        place = data or cfg["data"]
        images = open_images(place, options_of(ImageOptions, cfg))
        if not data and images.content_hash != state["task_state"]["spec"]["content_hash"]:
            raise UserError(
                f"{place} holds other images than {path} was trained on: give these as --data"
            )
        rows = images.rows("valid", cfg["valid_fraction"], cfg["max_valid"])
        if not len(rows):
            raise UserError(f"{path} was trained without held-out images: give one --sigma-rel")
        return cls(DiffusionModel.from_checkpoint(path, device, 0), images, rows)

    @torch.no_grad()
    def error(self, weights: Tensor, draws: int) -> float:
        """Mean squared error of the network with these weights (parameters,), at `draws` levels an image."""
        model, count = self.model, len(self.rows)
        model.model.ema.weights[0] = weights.to(model.device)
        objective, total = OBJECTIVES.get(model.objective), 0.0
        for start in range(0, count * draws, BATCH):
            ids = list(range(start, min(start + BATCH, count * draws)))
            rows = self.rows[[k % count for k in ids]]
            x0 = to_float(torch.from_numpy(self.images.pixels[rows])).to(model.device)
            t, noise = validation_draws(
                ids, x0.shape[1:], model.schedule.timesteps, model.device, model.stream
            )
            a, s = model.levels[:, t, None, None, None]
            label = None
            if model.classes:
                label = torch.from_numpy(self.images.labels[rows]).to(model.device)
            x_t = a * x0 + s * noise
            x, time = shown(objective, x_t, t, a, s)
            output, _ = split_output(model.model(x, time, label, average=0).float(), x0.shape[1])
            difference = output - objective.target(x0, noise, a, s)
            total += float(difference.square().flatten(1).mean(1).sum())
        return total / (count * draws)
