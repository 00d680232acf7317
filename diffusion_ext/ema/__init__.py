"""Averages of the weights, of which samples are drawn.

The half-life is counted in images, so that it means the same for every batch size, and grows with training
(Karras et al. 2022, arXiv 2206.00364, appendix F.2): an average of a fixed long half-life is mostly the
random beginning for as long. Several lengths can be kept side by side, and tracks of the power function, of
which an average of any length is made afterwards (`diffusion_ext.ema.posthoc`).
"""

from collections.abc import Callable
from typing import Dict, List, Self, Sequence

import torch
from torch import Tensor, nn

from diffusion_ext.ema.posthoc import power_decay


class WeightAverages(nn.Module):
    """Averages of a module's parameters, as buffers: saved and resumed with the model.

    half_lives: images; ramp_up: the half-life is at most this share of the images seen so far; powers: σ_rel
    of tracks of the power function, which come behind those of the half-lives.
    """

    def __init__(
        self,
        module: nn.Module,
        half_lives: Sequence[float],
        ramp_up: float,
        powers: Sequence[float] = (),
    ):
        super().__init__()
        self.half_lives, self.ramp_up, self.powers = list(half_lives), ramp_up, list(powers)
        parameters = dict(module.named_parameters())
        self.names, self.shapes = list(parameters), [p.shape for p in parameters.values()]
        flat = torch.cat([p.detach().float().flatten() for p in parameters.values()])
        self.weights: Tensor
        self.register_buffer("weights", flat.repeat(len(self.half_lives) + len(self.powers), 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # half-precision averages would stand still: an update changes the last bits
        kept = self.weights
        nn.Module._apply(self, fn, recurse)
        self.weights = kept.to(self.weights.device)
        return self

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: float, images: float) -> None:
        """After an update with `images` images that brought the total to `images_seen`."""
        parameters = [p.detach() for p in module.parameters()]
        kept = [decay(length, images_seen, images, self.ramp_up) for length in self.half_lives]
        kept += [power_decay(length, images_seen, images) for length in self.powers]
        for average, share in zip(self.weights, kept, strict=True):
            weight = 1 - share
            views = self._views(average)
            if parameters[0].dtype != average.dtype:
                parameters = [p.to(average.dtype) for p in parameters]
            torch._foreach_lerp_(views, parameters, weight)

    def of(self, index: int = 0) -> Dict[str, Tensor]:
        """Parameter name → average number `index`, views of the buffer."""
        return dict(zip(self.names, self._views(self.weights[index]), strict=True))

    def _views(self, flat: Tensor) -> List[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [
            part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)
        ]


def decay(half_life: float, images_seen: float, images: float, ramp_up: float) -> float:
    """Share of the old average that an update with `images` images leaves: 0.5^(images / half-life).

    The half-life in force is min(half_life, ramp_up · images_seen); 0 means no average.
    """
    current = min(half_life, ramp_up * images_seen)
    return 0.5 ** (images / current) if current > 0 else 0.0
