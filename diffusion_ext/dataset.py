"""The dataset that fairseq trains on and validates with, over decoded `Images`."""

from typing import Dict, Sequence

import numpy as np
import torch
from fairseq.data import FairseqDataset

from diffusion_ext.store import Images


class ImageDataset(FairseqDataset):
    """Images of the given rows, each as it is stored; noise and augmentation belong to the update.

    shuffle=False: the rows in their order, once. shuffle=True: an epoch is a stream of random
    passes over all rows, one behind the other; position i of it depends on (seed, epoch, i) alone,
    not on workers, processes or batches. fairseq's `sizes` and tokens count images: 1 each.
    """

    def __init__(self, images: Images, rows: np.ndarray, seed: int = 0, shuffle: bool = False):
        self.images, self.rows = images, np.asarray(rows, dtype=np.int64)
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.length = 1, len(self.rows)
        self._draw()

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        # images of the next epoch are other images: batches must not be kept
        return not self.shuffle

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self._draw()

    def set_epoch_size(self, minimum: int, multiple: int) -> None:
        """Images an epoch: one pass over all rows or `minimum`, rounded up to a `multiple`.

        Raises ValueError for a dataset that is not shuffled, whose size is that of its rows.
        """
        if not self.shuffle:
            raise ValueError("the size of a dataset in order is that of its rows")
        length = max(len(self.rows), minimum)
        self.length = -(-length // multiple) * multiple
        self._draw()

    def _draw(self) -> None:
        self.stream = self.rows
        if self.shuffle and len(self.rows):
            passes = -(-self.length // len(self.rows))
            rngs = (np.random.default_rng((self.seed, self.epoch, k)) for k in range(passes))
            stream = np.concatenate([rng.permutation(self.rows) for rng in rngs])
            self.stream = stream[: self.length]
        self.sizes = np.ones(len(self.stream), dtype=np.int64)

    def __getitem__(self, index: int) -> Dict:
        row = int(self.stream[index])
        return {
            "id": int(index),
            "row": row,
            "image": torch.from_numpy(np.array(self.images.pixels[row])),
            "label": int(self.images.labels[row]),
        }

    def __len__(self) -> int:
        return len(self.stream)

    def collater(self, samples: Sequence[Dict]) -> Dict:
        return collate(samples)

    def size(self, index: int) -> int:
        return 1

    num_tokens = size

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices]

    def ordered_indices(self) -> np.ndarray:
        """Positions of the stream; it is shuffled already."""
        return np.arange(len(self), dtype=np.int64)


def collate(samples: Sequence[Dict]) -> Dict:
    """Samples → a batch; {} for none (what fairseq fills uneven shards with).

    id: int64 (B,), position in the epoch; row: int64 (B,), which image; image: uint8
    (B, C, H, W); label: int64 (B,), -1 without; nsentences and ntokens: B.
    """
    if not samples:
        return {}
    batch: Dict = {
        key: torch.tensor([s[key] for s in samples], dtype=torch.int64)
        for key in ("id", "row", "label")
    }
    batch["image"] = torch.stack([s["image"] for s in samples])
    return {**batch, "nsentences": len(samples), "ntokens": len(samples)}
