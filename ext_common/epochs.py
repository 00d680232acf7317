"""How a task's batches become an epoch, without fairseq's traps.

fairseq's own keeps its loading workers from epoch to epoch, which then see the first one for ever, and drops
what is left over of a multiple of 8.
"""

from collections.abc import Sequence
from typing import Any

from fairseq.data import iterators


def epoch_of(dataset: Any, batches: Sequence, data_buffer_size: int, **options: Any):
    """The iterator over ``batches`` (lists of indices) that a task's `get_batch_iterator` returns.

    options: seed, num_shards, shard_id, num_workers, epoch, … of `EpochBatchIterator`.
    """
    return iterators.EpochBatchIterator(
        dataset=dataset,
        collate_fn=dataset.collater,
        batch_sampler=batches,
        buffer_size=data_buffer_size,
        reuse_dataloader=False,
        persistent_workers=False,
        **options,
    )


def full_batches(dataset: Any, size: int, shards: int, freq: int, epoch: int, updates: int) -> list:
    """Batches of ``size`` of a dataset whose epochs are streams: every update is full.

    shards: processes; freq: batches an update; updates: an epoch has at least so many. All processes and
    accumulation steps together see the same samples in an update however many they are.
    """
    per_update = size * shards * freq
    dataset.set_epoch(epoch)
    dataset.set_epoch_size(per_update * updates, per_update)
    return in_order(dataset, size)


def in_order(dataset: Any, size: int) -> list:
    """Batches of ``size`` in the dataset's own order."""
    order = dataset.ordered_indices()
    return [order[i : i + size].tolist() for i in range(0, len(order), size)]


def update_freq(values: Sequence[int] | None, epoch: int) -> int:
    """`--update-freq` of an epoch: the last of the values is that of all later ones."""
    values = list(values or [1])
    return values[min(epoch, len(values)) - 1]
