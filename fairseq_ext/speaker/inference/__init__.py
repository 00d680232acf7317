"""A trained speaker model outside of training: from a checkpoint file to scores and embeddings.

    model = SpeakerModel.from_checkpoint("CKPT/checkpoint_best.pt")
    model.identify("x.wav").speaker

Needs the checkpoint and nothing else: no data folder, no environment variable, any working folder.
Prediction changes nothing in the model, and what comes out for an utterance does not depend on what
is predicted with it. torch is imported when first used, fairseq for networks of other archs and plugins only.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ext_common.checkpoints import build_network, read_state, usable_device, why_unfit
from ext_common.cli import UserError
from fairseq_ext.speaker.audio.recording import to_mono
from fairseq_ext.speaker.audio.waveform import Waveform
from fairseq_ext.speaker.batching import CHUNK_FRAMES, batches_by_frames, pad, windows
from fairseq_ext.speaker.export.exported import ExportedNetwork, exported_in
from fairseq_ext.speaker.features import (
    FeatureSpec,
    LongFeatures,
    Recording,
    listen,
    samples_features,
)
from fairseq_ext.speaker.metrics import softmax

# Padded frames in one batch, as the task's max_valid_frames.
MAX_FRAMES = 4000
# Features that are held at a time to be batched by length, in batches.
WINDOW = 10
PARTS = tuple(f"fairseq_ext.speaker.{name}" for name in ("criterion", "model", "task"))


class Match(NamedTuple):
    """A speaker and the score: a cosine, or a log-probability for a model with a linear head."""

    speaker: str
    score: float


@dataclass(frozen=True)
class Identification:
    """Who speaks in one recording: the `top_k` speakers that score best, best first.

    probabilities: of each of them, see `SpeakerModel.probabilities`.
    """

    candidates: tuple[Match, ...]
    probabilities: tuple[float, ...] | None = None

    @property
    def speaker(self) -> str:
        return self.candidates[0].speaker

    @property
    def score(self) -> float:
        return self.candidates[0].score


class SpeakerModel:
    """A trained network with the names of its speakers and the specification of its features.

    An utterance is an audio file, by path or open; samples with their rate in Hz, (samples, rate), float (n,)
    or (n, channels); or features (T, n_mels), float, made with `spec`.
    """

    def __init__(
        self,
        network,
        speakers: Sequence[str],
        spec: FeatureSpec,
        device: str = "cpu",
        scale: float | None = None,
    ):
        self.network = network.to(device).eval()
        self.speakers = list(speakers)
        self.spec = spec
        self.device = device
        self.scale = scale

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: str = "cpu", user_dir: str | None = None
    ) -> "SpeakerModel":
        """The model in a checkpoint of fairseq-train or a file of `speaker.export`.

        user_dir: folder of the plugin with its parts, in place of the one it was trained with. UserError, in
        one sentence, where it fails.
        """
        exported = exported_in(path)
        if exported is not None:
            if device not in ("auto", "cpu"):
                raise UserError(f"{path} runs on the CPU: leave --device out, or give a checkpoint")
            return ExportedModel(exported)
        state = read_checkpoint(path)
        task_state = state["task_state"]
        try:
            spec = FeatureSpec.from_dict(task_state["spec"])
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {error}") from error
        from fairseq_ext.speaker.network import network_of

        network = build_network(state, path, PARTS, user_dir, network_of)
        scale = task_state.get("scale")
        return cls(network, task_state["speakers"], spec, usable_device(device), scale)

    @property
    def score_kind(self) -> str:
        """What scores are: "cosine" or "log-probability"."""
        head = getattr(getattr(self.network, "network", self.network), "head", None)
        return "cosine" if getattr(head, "kind", None) == "cosine" else "log-probability"

    @property
    def backend(self) -> io.BytesIO | None:
        """The file of a backend of `verify` that came with the model."""
        return None

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of weights and feature specification: what embeddings may be compared by."""
        digest = hashlib.sha256(json.dumps(self.spec.to_dict(), sort_keys=True).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def scores(self, utterances, batch_size: int | None = None, max_frames: int = MAX_FRAMES):
        """float32 (N, number of speakers): cosines in [-1, 1] or log-probabilities; (C,) for one."""
        return self._collect(utterances, "scores", len(self.speakers), batch_size, max_frames)

    def embed(self, utterances, batch_size: int | None = None, max_frames: int = MAX_FRAMES):
        """Speaker embeddings float32 (N, D), not scaled to a length: compare them by cosine.

        (D,) for one utterance: `model.embed("x.wav")`.
        """
        return self._collect(utterances, "embedding", None, batch_size, max_frames)

    def frame_weights(self, utterance) -> np.ndarray | None:
        """How much each frame of one utterance counts, by the attention of the pooling: float32 (T,), sum 1.

        None where the pooling weighs all frames alike, or the network does not say (an exported one).
        """
        import torch

        from fairseq_ext.speaker.inference.chunks import frame_weights

        features = torch.from_numpy(self._features(utterance))
        with torch.inference_mode():
            found = frame_weights(self.network, features, device=self.device)
        return None if found is None else found.numpy()

    def identify(self, utterances, top_k: int = 1):
        """An `Identification` for one utterance, a list of them for several.

        top_k: number of candidates in each, at most the number of speakers.
        """
        if not 1 <= top_k:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if is_one(utterances):
            return self.identify([utterances], top_k)[0]
        scores = self.scores(utterances)
        shares = self.probabilities(scores)
        return [
            Identification(
                tuple(Match(self.speakers[c], float(row[c])) for c in best),
                None if shares is None else tuple(map(float, shares[i, best])),
            )
            for i, (row, best) in enumerate(zip(scores, rank(scores, top_k), strict=True))
        ]

    def probabilities(self, scores: np.ndarray) -> np.ndarray | None:
        """How probable each speaker is, where one of them speaks: float64 (N, C) of `scores` (N, C).

        softmax(a · scores), with the a that was likeliest on the recordings of the last validation
        (`metrics.likeliest_scale`); None for a model that was saved before there was one.
        """
        if self.scale is None:
            return None
        return softmax(self.scale * np.asarray(scores, dtype=np.float64))

    def predict(
        self,
        utterances: Iterable,
        batch_size: int | None = None,
        max_frames: int = MAX_FRAMES,
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Batches as (positions in `utterances`, {"embedding": (B, D), "scores": (B, C)} float32).

        Every position comes once; not in order, because utterances of like length share a batch.
        At most `max_frames` padded frames and `batch_size` utterances in one, and features of a few
        batches in memory, however long `utterances` is.
        """
        window: list[tuple[int, np.ndarray]] = []
        frames = 0
        for position, utterance in enumerate(utterances):
            made = isinstance(utterance, LongFeatures | Waveform)
            features = utterance if made else self._features(utterance)
            window.append((position, features))
            frames += self._frames(features)
            if frames >= WINDOW * max_frames:
                yield from self._predict_window(window, batch_size, max_frames)
                window, frames = [], 0
        yield from self._predict_window(window, batch_size, max_frames)

    def _predict_window(self, window, batch_size, max_frames):
        sizes = np.array([self._frames(features) for _, features in window], dtype=np.int64)
        whole = np.flatnonzero(sizes <= CHUNK_FRAMES)
        batches = [
            whole[batch] for batch in batches_by_frames(sizes[whole], max_frames, batch_size)
        ]
        for batch in [*batches, *np.flatnonzero(sizes > CHUNK_FRAMES)[:, None]]:
            yield [window[i][0] for i in batch], self._run([window[i][1] for i in batch])

    def _run(self, batch: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Embeddings (B, D) and scores (B, C), float32, of utterances side by side; a long one is alone."""
        import torch

        from fairseq_ext.speaker.inference.chunks import forward_long

        with torch.inference_mode():
            if len(batch[0]) > CHUNK_FRAMES:
                out = forward_long(self.network, batch[0], device=self.device)
            else:
                source, mask = pad([torch.as_tensor(features[:]) for features in batch])
                mask = None if mask is None else mask.to(self.device)
                out = self.network(source.to(self.device), mask)
            scores = out["logits"].float()
            if self.score_kind == "log-probability":
                scores = scores.log_softmax(1)
        return {"embedding": out["embedding"].float().cpu().numpy(), "scores": scores.cpu().numpy()}

    def _frames(self, features: np.ndarray) -> int:
        return len(features)

    def _features(self, utterance) -> np.ndarray:
        if isinstance(utterance, str | os.PathLike) or hasattr(utterance, "read"):
            return listen(Recording(utterance, self.spec.channel), self.spec).features
        if isinstance(utterance, tuple):
            samples = np.array(utterance[0], dtype=np.float32)
            mono, _ = to_mono(samples[:, None] if samples.ndim == 1 else samples, self.spec.channel)
            if not len(mono) or not np.isfinite(mono).all():
                raise ValueError(
                    "samples are float (n,) or (n, channels), at least one, and finite"
                )
            return samples_features(np.ascontiguousarray(mono), utterance[1], self.spec)
        features = np.array(utterance, dtype=np.float32)
        if features.ndim != 2 or features.shape[1] != self.spec.n_mels or not len(features):
            raise ValueError(
                f"an utterance is an audio file, (samples, rate), or features (T, {self.spec.n_mels}), got"
                f" {features.shape}"
            )
        return features

    def _collect(self, utterances, key, width, batch_size, max_frames) -> np.ndarray:
        if is_one(utterances):
            return self._collect([utterances], key, width, batch_size, max_frames)[0]
        rows: dict[int, np.ndarray] = {}
        for positions, found in self.predict(utterances, batch_size, max_frames):
            rows.update(zip(positions, found[key], strict=True))
        if not rows:
            return np.zeros((0, width or 0), dtype=np.float32)
        return np.stack([rows[position] for position in range(len(rows))])


class ExportedModel(SpeakerModel):
    """The model in a file of `speaker.export`; torch is not needed.

    Where the file makes the features itself, an utterance is a path or samples (n,) at `spec.sample_rate`.
    """

    def __init__(self, network: ExportedNetwork):
        self.network, self.spec, self.device = network, network.spec, "cpu"
        self.scale = network.description.scale
        self.speakers = list(network.description.speakers)

    @property
    def score_kind(self) -> str:
        return self.network.description.score_kind

    @property
    def sha256(self) -> str:
        return self.network.description.model_sha256

    @property
    def backend(self) -> io.BytesIO | None:
        return self.network.backend

    def frame_weights(self, utterance) -> None:
        return None

    def _run(self, batch: list[np.ndarray]) -> dict[str, np.ndarray]:
        if self._frames(batch[0]) <= CHUNK_FRAMES:
            return self.network([one[:] for one in batch])
        # a graph does not say what it pools: embeddings and scores of windows, averaged by length
        parts = windows(self._frames(batch[0]))
        size = self.spec.hop_length if self.network.inside else 1
        found = [self.network([batch[0][p.start * size : p.end * size]]) for p in parts]
        weights = [p.last - p.first for p in parts]
        return {
            key: np.average([one[key] for one in found], axis=0, weights=weights).astype(np.float32)
            for key in found[0]
        }

    def _frames(self, features: np.ndarray) -> int:
        return self.network.frames(features)

    def _features(self, utterance) -> np.ndarray:
        if is_one(utterance) and getattr(utterance, "ndim", 0) != 2 or not self.network.inside:
            return super()._features(utterance)
        return self.network.samples(np.array(utterance, dtype=np.float32))


def is_one(utterances: Any) -> bool:
    """Whether this is one utterance (see `SpeakerModel`) and no sequence of them."""
    if isinstance(utterances, tuple):
        return len(utterances) == 2 and isinstance(utterances[1], int | np.integer)
    file = isinstance(utterances, str | os.PathLike) or hasattr(utterances, "read")
    return file or getattr(utterances, "ndim", 0) == 2


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """What `torch.save` wrote, as plain dicts and tensors on the CPU.

    Nothing the file holds is run (weights_only). UserError where it is missing, damaged, or of
    anything but a speaker model.
    """
    state = read_state(path)
    why = why_no_speaker_model(state)
    if why:
        raise UserError(f"{path} {why}: give a checkpoint trained with --task speaker_id")
    return state


def why_no_speaker_model(state: Any) -> str | None:
    """The second half of a sentence about a checkpoint's content; None for a speaker model."""
    return why_unfit(
        state, lambda saved: {"speakers", "spec"} <= set(saved), "speaker identification"
    )


def rank(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 (N, min(k, C)): the columns of the `k` best scores, best first; ties by column."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
