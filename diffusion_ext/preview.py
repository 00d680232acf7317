"""A grid of samples from fixed noise, drawn while a model trains and without a trace in its training."""

import logging
from pathlib import Path

import torch

from diffusion_ext.criterion import uses_bf16
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import display_scale, grid, save_png

logger = logging.getLogger(__name__)


class Preview:
    """Draws with the averaged weights into SAVE_DIR/samples, always from the same noise."""

    def __init__(self, task):
        self.task = task

    def draw(self, model, update: int) -> None:
        """On the first process only; the others wait at their next exchange of gradients."""
        cfg = self.task.cfg
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()  # dropout off; all noise comes from generators of its own
        try:
            images = draw_images(
                model,
                self.task,
                list(range(cfg.sample_grid**2)),
                min(cfg.sample_steps, cfg.timesteps),
                device,
            )
        finally:
            model.train(was_training)
        path = Path(cfg.save_dir) / "samples" / f"update_{update:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid(images, cfg.sample_grid), display_scale(images.shape[2]))
        logger.info(f"samples at update {update}: {path}")


def draw_images(model, task, numbers, steps, device):
    """uint8 (B, C, H, W): the samples with these numbers, of all classes in turn."""
    drawn = DiffusionModel(model, task.cfg, task.spec, device, stream=task.stream)
    options = dict(
        steps=steps,
        seed=0,
        batch_size=len(numbers),
        labels=drawn.classes_in_turn(numbers),
        bf16=uses_bf16(task.cfg.autocast, device),
    )
    ((_, images),) = drawn.batches(numbers, **options)
    return images
