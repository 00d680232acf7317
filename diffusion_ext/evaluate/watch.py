"""Whether a training begins to draw its own images, seen while it trains.

A sample is a copy where its nearest training image is less than a third as far as the second nearest
(Bonnaire et al. 2025, arXiv 2505.17638). Beside it stands how far the nearest is for a sample, as a share
of how far it is for a held-out image: 1 where nothing is memorised. Pixels, Euclidean.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

logger = logging.getLogger(__name__)

THIRD = 1 / 3
COPIES = 0.05  # share of the samples from which on a training is said to draw copies
MOST = 256  # held-out images that are compared


@dataclass
class WatchOptions:
    watch_copies: bool = field(
        default=False,
        metadata={
            "help": "say with each grid of samples how many of them are copies of training images, and with"
            " each validation by how much its loss is above that on training images"
        },
    )
    stop_at_copies: bool = field(
        default=False,
        metadata={"help": f"end the training where {COPIES:.0%} of a grid are; watches them too"},
    )


class Copies(NamedTuple):
    """share: of the samples that are copies; nearest: median distance to the nearest training image, as a
    share of that of held-out images (nan where none is held out)."""

    share: float
    nearest: float


def copies(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Copies:
    """uint8 (N, C, H, W) each, two training images at least."""
    from diffusion_ext.evaluate.neighbours import (
        nearest_neighbours,
    )  # scipy, which few trainings want

    size = train[0].size
    samples, train, held_out = (x.reshape(-1, size) for x in (samples, train, held_out))
    first = nearest_neighbours(samples, train)
    second = nearest_neighbours(samples, train, exclude=first.indices)
    share = np.mean((first.distances < THIRD * second.distances) | (first.distances == 0))
    usual = nearest_neighbours(held_out[:MOST], train).distances if len(held_out) else [np.nan]
    return Copies(float(share), float(np.median(first.distances) / np.median(usual)))


class Watch:
    """Looks at the samples of a training; `since`: the update with which copies began, None so far."""

    def __init__(self, options: Any) -> None:
        self.on, self.ends = options.watch_copies or options.stop_at_copies, options.stop_at_copies
        self.since: Optional[int] = None

    def look(self, samples: np.ndarray, images: Any, options: Any, update: int) -> None:
        """Log what is seen; images: of the training (`store.Images`), options: of the split."""
        split = (options.valid_fraction, options.max_valid)
        train, held_out = (images.pixels[images.rows(name, *split)] for name in ("train", "valid"))
        if len(train) < 2:
            return
        found = copies(samples, train, held_out)
        logger.info(
            f"update {update}: {found.share:.0%} of {len(samples)} samples are copies of training images; the"
            f" nearest one is {found.nearest:.2f} times as far as for held-out images"
        )
        if found.share < COPIES:
            self.since = None
        elif self.since is None:
            self.since = update
            logger.warning(
                f"from update {update} on samples are copies: train for less long, or with --dropout 0.1,"
                " --augment or more images"
            )

    @property
    def ended(self) -> Optional[str]:
        """Why the training is at its end; None while it is not."""
        if not self.ends or self.since is None:
            return None
        return f"samples that are copies, since update {self.since} (--stop-at-copies)"


def as_trained_on(sample: Mapping[str, Any], images: Any, rows: np.ndarray) -> dict[str, Any]:
    """A batch of validation with training images in the place of its own: the same noise and timesteps."""
    # evenly from all over them
    ids = sample["id"].cpu().numpy()
    chosen = rows[(ids * 0.6180339887 % 1 * len(rows)).astype(np.int64)]
    device = sample["image"].device
    pixels = torch.from_numpy(images.pixels[chosen]).to(device)
    labels = torch.from_numpy(images.labels[chosen]).to(device)
    return {**sample, "image": pixels, "label": labels}
