"""Our U-Net trained twice from the same weights: by our criterion, and inside their GaussianDiffusion.

Alike are objective v, T = 1,000 and their defaults, as flags of ours: `--beta-schedule sigmoid:tau=1` (our
own default is 0.7) and `--loss-weighting p2:gamma=0`, because without min-SNR they weigh the error of v by
SNR / (SNR + 1) = ᾱ. Timestep and noise are drawn by each program; in a third run theirs gets ours.
"""

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.diffusion.sides import our_batches, our_parts

ALIKE = "--beta-schedule sigmoid:tau=1 --objective v --loss-weighting p2:gamma=0 --autocast fp32"
TINY = "--image-size 16 --channels 1 --base-channels 16 --channel-mults 1,2 --blocks 1"
TINY += " --attention-resolutions 8 --head-channels 16"
LEARNING_RATE = 1e-3
BLOCKS = 10


class TheirView(nn.Module):
    """A `UNet` with the interface their GaussianDiffusion asks for."""

    self_condition = False

    def __init__(self, net: nn.Module, channels: int):
        super().__init__()
        self.net, self.channels, self.out_dim = net, channels, channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond=None) -> Tensor:
        return self.net(x, t)


class Pair:
    """Both programs around equal networks on the same images; `batches` in the order of training."""

    def __init__(self, images: Path, store: Path, batch: int, seed: int, flags: str = ""):
        from denoising_diffusion_pytorch import GaussianDiffusion

        given = f"{TINY} {ALIKE} --batch-size {batch} --seed {seed} {flags}"
        self.cfg, self.task, self.model, self.criterion = our_parts(images, store, given)
        self.criterion.train()
        view = TheirView(copy.deepcopy(self.model.net), self.task.spec["channels"])
        size = self.task.spec["height"], self.task.spec["width"]
        self.diffusion = GaussianDiffusion(view, image_size=size)
        if self.diffusion.objective != "pred_v":
            raise RuntimeError("denoising-diffusion-pytorch has another default than pred_v")

    def batches(self):
        """Epoch after epoch, the same from the beginning at each call."""
        for epoch in itertools.count(1):
            yield from our_batches(self.cfg, self.task, epoch)

    def ours(self, update: int, batch: dict) -> Tensor:
        self.criterion.set_num_updates(update)
        loss, images, _ = self.criterion(self.model, batch)
        return loss / images

    def theirs(self, update: int, batch: dict) -> Tensor:
        return self.diffusion(batch["image"].float() / 255)

    def theirs_with_our_draws(self, update: int, batch: dict) -> Tensor:
        self.criterion.set_num_updates(update)
        drawn = self.criterion.batch(batch)
        images = batch["image"].float() / 255
        return self.diffusion(images, times=drawn["t"], noise=drawn["noise"])


def curve(pair: Pair, loss_of: Callable, network: nn.Module, updates: int) -> list[float]:
    """The loss of every update."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    losses = []
    for update, batch in zip(range(updates), pair.batches(), strict=False):
        loss = loss_of(update, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare_curves(folder: Path, batch: int, updates: int, seeds: int) -> dict:
    """Mean loss of the last half of the updates, with standard errors, over all seeds."""
    names = ("ours", "theirs", "theirs_with_our_draws")
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    for seed in range(1, seeds + 1):
        for name in names:
            pair = Pair(folder / "digits", folder / "store", batch, seed)
            torch.manual_seed(seed)
            network = pair.model.net if name == "ours" else pair.diffusion.model
            curves[name].append(curve(pair, getattr(pair, name), network, updates))
    ends = {
        name: mean_and_error([loss for c in runs for loss in c[updates // 2 :]])
        for name, runs in curves.items()
    }
    (ours, error), (theirs, their_error) = ends["ours"], ends["theirs"]
    same = zip(*(itertools.chain(*curves[name]) for name in names[::2]), strict=True)
    return {
        "flags": ALIKE,
        "network": TINY,
        "parameters": sum(p.numel() for p in pair.model.net.parameters()),
        "images": len(pair.task.datasets["train"].rows),
        "batch": batch,
        "updates": updates,
        "seeds": seeds,
        "last_half": {name: {"mean": m, "standard_error": e} for name, (m, e) in ends.items()},
        "difference": ours - theirs,
        "difference_in_standard_errors": (ours - theirs) / math.hypot(error, their_error),
        "largest_relative_difference_same_draws": max(abs(a - b) / b for a, b in same),
        "curves": {name: in_blocks(runs) for name, runs in curves.items()},
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error; the draws of updates are independent."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def in_blocks(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs and successive updates, in at most BLOCKS numbers."""
    updates = len(runs[0])
    edges = [updates * k // BLOCKS for k in range(BLOCKS + 1)]
    parts = [[loss for run in runs for loss in run[a:b]] for a, b in itertools.pairwise(edges)]
    return [statistics.mean(part) for part in parts if part]
