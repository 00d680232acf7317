"""A grid of samples from fixed noise, drawn while a model trains and without a trace in its training."""

import logging
from pathlib import Path

import torch

from diffusion_ext.criterion import autocast
from diffusion_ext.denoiser import Denoiser
from diffusion_ext.pictures import display_scale, grid, save_png, to_uint8
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.samplers import dpmpp_2m, trajectory

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


@torch.no_grad()
def draw_images(model, task, numbers, steps, device):
    """uint8 (B, C, H, W): the samples with these numbers, of all classes in turn."""
    spec = task.spec
    noise = ImageNoise(0, numbers, (spec["channels"], spec["height"], spec["width"]), device)
    label = None
    if spec["classes"]:
        label = torch.tensor(numbers, device=device) % len(spec["classes"])

    def network(x, t, label, x0):
        with autocast(task.cfg.autocast, device):
            return model(x, t, label, x0, average=0)

    denoise = Denoiser(
        network, task.schedule, task.cfg.objective, label=label, self_condition=model.self_condition
    )
    return to_uint8(dpmpp_2m(denoise, noise.start, trajectory(task.schedule, steps), noise))
