"""Randomness that belongs to a line: what is drawn for it does not depend on what is decoded with it."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def line_seed(seed: int, line: int, round: int, rank: int = 0) -> int:
    """64 bits for a line of a corpus: BLAKE2b of (seed, line, round, rank).

    rank: which of several outputs of the line.
    """
    text = f"{seed} {line} {round} {rank}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def generator(seed: int) -> np.random.Generator:
    """The generator of a line's seed (Philox, which is counted and not stepped)."""
    return np.random.Generator(np.random.Philox(key=seed))


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """float64 (B, steps) in [0, 1): row b depends on ``seeds[b]`` only, its beginning not on ``steps``."""
    return np.stack([generator(seed).random(steps) for seed in seeds])


def draw(
    logits: "torch.Tensor",
    u: "torch.Tensor",
    topk: int = 0,
    topp: float = 1.0,
    temperature: float = 1.0,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """One id for each row of ``logits`` (B, V), by inverting the distribution function at ``u`` (B,).

    topk: only the k most probable ids, 0 for all (Fan et al. 2018, section 4.3). topp: only the fewest ids
    whose probabilities sum to p or more (Holtzman et al. 2020, equation 2). temperature divides the logits
    before either. Ids are in order of probability, equal ones in that of their number, when only some count.

    Returns ids int64 (B,) and their log-probabilities float32 (B,) over all ids at temperature 1. All is
    computed in float64: a draw changes only where u falls within rounding of an edge.
    """
    import torch

    logits = logits.double()
    whole = torch.log_softmax(logits, dim=-1)
    scaled = torch.log_softmax(logits / temperature, dim=-1)
    size = logits.shape[-1]
    ids = None
    if 0 < topk < size or topp < 1:
        scaled, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
        if 0 < topk < size:
            scaled, ids = scaled[:, :topk], ids[:, :topk]
            scaled = torch.log_softmax(scaled, dim=-1)
    probabilities = scaled.exp()
    sums = probabilities.cumsum(dim=-1)
    if topp < 1:
        # an id counts where those before it do not yet sum to p; the first always does
        before = sums - probabilities
        kept = before < topp
        kept[:, 0] = True
        probabilities = probabilities * kept
        sums = probabilities.cumsum(dim=-1)
    target = u.to(sums.device, torch.float64).unsqueeze(1) * sums[:, -1:]
    place = torch.searchsorted(sums, target, right=True)
    # u · total can round up to the total, and impossible ids at the end have sums equal to it
    last = (probabilities > 0).long().mul(torch.arange(1, sums.shape[1] + 1, device=sums.device))
    place = torch.minimum(place, last.max(dim=1, keepdim=True).values - 1)
    found = (place if ids is None else ids.gather(1, place)).squeeze(1)
    return found, whole.gather(1, found.unsqueeze(1)).squeeze(1).float()
