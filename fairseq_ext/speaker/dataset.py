"""Datasets over a prepared `Corpus`: random crops for training, whole utterances for everything else."""

from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_ext.speaker.augment import Context, change_speed
from fairseq_ext.speaker.balance import allocate, balanced
from fairseq_ext.speaker.batching import batches_by_frames, pad  # noqa: F401 (public here of old)
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.network import SPEEDS


class SpeakerDataset(FairseqDataset):
    """What fairseq asks of both: `sizes` int64 (len,) are frames."""

    sizes: np.ndarray

    def collater(self, samples: Sequence[Dict]) -> Dict:
        return collate(samples)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]


class UtteranceDataset(SpeakerDataset):
    """Whole utterances of one split, batched by length under a limit of padded frames."""

    def __init__(self, corpus: Corpus, rows: np.ndarray):
        self.corpus, self.rows = corpus, rows
        self.sizes = corpus.lengths[rows]
        _, speaker, counts = np.unique(corpus.labels[rows], return_inverse=True, return_counts=True)
        # with these every speaker weighs the same, however many utterances there are of each
        self.weights = 1 / counts[speaker]

    def __getitem__(self, index: int) -> Dict:
        row = int(self.rows[index])
        return {
            "id": index,
            "source": torch.from_numpy(self.corpus.read(row)),
            "target": int(self.corpus.labels[row]),
            "weight": float(self.weights[index]),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes, kind="stable")


class CropDataset(SpeakerDataset):
    """Random crops of `crop_frames` frames, drawn anew every epoch in proportion to length.

    An epoch has `len(self)` crops; utterance i gets about its share of the frames, and at least one. What a
    crop holds depends on (seed, epoch, index) alone: not on workers, processes or batches. An utterance
    shorter than a crop is taken whole. `balance` < 1 gives speakers with little speech more
    (`balance.balanced`). `speed` > 0 plays each crop at 1 ± speed times its speed; with `speed_classes`, the
    number of speakers, at one of three of which each has labels of its own (`network.SPEEDS`). `steps` are
    augmentations (see `augment`).
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: np.ndarray,
        crop_frames: int,
        seed: int,
        speed: float = 0.0,
        steps: Sequence[Callable] = (),
        context: Optional[Context] = None,
        balance: float = 1.0,
        speed_classes: int = 0,
    ):
        self.corpus, self.rows, self.crop_frames = corpus, rows, crop_frames
        self.seed, self.speed, self.steps, self.context = seed, speed, steps, context
        self.balance, self.speed_classes = balance, speed_classes
        self.epoch = 1
        self.set_epoch_size(0, 1)

    def set_epoch_size(self, at_least: int, multiple_of: int) -> None:
        """Crops an epoch: enough to cover every frame once, `at_least`, and a multiple of `multiple_of`."""
        lengths = self.corpus.lengths[self.rows]
        crops = max(int(np.ceil(lengths / self.crop_frames).sum()), at_least)
        self.crops = -(-crops // multiple_of) * multiple_of
        self._draw_places()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._draw_places()

    def _draw_places(self) -> None:
        lengths = self.corpus.lengths[self.rows]
        if self.balance == 1:
            self.utterance = np.repeat(np.arange(len(lengths)), allocate(lengths, self.crops))
        else:
            labels = self.corpus.labels[self.rows]
            turn = self.epoch - 1
            self.utterance = balanced(lengths, labels, self.crops, self.balance, turn)
        self.sizes = np.minimum(lengths, self.crop_frames)[self.utterance]
        # one generator an epoch: one a crop takes longer than reading the crop
        rng = np.random.default_rng((self.seed, self.epoch, 0, 1))
        self.places = rng.random(len(self.utterance))

    # crops of the next epoch are other crops: batches must not be kept
    can_reuse_epoch_itr_across_epochs = False

    def __getitem__(self, index: int) -> Dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> List[Dict]:
        """What a loader asks for: the crops of a batch, read together."""
        rows = self.rows[self.utterance[indices]]
        lengths, turns = self.corpus.lengths[rows], np.zeros(len(rows), dtype=np.int64)
        factors, rngs = np.ones(len(rows)), []
        if self.speed or self.steps:
            rngs = [np.random.default_rng((self.seed, self.epoch, index)) for index in indices]
        if self.speed_classes:
            turns = np.array([rng.integers(len(SPEEDS)) for rng in rngs])
            factors = 1 + np.array(SPEEDS)[turns] * self.speed
        elif self.speed:
            factors = np.array([rng.uniform(1 - self.speed, 1 + self.speed) for rng in rngs])
        frames = np.clip((lengths / factors).astype(np.int64), 1, self.crop_frames)
        needed = np.minimum(lengths, np.ceil((frames - 1) * factors).astype(np.int64) + 1)
        starts = (self.places[indices] * (lengths - needed + 1)).astype(np.int64)
        crops = self.corpus.read_together(rows, starts, needed)
        if self.speed:
            for n in np.flatnonzero(factors != 1):
                speed = float(factors[n]), int(frames[n]), self.context.frequencies
                crops[n] = change_speed(crops[n], *speed)
        for step in self.steps:
            crops = [step(x, rng, self.context) for x, rng in zip(crops, rngs, strict=True)]
        if self.speed or self.steps:
            crops = [np.ascontiguousarray(x, dtype=np.float32) for x in crops]
        labels = (self.corpus.labels[rows] + turns * self.speed_classes).tolist()
        return [
            {"id": index, "source": torch.from_numpy(x), "target": label}
            for index, x, label in zip(indices, crops, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.utterance)

    def ordered_indices(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self))


def collate(samples: Sequence[Dict]) -> Dict:
    """Samples → a batch as fairseq wants it; {} for none (what fairseq fills uneven shards with).

    `weight` (B,), where the samples have one, weighs the speakers alike.
    `net_input` holds source (B, T, n_mels) and padding_mask (B, T), True = pad, or None without padding.
    """
    if not samples:
        return {}
    source, padding_mask = pad([s["source"] for s in samples])
    weighed = [s["weight"] for s in samples if "weight" in s]
    return {
        **({"weight": torch.tensor(weighed)} if weighed else {}),
        "id": torch.tensor([s["id"] for s in samples]),
        "nsentences": len(samples),
        "ntokens": sum(s["source"].shape[0] for s in samples),
        "net_input": {"source": source, "padding_mask": padding_mask},
        "target": torch.tensor([s["target"] for s in samples]),
    }
