"""Does an exported file compute what the model does? Asked before it is written."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fairseq_ext.speaker.export.exported import ExportedNetwork
from fairseq_ext.speaker.export.graph import Scorer
from fairseq_ext.speaker.features import FeatureSpec, log_mel

BATCHES = (1, 2, 5)
FRAMES = (1, 2, 15, 16, 101, 3000)
TOLERANCE = 1e-4
# of the accuracy that int8 may lose
LOSS = 0.005


class Difference(NamedTuple):
    """The largest difference of an embedding's or score's element, and the smallest cosine of embeddings."""

    largest: float
    cosine: float


def difference(scorer: Scorer, theirs: ExportedNetwork) -> Difference:
    """Of the file from the network, for batches of utterances of one length and of several.

    The network has each utterance alone, in float32; the file has the batch. Features are drawn around the
    mean of the training data, or samples where the file takes these.
    """
    rng = np.random.default_rng(1)
    cases = waveforms if theirs.inside else features
    largest, cosine = 0.0, 1.0
    for n in FRAMES:
        rows = max(BATCHES)
        alike, unlike = [n] * rows, np.linspace(1, n, rows).astype(int).tolist()
        for lengths in (alike, unlike[::-1]):
            given, made = zip(*cases(lengths, theirs.spec, scorer.network, rng), strict=True)
            ours = [alone(scorer, one) for one in made]
            for batch in BATCHES:
                found = theirs(given[:batch])
                for row, expected in enumerate(ours[:batch]):
                    for key, value in expected.items():
                        gap = np.abs(found[key][row] - value).max()
                        # NaN is no agreement
                        largest = max(largest, float(gap) if np.isfinite(gap) else np.inf)
                    cosine = min(cosine, cosine_of(found["embedding"][row], expected["embedding"]))
    return Difference(largest, cosine)


def features(
    lengths: Sequence[int], spec: FeatureSpec, network: nn.Module, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the file takes and what the network takes, for utterances of these lengths in frames."""
    own = getattr(network, "network", network)
    mean = np.asarray(getattr(own, "feature_mean", np.zeros(spec.n_mels)))
    std = np.asarray(getattr(own, "feature_std", np.ones(spec.n_mels)))
    for length in lengths:
        drawn = rng.standard_normal((length, spec.n_mels)) * std + mean
        yield drawn.astype(np.float32), drawn.astype(np.float32)


def waveforms(
    lengths: Sequence[int], spec: FeatureSpec, network: nn.Module, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same for a file that takes samples: noise of a loudness that changes, and a tone in it."""
    plain = FeatureSpec.from_dict({**spec.to_dict(), "loudness_db": None, "trim_silence": False})
    for length in lengths:
        n = (length - 1) * spec.hop_length + int(rng.integers(1, spec.hop_length))
        t = np.arange(n) / spec.sample_rate
        loudness = 10 ** (-2 + 1.5 * np.sin(2 * np.pi * 3 * t))
        samples = loudness * (rng.standard_normal(n) / 3 + np.sin(2 * np.pi * 220 * t))
        samples = samples.astype(np.float32)
        yield samples, log_mel(samples, plain)


@torch.inference_mode()
def alone(scorer: Scorer, made: np.ndarray) -> dict[str, np.ndarray]:
    """Embedding (D,) and scores (C,) of one utterance by the network, without padding."""
    found = scorer.network(torch.from_numpy(made)[None], None)
    scores = found["logits"].float()
    scores = scores.log_softmax(1) if scorer.log_probability else scores
    return {"embedding": found["embedding"][0].float().numpy(), "scores": scores[0].numpy()}


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
