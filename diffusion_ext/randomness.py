"""Random numbers that belong to a sample, not to a process.

Each is drawn from a generator of its own, whose seed is a hash of what it is for: (seed, update, sample id)
in training, (seed, image number) in sampling. So neither the batch size nor the number of processes, nor
what else draws random numbers, changes them. fairseq seeds all ranks alike, whose noise would be equal.
"""

import hashlib
import struct

import torch
from torch import Tensor


def stream_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for `purpose` (at most 16 bytes) and these 64-bit integers; equal on every machine.

    torch's CPU generator looks at its lower 32 bits only: of 50,000 images two are alike once in four times.
    """
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, purpose: str, *numbers: int) -> torch.Generator:
    """A generator on `device`, seeded with `stream_seed`."""
    return torch.Generator(device).manual_seed(stream_seed(purpose, *numbers))


def training_draws(
    seed: int,
    update: int,
    ids: list[int],
    shape: tuple[int, ...],
    timesteps: int,
    uniforms: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of B samples a timestep (B,) int64, noise (B, *shape) and numbers in [0, 1) (B, uniforms)."""
    rows, noise = [], []
    for number in ids:
        source = generator(device, "training", seed, update, number)
        rows.append(torch.rand(uniforms + 1, generator=source, device=device))
        noise.append(torch.randn(shape, generator=source, device=device))
    drawn = torch.stack(rows)
    t = (drawn[:, 0].double() * timesteps).long().clamp(max=timesteps - 1)
    return t, torch.stack(noise), drawn[:, 1:]


def validation_draws(
    ids: list[int],
    shape: tuple[int, ...],
    timesteps: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *shape) that an image has in every validation, of every run.

    The timesteps of successive ids follow the golden ratio, so that any validation set meets all noise levels
    about equally often.
    """
    noise = [torch.randn(shape, generator=generator("cpu", "validation", number)) for number in ids]
    ratio = (5**0.5 - 1) / 2
    t = [int((0.5 + number * ratio) % 1 * timesteps) for number in ids]
    return torch.tensor(t, device=device), torch.stack(noise).to(device)


class ImageNoise:
    """Noise of the images with these `numbers` of a sampling run, on the CPU's generator.

    Image k has its own stream of (seed, k): the same image comes out whatever else is in its batch and
    whichever device computes it.
    """

    def __init__(
        self,
        seed: int,
        numbers: list[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ):
        self.sources = [generator("cpu", "sampling", seed, k) for k in numbers]
        self.shape, self.device = shape, device
        self.start = self.draw()

    def draw(self) -> Tensor:
        """The next noise of each image, (B, *shape)."""
        drawn = [torch.randn(self.shape, generator=source) for source in self.sources]
        return torch.stack(drawn).to(self.device)

    def __call__(self, step: int) -> Tensor:
        """What a sampler asks for at a step; steps come in order."""
        return self.draw()
