"""Augmentation of batches of images, with parameters of each image given from outside.

An augmentation draws its parameters from uniform numbers that the caller made for each image (from seed,
update and sample), and is a pure function of them: neither batch, device nor another user of random numbers
changes it. Whatever it does also becomes a vector, zero just where the image is left alone. A net that is
conditioned on it learns raw images at zero, so that augmentation does not leak into samples (Karras et
al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F).

`--augment 'hflip:p=0.5;color_jitter:brightness=0.5,hue=0.1'` names the steps in their order.
"""

import itertools
from dataclasses import dataclass, field
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ext_common.registry import Registry

AUGMENTATIONS = Registry("augmentation")

# Order of the columns of parameters and conditions.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER = range(5)
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
# ITU-R 601 as torchvision rounds it
LUMA = (0.2989, 0.587, 0.114)


class Augmentation:
    """What an entry of AUGMENTATIONS is; it is made with its options as keyword arguments."""

    n_uniforms: int  # numbers it draws for an image
    condition_size: int  # numbers that tell what was done to an image

    def draw(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """Uniforms in [0, 1) (B, n_uniforms) → parameters (B, P) for images of shape (C, H, W)."""
        raise NotImplementedError

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        """x float (B, C, H, W) in [-1, 1] → the same, augmented; x itself is left as it is.

        An image whose condition is zero comes back bit by bit.
        """
        raise NotImplementedError

    def condition(self, params: Tensor) -> Tensor:
        """(B, condition_size), finite, of order 1; a row is zero just where the image is left alone."""
        raise NotImplementedError


@dataclass
class HorizontalFlipOptions:
    p: float = field(default=0.5, metadata={"help": "share of images that are mirrored"})

    def __post_init__(self) -> None:
        _check(self, "p", 0, 1)


@AUGMENTATIONS.register("hflip", options=HorizontalFlipOptions)
class HorizontalFlip(Augmentation):
    """Left becomes right. Parameter and condition: 1 where mirrored."""

    n_uniforms = condition_size = 1

    def __init__(self, **options: float) -> None:
        self.options = HorizontalFlipOptions(**options)

    def draw(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return (u < self.options.p).to(u.dtype)

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        return torch.where(params[:, :, None, None] > 0, x.flip(-1), x)

    def condition(self, params: Tensor) -> Tensor:
        return params


@dataclass
class ColorJitterOptions:
    brightness: float = field(
        default=0.5, metadata={"help": "factor, uniform from max(0, 1 - this) to 1 + this"}
    )
    contrast: float = field(
        default=0.5, metadata={"help": "factor, uniform from max(0, 1 - this) to 1 + this"}
    )
    saturation: float = field(
        default=0.5, metadata={"help": "factor, uniform from max(0, 1 - this) to 1 + this"}
    )
    hue: float = field(
        default=0.1, metadata={"help": "shift, uniform in ± this, in turns of the colour circle"}
    )
    p: float = field(default=1.0, metadata={"help": "share of images that are changed at all"})

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check(self, name, 0, 100)
        _check(self, "hue", 0, 0.5)
        _check(self, "p", 0, 1)


@AUGMENTATIONS.register("color_jitter", options=ColorJitterOptions)
class ColorJitter(Augmentation):
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter.

    Parameters (B, 5): three factors (1 is nothing), the shift of hue (0 is nothing), and which of
    the ORDERS the four come in. Condition (B, 4): factor - 1 and shift, each over its strength,
    so in [-1, 1] for strengths up to 1. In gray images saturation and hue are always nothing.
    """

    n_uniforms, condition_size = 6, 4

    def __init__(self, **options: float) -> None:
        o = self.options = ColorJitterOptions(**options)
        self.strengths = (o.brightness, o.contrast, o.saturation, o.hue)

    def draw(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        neutral = u.new_tensor([1.0, 1.0, 1.0, 0.0])
        strengths = u.new_tensor(self.strengths)
        if shape[0] == 1:
            strengths[[SATURATION, HUE]] = 0
        low = neutral - strengths
        low[:HUE].clamp_(min=0)
        params = low + u[:, :ORDER] * (neutral + strengths - low)
        params = torch.where(u[:, 5:] < self.options.p, params, neutral)
        order = (u[:, ORDER:5] * len(ORDERS)).floor().clamp(max=len(ORDERS) - 1)
        return torch.cat([params, order], 1)

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        used = [op for op in range(4) if self.strengths[op] and (x.shape[1] == 3 or op < 2)]
        if not used:
            return x
        slots = torch.tensor(around_hue(used), device=x.device)[params[:, ORDER].long()]
        y = (x + 1) / 2
        # no rows are picked: how many there are of each order is a question that a GPU is waited for
        for blend in slots[:, 0].unbind(1):
            y = blend_by(y, blend, params)
        if HUE in used:
            y = adjust_hue(y, params[:, HUE])
            for blend in slots[:, 1].unbind(1):
                y = blend_by(y, blend, params)
        changed = self.condition(params).ne(0).any(1)[:, None, None, None]
        return torch.where(changed, y * 2 - 1, x)

    def condition(self, params: Tensor) -> Tensor:
        neutral = params.new_tensor([1.0, 1.0, 1.0, 0.0])
        # A strength of 0 has drawn nothing, and 0 / 1 says so.
        scale = params.new_tensor([s or 1.0 for s in self.strengths])
        return (params[:, :ORDER] - neutral) / scale


class Augmentations:
    """Steps one behind the other, each with its share of the uniform numbers."""

    def __init__(self, steps: Sequence[Augmentation]):
        self.steps = list(steps)
        self.n_uniforms = sum(step.n_uniforms for step in self.steps)
        self.condition_size = sum(step.condition_size for step in self.steps)

    def __call__(self, x: Tensor, uniforms: Tensor) -> Tuple[Tensor, Tensor]:
        """x float32 or float64 (B, C, H, W) in [-1, 1], uniforms in [0, 1) (B, n_uniforms).

        Returns the augmented images and the condition (B, condition_size), zero where an image is
        as it was. Raises ValueError for another number of uniforms.
        """
        if uniforms.shape != (len(x), self.n_uniforms):
            raise ValueError(
                f"uniforms have the shape {tuple(uniforms.shape)}, expected ({len(x)}, {self.n_uniforms})"
            )
        uniforms = uniforms.to(x.device, torch.float32)
        conditions, first = [x.new_zeros(len(x), 0)], 0
        for step in self.steps:
            u = uniforms[:, first : first + step.n_uniforms]
            params = step.draw(u, x.shape[1:])
            x = step.apply(x, params)
            conditions.append(step.condition(params).to(x.dtype))
            first += step.n_uniforms
        return x, torch.cat(conditions, 1)


def build_augmentations(pipeline: Optional[str]) -> Augmentations:
    """'name:key=value,…;name' → the steps in this order; no steps for an empty text or None."""
    parts = (part.strip() for part in (pipeline or "").split(";"))
    return Augmentations([AUGMENTATIONS.bind(part)() for part in parts if part])


def adjust_brightness(y: Tensor, factor: Tensor) -> Tensor:
    """y (B, C, H, W) in [0, 1] times factor (B,), clamped; as torchvision.transforms.v2."""
    return (y * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(y: Tensor, factor: Tensor) -> Tensor:
    """y (B, C, H, W) in [0, 1] drawn to the mean of its gray values, or away from it; factor (B,)."""
    return _blend(y, luma(y).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(y: Tensor, factor: Tensor) -> Tensor:
    """y (B, 3, H, W) in [0, 1] drawn to its gray values, or away from them; factor (B,)."""
    return _blend(y, luma(y), factor)


def adjust_hue(y: Tensor, shift: Tensor) -> Tensor:
    """y (B, 3, H, W) in [0, 1] with hue turned by shift (B,) turns; HSV value and saturation stay.

    With hue h in sixths of a turn, value v and chroma c, a channel is v - c·clamp(min(k, 4 - k), 0, 1)
    where k = (n + h) mod 6 and n is 5, 3, 1 for red, green, blue (Smith 1978, in closed form).
    """
    r, g, b = y.unbind(1)
    low, v = torch.aminmax(y, dim=1)
    c = v - low
    divisor = torch.where(c == 0, 1, c)
    h = torch.where(
        v == r,
        (g - b) / divisor,
        torch.where(v == g, (b - r) / divisor + 2, (r - g) / divisor + 4),
    )
    h += 6 * shift[:, None, None]
    out = torch.empty_like(y)
    for channel, n in enumerate((5, 3, 1)):
        k = h + n
        k -= 6 * torch.floor(k / 6)
        out[:, channel] = v - c * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


def luma(y: Tensor) -> Tensor:
    """Gray values (B, 1, H, W) of (B, 1 or 3, H, W)."""
    if y.shape[1] == 1:
        return y
    r, g, b = y.split(1, 1)
    gray: Tensor = LUMA[0] * r + LUMA[1] * g + LUMA[2] * b
    return gray


def around_hue(used: Sequence[int]) -> list[list[list[int]]]:
    """For each of the ORDERS what of `used` comes before the turn of hue, and what after it.

    Each is as long as there are other operations than hue in `used`, and filled with −1.
    """
    blends = len(set(used) - {HUE})
    found = []
    for order in ORDERS:
        turn = order.index(HUE) if HUE in used else len(order)
        parts = [[op for op in part if op in used] for part in (order[:turn], order[turn + 1 :])]
        found.append([part + [-1] * (blends - len(part)) for part in parts])
    return found


def blend_by(y: Tensor, op: Tensor, params: Tensor) -> Tensor:
    """y (B, C, H, W) with brightness, contrast or saturation changed, as `op` (B,) says; −1 is nothing."""
    factor = params.gather(1, op.clamp(min=0)[:, None])[:, 0]
    op = _per_image(op)
    blends = {
        BRIGHTNESS: adjust_brightness,
        CONTRAST: adjust_contrast,
        SATURATION: adjust_saturation,
    }
    for number, blend in blends.items():
        y = torch.where(op == number, blend(y, factor), y)
    return y


def _blend(y: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return (factor * y + (1 - factor) * other).clamp_(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _check(options: object, name: str, low: float, high: float) -> None:
    value = getattr(options, name)
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is not between {low} and {high}")
