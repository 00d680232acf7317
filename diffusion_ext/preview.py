"""A grid of samples from fixed noise, drawn while a model trains and without a trace in its training."""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusion_ext.criterion import uses_bf16
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import display_scale, save_picture, sheet
from ext_common.cli import UserError, why_full

logger = logging.getLogger(__name__)

# Seconds of training after which a run that has drawn nothing yet draws its first grid.
FIRST = 60.0
GRID_SHARE = 0.05


class Preview:
    """Draws with the averaged weights into SAVE_DIR/samples, always from the same noise."""

    def __init__(self, task):
        self.task = task
        self.began, self.drawn = time.monotonic(), False

    @property
    def folder(self) -> Path:
        return Path(self.task.cfg.save_dir) / "samples"

    def is_due(self) -> bool:
        """Whether the training goes on for a minute and nobody has seen a sample of it, of no earlier start
        either."""
        if self.drawn or time.monotonic() - self.began < FIRST:
            return False
        self.drawn = any(self.folder.glob("update_*.png"))
        return not self.drawn

    def draw(self, model, update: int) -> None:
        """On the first process only; the others wait at their next exchange of gradients."""
        cfg, self.drawn = self.task.cfg, True
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()  # dropout off; all noise comes from generators of its own
        try:
            stream = self.task.stream
            drawn = DiffusionModel(
                model, cfg, self.task.spec, device, stream=stream, distilled=self.task.distils
            )
            picture, images = preview_of(drawn, cfg, update, uses_bf16(cfg.autocast, device))
        finally:
            model.train(was_training)
        if self.task.watch.on:
            self.task.watch.look(images, self.task.images, cfg, update)
        path = self.folder / f"update_{update:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_picture(path, picture)
        except OSError as error:
            # what was learnt is not lost for want of a picture
            if why_full(error) is None:
                raise
            logger.warning(f"{path} cannot be written ({why_full(error)}): the training goes on")
            return
        logger.info(f"samples at update {update}: {path}")


def preview_of(
    drawn: DiffusionModel, cfg, update: int, bf16: bool
) -> tuple[Image.Image, np.ndarray]:
    """At most --sample-grid² samples, of a model with classes a row a class: a picture, and they alone."""
    side, classes = cfg.sample_grid, drawn.classes
    rows, columns, names, labels = side, side, [], None
    if classes:
        rows = min(len(classes), side**2)
        columns = min(side, side**2 // rows)
        # of more classes than there is room for, some from all over their list
        chosen = [k * len(classes) // rows for k in range(rows)]
        names = [classes[k] for k in chosen]
        labels = [k for k in chosen for _ in range(columns)]
    ((_, images),) = drawn.batches(
        range(rows * columns),
        steps=min(drawn.usual_sampler[1] if drawn.distilled else cfg.sample_steps, cfg.timesteps),
        seed=0,
        batch_size=rows * columns,
        labels=labels,
        bf16=bf16,
    )
    cells = [[*images[start : start + columns]] for start in range(0, len(images), columns)]
    scale = display_scale(images.shape[2])
    return sheet(cells, names, title=f"update {update:,}", scale=scale), images


def grid_interval(updates: int, asked: int, evaluations: int, batch: int) -> int:
    """Updates between two grids of samples, so that they take at most GRID_SHARE of the training.

    evaluations: of the network for a grid, each a third of the work of an image in an update. 0: none.
    """
    grids = int(GRID_SHARE * updates / (evaluations / 3 / batch))
    if not asked or not grids:
        return 0
    return max(min(asked, max(1, updates // 4)), -(-updates // grids))


def check_previews(cfg) -> None:
    """UserError for grids that would stop the training when the first of them is due."""
    for key, least in (("sample_interval", 0), ("sample_grid", 1), ("sample_steps", 1)):
        if cfg[key] < least:
            raise UserError(
                f"--{key.replace('_', '-')} {cfg[key]} is too small: give {least} or more"
            )
