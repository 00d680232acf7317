"""A small classifier of the data's own classes, whose penultimate layer serves as features.

Trained by number of updates, not by epochs, so that it takes as long for ten images as for ten thousand; in
float64, so that two machines, or one and two threads, agree in every digit that is printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ext_common.cli import progress

# Part of the cache key: to be raised with any change here that changes the weights.
VERSION = 2
BATCH = 64
CHANNELS = (32, 64)
MAX_SIDE = (
    16  # of the feature maps of the first layer: of larger images each cell is all its pixels
)


@dataclass
class ClassifierOptions:
    """Options of the classifier extractor."""

    features: int = field(default=64, metadata={"help": "width of the penultimate layer"})
    updates: int = field(default=300, metadata={"help": "training steps of 64 images"})
    seed: int = field(default=1, metadata={"help": "seed of weights and order of the images"})

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("updates", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")


class Classifier(nn.Module):
    """Convolutions, a hidden layer of `features` and a linear layer of `classes`; float64."""

    def __init__(self, channels: int, height: int, width: int, features: int, classes: int):
        super().__init__()
        first, second = CHANNELS
        self.shrink = max(1, -(-max(height, width) // MAX_SIDE))
        self.more = [-side % self.shrink for side in (height, width)]
        height, width = (-(-side // self.shrink) for side in (height, width))
        self.conv1 = nn.Conv2d(channels * self.shrink**2, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.hidden = nn.Linear(second * -(-height // 4) * -(-width // 4), features)
        self.out = nn.Linear(features, classes)
        self.double()

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) → float64 (B, D), the activations of the hidden layer, at least 0."""
        x = images.double() / 127.5 - 1
        if self.shrink > 1:
            x = F.pixel_unshuffle(F.pad(x, (0, self.more[1], 0, self.more[0])), self.shrink)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, ceil_mode=True)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, ceil_mode=True)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) → logits, float64 (B, classes)."""
        hidden = F.dropout(self.features(images), 0.25, self.training)
        logits: Tensor = self.out(hidden)
        return logits


def train_classifier(
    pixels: np.ndarray, labels: np.ndarray, classes: int, options: ClassifierOptions
) -> Classifier:
    """A classifier of uint8 (N, C, H, W) into labels (N,); the same for the same arguments.

    AdamW with weight decay and dropout, the learning rate falling to 0 along a cosine. Global random state is
    left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        channels, height, width = pixels.shape[1:]
        model = Classifier(channels, height, width, options.features, classes).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(options.updates, 1))
        order = _order(len(pixels), options)
        for rows in progress(order, "training the classifier", "updates"):
            target = torch.from_numpy(labels[rows])
            loss = F.cross_entropy(model(torch.from_numpy(pixels[rows])), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def weights_of(model: Classifier) -> dict[str, np.ndarray]:
    """The state as arrays, for the cache."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load_weights(model: Classifier, arrays: Mapping[str, np.ndarray]) -> Classifier:
    """The state that :func:`weights_of` gave."""
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return model.eval()


def _order(count: int, options: ClassifierOptions) -> list[np.ndarray]:
    random = np.random.default_rng(options.seed)
    batch = min(BATCH, count)
    passes = -(-options.updates * batch // count)
    rows = np.concatenate([random.permutation(count) for _ in range(passes)])
    return [rows[i * batch : (i + 1) * batch] for i in range(options.updates)]
