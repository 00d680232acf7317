"""How a task's batches become an epoch, without fairseq's traps.

fairseq's own keeps its loading workers from epoch to epoch, which then see the first one for ever, and drops
what is left over of a multiple of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fairseq.data import iterators


@dataclass(frozen=True)
class Wanted:
    """What fairseq asks of a task for an epoch; None is no limit.

    max_tokens, max_sentences: of a batch; max_positions: of a sample, where `ignore_invalid_inputs` allows
    to leave out what is longer; num_shards: processes.
    """

    max_tokens: int | None = None
    max_sentences: int | None = None
    max_positions: Any = None
    ignore_invalid_inputs: bool = False
    seed: int = 1
    num_shards: int = 1
    epoch: int = 1


class OwnBatches:
    """For a task that says what its batches are: `batches_of`; how they become an epoch is said here."""

    cfg: Any  # of the task
    passed_on: ClassVar[tuple[str, ...]] = ()  # of fairseq's options for the order of batches

    def batches_of(self, dataset: Any, wanted: Wanted) -> Sequence[Any]:
        """Lists of indices, those of all processes, in an order that fairseq shuffles for training."""
        raise NotImplementedError

    def get_batch_iterator(
        self,
        dataset: Any,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        data_buffer_size: int = 0,
        **more: Any,
    ) -> Any:
        """fairseq's, without its traps: nothing is dropped to round a batch to a multiple of 8, batches are
        those of the epoch after a resume too, and workers see the epoch they work for."""
        wanted = Wanted(
            max_tokens, max_sentences, max_positions, ignore_invalid_inputs, seed, num_shards, epoch
        )
        return epoch_of(
            dataset,
            self.batches_of(dataset, wanted),
            data_buffer_size,
            seed=seed,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            epoch=epoch,
            **{name: more[name] for name in self.passed_on if name in more},
        )

    def full_updates(self, dataset: Any, size: int, wanted: Wanted) -> list[Any]:
        """`full_batches` of `size`, with `--update-freq` and `--epoch-updates` of this task."""
        freq = update_freq(self.cfg.update_freq, wanted.epoch)
        return full_batches(
            dataset, size, wanted.num_shards, freq, wanted.epoch, self.cfg.epoch_updates
        )


def epoch_of(dataset: Any, batches: Sequence[Any], data_buffer_size: int, **options: Any) -> Any:
    """The iterator over `batches` (lists of indices) that a task's `get_batch_iterator` returns.

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


def full_batches(
    dataset: Any, size: int, shards: int, freq: int, epoch: int, updates: int
) -> list[Any]:
    """Batches of `size` of a dataset whose epochs are streams: every update is full.

    shards: processes; freq: batches an update; updates: an epoch has at least so many. All processes and
    accumulation steps together see the same samples in an update however many they are.
    """
    per_update = size * shards * freq
    dataset.set_epoch(epoch)
    dataset.set_epoch_size(per_update * updates, per_update)
    return in_order(dataset, size)


def in_order(dataset: Any, size: int) -> list[Any]:
    """Batches of `size` in the dataset's own order."""
    order = dataset.ordered_indices()
    return [order[i : i + size].tolist() for i in range(0, len(order), size)]


def update_freq(values: Sequence[int] | None, epoch: int) -> int:
    """`--update-freq` of an epoch: the last of the values is that of all later ones."""
    values = list(values or [1])
    return values[min(epoch, len(values)) - 1]
