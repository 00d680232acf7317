"""Randomness that has an address: what is drawn follows from (purpose, seed, update, id) and nothing else.

One generator for all of it, Philox 4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"): a function of a counter and a key without a state, so that all samples of a batch are drawn at once, on
whichever device, and neither batch, process nor order has a part in it.

    noise = Stream("noise", seed, update).normals(ids, (3, 32, 32))      # ids int64 (B,) → (B, 3, 32, 32)

Integers and uniform numbers are bit by bit the same on every device; normals, which need a logarithm and a
cosine, within 2 ulp. Dropout, which belongs to no sample, stays with torch's own generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import pi
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

STREAM = "philox4x32-10"
"""What a checkpoint or a manifest says of where its random numbers come from."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
# Blocks that are worked on at once: what they need stays in a CPU's second cache.
_TOGETHER = 1 << 14

# int64, with 32 bits in each number
Words = TypeVar("Words", npt.NDArray[np.int64], "Tensor")


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 random bits for each counter of four words, under a key of two.

    Words are int64 arrays or tensors that broadcast to one shape, each number in [0, 2^32).
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        # products wrap at 64 bits, both halves are right; b and d carry the upper one until they are used
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = ((q >> 32) ^ b ^ k) & _LOW, ((p >> 32) ^ d ^ m) & _LOW
        b, d = q, p
        k, m = (k + _WEYL[0]) & _LOW, (m + _WEYL[1]) & _LOW
    return a, b & _LOW, c, d & _LOW


@dataclass(frozen=True)
class Stream:
    """The random numbers for one purpose at one update; each id has its own.

    purpose: at most 16 bytes; seed: any integer; update: 0 to 2^32 − 1 (of a sampler, its draw). ids: int64
    tensor (B,), on whose device the numbers are made. What an id has at a place does not depend on how many
    are drawn.
    """

    purpose: str
    seed: int = 0
    update: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """64 bits of BLAKE2b of seed and purpose."""
        digest = blake2b(str(self.seed).encode(), digest_size=8, person=self.purpose.encode())
        number = int.from_bytes(digest.digest(), "little")
        return number & _LOW, number >> 32

    def words(self, ids: Words, first: Words) -> tuple[Words, Words, Words, Words]:
        """Four words for each id (B, 1) and number of a block (1, N) or (N,): (B, N) each."""
        if not 0 <= self.update <= _LOW:
            raise ValueError(f"update {self.update} has more than 32 bits")
        # all ids under one key: two samples never share a block
        update = first * 0 + self.update
        return philox((first, update, ids & _LOW, (ids >> 32) & _LOW), self.key)

    def bits(self, ids: "Tensor", count: int) -> "Tensor":
        """int64 (B, count), 32 random bits in each number."""
        import torch

        words = self.words(ids[:, None], torch.arange(-(-count // 4), device=ids.device))
        return torch.stack(words, 2).flatten(1)[:, :count]

    def uniforms(self, ids: "Tensor", count: int) -> "Tensor":
        """float32 (B, count) in [0, 1), of 24 bits."""
        return (self.bits(ids, count) >> 8).float() * 2.0**-24

    def integers(self, ids: "Tensor", high: int) -> "Tensor":
        """int64 (B,) in [0, high), high at most 2^31: the integer part of high · bits / 2^32."""
        return (self.bits(ids, 1)[:, 0] * high) >> 32

    def normals(self, ids: "Tensor", shape: Sequence[int]) -> "Tensor":
        """float32 (B, *shape), standard normal.

        By Box and Muller (1958) in float64: of two words one radius and both its coordinates.
        """
        import torch

        count = int(np.prod(shape))
        blocks = -(-count // 4)
        rows = max(1, _TOGETHER // max(1, blocks)) if ids.device.type == "cpu" else len(ids)
        first = torch.arange(blocks, device=ids.device)
        parts = [
            _box_muller(self.words(part[:, None], first)).flatten(1)[:, :count]
            for part in ids.split(max(1, rows))
        ]
        return torch.cat(parts).reshape(len(ids), *shape)


def _box_muller(words: Any) -> "Tensor":
    """Four words (B, N) → float32 (B, 4, N), standard normal."""
    import torch

    a, b, c, d = words
    # in the middle of each of 2^32 steps: never 0, whose logarithm is none
    u, angle = ((torch.stack(pair, 1).double() + 0.5) * 2.0**-32 for pair in ((a, c), (b, d)))
    radius = u.log_().mul_(-2).sqrt_()
    angle *= 2 * pi
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1).float()


# --- lines of text --------------------------------------------------------------------------------


def line_seed(seed: int, line: int, round: int, rank: int = 0) -> int:
    """64 bits for a line of a corpus: BLAKE2b of (seed, line, round, rank).

    rank: which of several outputs of the line.
    """
    text = f"{seed} {line} {round} {rank}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def generator(seed: int) -> np.random.Generator:
    """NumPy's generator of a line's seed, for what is more than uniform numbers."""
    return np.random.Generator(np.random.Philox(key=seed))


def uniforms(
    seeds: Sequence[int], steps: int, stream: str | None = STREAM
) -> npt.NDArray[np.float64]:
    """float64 (B, steps) in [0, 1): row b depends on `seeds[b]` only, its beginning not on `steps`.

    seeds: of `line_seed`; stream: None for what versions without `STREAM` in their manifests drew.
    """
    if stream is None:
        return np.stack([generator(seed).random(steps) for seed in seeds])
    ids = np.array(seeds, dtype=np.uint64).astype(np.int64)[:, None]
    a, b, c, d = Stream("line").words(ids, np.arange(-(-steps // 2)))
    bits = np.stack([(a >> 5 << 26) + (b >> 6), (c >> 5 << 26) + (d >> 6)], 2)
    return bits.reshape(len(ids), -1)[:, :steps] * 2.0**-53
