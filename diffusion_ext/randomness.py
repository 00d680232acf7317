"""Random numbers that belong to an image, not to a process: what training and sampling draw from `Stream`.

They are keyed by (seed, update, id) in training and by (seed, image number, draw) in sampling. So neither
the batch size nor the number of processes, nor what else draws random numbers, changes them. fairseq seeds
all ranks alike, whose noise would be equal.

A checkpoint says which stream it was trained with, `STREAM`; one that says nothing (`BEFORE`) is of a version
that made a torch generator for each image, and goes on with those, as do its samples.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ext_common.random import STREAM, Stream

BEFORE = None


def stream_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for `purpose` (at most 16 bytes) and these 64-bit integers; equal on every machine.

    torch's CPU generator looks at its lower 32 bits only: of 50,000 images two are alike once in four times.
    """
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, purpose: str, *numbers: int) -> torch.Generator:
    """A torch generator on `device`, seeded with `stream_seed`."""
    return torch.Generator(device).manual_seed(stream_seed(purpose, *numbers))


def drawn_before(
    purpose: str, addresses: Sequence[tuple[int, ...]], device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """The old streams, all there is of them: a torch generator for each address, each with a state.

    Returns a function of `torch.rand` or `torch.randn` and a shape: what it draws next, (B, *shape) on
    `device`.
    """
    sources = [generator(device, purpose, *numbers) for numbers in addresses]

    def draw(kind: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([kind(shape, generator=one, device=device) for one in sources])

    return draw


def training_draws(
    seed: int,
    update: int,
    ids: Tensor | Sequence[int],
    shape: tuple[int, ...],
    timesteps: int,
    uniforms: int = 0,
    device: torch.device | str = "cpu",
    stream: str | None = STREAM,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of B samples a timestep (B,) int64, noise (B, *shape) and numbers in [0, 1) (B, uniforms)."""
    if stream is BEFORE:
        numbers = [(seed, update, number) for number in torch.as_tensor(ids).tolist()]
        draw = drawn_before("training", numbers, device)
        drawn = draw(torch.rand, (uniforms + 1,))
        t = (drawn[:, 0].double() * timesteps).long().clamp(max=timesteps - 1)
        return t, draw(torch.randn, shape), drawn[:, 1:]
    ids = torch.as_tensor(ids, device=device)
    return (
        Stream("timestep", seed, update).integers(ids, timesteps),
        Stream("noise", seed, update).normals(ids, shape),
        Stream("augmentation", seed, update).uniforms(ids, uniforms),
    )


def coin(seed: int, update: int, stream: str | None = STREAM) -> bool:
    """Heads or tails for an update, the same in all processes."""
    if stream is BEFORE:
        return bool(drawn_before("self", [(seed, update)])(torch.rand, ()) < 0.5)
    return not Stream("self", seed, update).integers(torch.zeros(1, dtype=torch.int64), 2)


def validation_draws(
    ids: Tensor | Sequence[int],
    shape: tuple[int, ...],
    timesteps: int,
    device: torch.device | str = "cpu",
    stream: str | None = STREAM,
) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *shape) that an image has in every validation, of every run.

    The timesteps of successive ids follow the golden ratio, so that any validation set meets all noise levels
    about equally often.
    """
    ids = torch.as_tensor(ids, device=device)
    ratio = (5**0.5 - 1) / 2
    t = ((0.5 + ids.double() * ratio) % 1 * timesteps).long()
    if stream is BEFORE:
        draw = drawn_before("validation", [(number,) for number in ids.tolist()])
        return t, draw(torch.randn, shape).to(device)
    return t, Stream("validation").normals(ids, shape)


class ImageNoise:
    """Noise of the images with these `numbers` of a sampling run.

    Image k has its own stream of (seed, k): the same image comes out whatever else is in its batch.
    """

    def __init__(
        self,
        seed: int,
        numbers: list[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        stream: str | None = STREAM,
    ):
        self.seed, self.shape, self.device, self.draws = seed, shape, device, 0
        self.ids = torch.tensor(numbers, dtype=torch.int64, device=device)
        self.before: Callable[..., Tensor] | None = None
        if stream is BEFORE:
            self.before = drawn_before("sampling", [(seed, number) for number in numbers])
        self.start = self.draw()

    def draw(self) -> Tensor:
        """The next noise of each image, (B, *shape)."""
        if self.before is not None:
            return self.before(torch.randn, self.shape).to(self.device)
        self.draws += 1
        return Stream("sampling", self.seed, self.draws - 1).normals(self.ids, self.shape)

    def __call__(self, step: int) -> Tensor:
        """What a sampler asks for at a step; steps come in order."""
        return self.draw()
