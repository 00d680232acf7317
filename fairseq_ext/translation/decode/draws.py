"""Ids drawn from logits at given uniform numbers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Ids looked at first where they shall sum to a probability.
_FEW = 256


def draw(
    logits: "torch.Tensor",
    u: "torch.Tensor",
    topk: int = 0,
    topp: float = 1.0,
    temperature: float = 1.0,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """One id for each row of `logits` (B, V), by inverting the distribution function at `u` (B,).

    topk: only the k most probable ids, 0 for all (Fan et al. 2018, section 4.3). topp: only the fewest ids
    whose probabilities sum to p or more (Holtzman et al. 2020, equation 2). temperature divides the logits
    before either. Ids are in order of probability, equal ones in that of their number, when only some count.

    Returns ids int64 (B,) and their log-probabilities float32 (B,) over all ids at temperature 1. All is
    computed in float64: a draw changes only where u falls within rounding of an edge.
    """
    import torch

    logits = logits.double()
    whole = torch.log_softmax(logits, dim=-1)
    scaled = whole if temperature == 1 else torch.log_softmax(logits / temperature, dim=-1)
    probabilities, ids = scaled.exp(), None
    size = logits.shape[-1]
    if 0 < topk < size:
        probabilities, ids = most_probable(probabilities, topk)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if topp < 1:
        if ids is None:
            # nearly always a few ids sum to p, and sorting all of them takes most of the time
            probabilities, ids = most_probable(probabilities, min(size, _FEW))
            if ids.shape[-1] < size and (probabilities.sum(dim=-1) < topp).any():
                probabilities, ids = most_probable(scaled.exp(), size)
        # an id counts where those before it do not yet sum to p; the first always does
        kept = probabilities.cumsum(dim=-1) - probabilities < topp
        kept[:, 0] = True
        probabilities = probabilities * kept
    sums = probabilities.cumsum(dim=-1)
    total = sums[:, -1:]
    target = u.to(sums.device, torch.float64).unsqueeze(1) * total
    # u · total can round up to the total, which no sum exceeds
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, target, right=True)
    found = (place if ids is None else ids.gather(1, place)).squeeze(1)
    return found, whole.gather(1, found.unsqueeze(1)).squeeze(1).float()


def most_probable(probabilities: "torch.Tensor", k: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The k largest of each row and their places, the largest first, equal ones by place."""
    values, places = probabilities.topk(k, dim=-1)
    places, order = places.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(1, order)
