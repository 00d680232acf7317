"""Going on with a training: at the same place of the data, and not at all where it is at its end."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Optional

from fairseq import checkpoint_utils, trainer, utils
from fairseq.data import iterators
from omegaconf import OmegaConf

from ext_common.compat.command import in_training_command, training_commands
from ext_common.compat.patching import after, replace
from ext_common.epochs import update_freq

logger = logging.getLogger(__name__)

# What decides on the batches of an epoch, by group of fairseq's configuration.
_BATCHING = {
    "dataset": ("batch_size", "max_tokens", "required_batch_size_multiple", "grouped_shuffling"),
    "optimization": ("update_freq", "skip_remainder_batch"),
    "distributed_training": ("distributed_world_size",),
    "common": ("seed",),
    "task": ("epoch_updates",),
}


def go_on_at_the_same_place() -> None:
    """Symptom: another batch size or number of processes ends a resume in "Cannot resume training due
    to dataloader mismatch", or, where that many batches there are, goes on elsewhere without a word.

    A checkpoint counts the batches of a process. Here it goes on after about as many samples, and
    says what changed and how many samples come again or are left out in this epoch, as batches are
    made anew. Where an epoch is shorter than the place that was reached, the next one begins.

    Thread: fairseq 3638.
    """
    note_what_is_resumed()

    def make(original: Callable) -> Callable:
        def load_state_dict(self, state_dict):
            resumed = _resumed if _resumed and _resumed.place is state_dict else None
            if resumed and state_dict.get("iterations_in_epoch") and type(self) is _ONE_CORPUS:
                state_dict = {**state_dict, **_same_place(self, resumed)}
            try:
                original(self, state_dict)
            except RuntimeError as error:
                if "dataloader mismatch" not in str(error):
                    raise
                logger.warning(
                    f"epoch {state_dict['epoch']} has only {len(self)} batches now: the next begins"
                )
                self.epoch = state_dict["epoch"] + 1

        return load_state_dict

    replace(_ONE_CORPUS, "load_state_dict", make, ("due to dataloader mismatch",))


def stop_before_an_update() -> None:
    """Symptom: a finished training that is started again trains one more update each time.

    fairseq tests for the end only after an update, and then writes last and best anew.

    Thread: none found.
    """
    in_training_command(_stop_before_an_update)
    after(checkpoint_utils, "load_checkpoint", _say_the_end, ("trainer.get_train_iterator(",))


def go_on_counting_for_patience() -> None:
    """Symptom: `--patience 3` trains three validations longer after every resume, and one that it
    ended trains on when it is started again.

    The count is an attribute of should_stop_early and in no checkpoint; here it is kept in
    extra_state["patience"].

    Thread: none found.
    """

    def make(original: Callable) -> Callable:
        def save_checkpoint(self, filename, extra_state):
            for train in training_commands():
                count = vars(train.should_stop_early)
                if "best" in count:
                    kept = {"best": float(count["best"]), "num_runs": int(count["num_runs"])}
                    extra_state = {**extra_state, "patience": kept}
            return original(self, filename, extra_state)

        return save_checkpoint

    replace(trainer.Trainer, "save_checkpoint", make, ('["extra_state"].update(extra_state)',))
    after(
        checkpoint_utils,
        "load_checkpoint",
        _go_on_counting,
        ("save_checkpoint.best = extra_state",),
    )


def _go_on_counting(result: tuple, cfg: Any, *_args: Any, **_kwargs: Any) -> None:
    count = (result[0] or {}).get("patience")
    # as fairseq does with the best value
    if count and not (cfg.reset_optimizer or cfg.reset_meters or _only_weights(cfg)):
        for train in training_commands():
            vars(train.should_stop_early).update(count)


def _only_weights(cfg: Any) -> bool:
    last = os.path.join(cfg.save_dir, "checkpoint_last.pt")
    return bool(cfg.finetune_from_model) and not os.path.exists(last)


GAPS = (go_on_at_the_same_place, stop_before_an_update, go_on_counting_for_patience)


# --- what is resumed ------------------------------------------------------------------------------

_ONE_CORPUS = iterators.EpochBatchIterator


class Resuming(NamedTuple):
    """A training that is reading the checkpoint it goes on from."""

    trainer: Any
    same_run: bool  # False where only the weights are taken over


class Resumed(NamedTuple):
    trainer: Any
    place: dict  # train_iterator of the checkpoint
    options: dict[str, Any]  # those of _BATCHING that it was trained with


_resuming: list[Resuming] = []
_resumed: Optional[Resumed] = None


def resuming() -> Optional[Resuming]:
    """The training that is reading a checkpoint to go on from; None while nothing is resumed."""
    return _resuming[-1] if _resuming else None


def note_what_is_resumed() -> None:
    """Make `resuming` answer, and extra_state["trained_with"] the options a checkpoint was trained with.

    By group, plain values, in every process (only the first one reads the file); `lr` is the rate
    its next update would have had.
    """

    def make(original: Callable) -> Callable:
        def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
            global _resumed
            _resuming.append(Resuming(self, not reset_optimizer))
            try:
                extra = original(self, filename, reset_optimizer, *args, **kwargs)
            finally:
                _resuming.pop()
            _resumed = None
            if extra and extra.get("trained_with") and "train_iterator" in extra:
                options = _batching(extra["trained_with"])
                _resumed = Resumed(self, extra["train_iterator"], options)
            return extra

        return load_checkpoint

    replace(trainer.Trainer, "load_checkpoint", make, ("reset_optimizer=False",))
    after(checkpoint_utils, "load_checkpoint_to_cpu", _keep_its_options, ("torch.load(f,",))


def _keep_its_options(state: dict, *_args: Any, **_kwargs: Any) -> None:
    cfg, extra = state.get("cfg"), state.get("extra_state")
    if not (_resuming and cfg and isinstance(extra, dict)):
        return
    groups = (*_BATCHING, "lr_scheduler")
    kept = {group: _plain(cfg.get(group)) for group in groups}
    optimizer = state.get("last_optimizer_state") or {}
    kept["lr"] = (optimizer.get("param_groups") or [{}])[0].get("lr")
    extra["trained_with"] = kept


def _plain(options: Any) -> dict[str, Any]:
    if OmegaConf.is_config(options):
        options = OmegaConf.to_container(options)
    elif not isinstance(options, dict):
        options = {} if options is None else vars(options)
    simple = (int, float, str, bool, list, type(None))
    return {key: value for key, value in options.items() if isinstance(value, simple)}


# --- the same place -------------------------------------------------------------------------------


def _batching(cfg: Any) -> dict[str, Any]:
    found = {}
    for group, names in _BATCHING.items():
        options = _plain(cfg[group] if group in cfg else None)
        found.update({name: options[name] for name in names if name in options})
    return found


def _same_place(itr: Any, resumed: Resumed) -> dict[str, Any]:
    """What to change in the place of a checkpoint, whose batches may be others than `itr`'s."""
    now = _batching(resumed.trainer.cfg)
    changed = {name: old for name, old in resumed.options.items() if old != now.get(name, old)}
    if not changed:
        return {}
    place, epoch = resumed.place, resumed.place["epoch"]
    shuffle = place.get("shuffle", True)
    before = _iterator_as_before(resumed.trainer, epoch, resumed.options)
    # The datasets of streams are left as those batches wanted them.
    resumed.trainer.get_train_iterator(epoch, load_dataset=False, disable_iterator_cache=True)
    freq = update_freq(now["update_freq"], epoch)
    found = find_place(
        list(_shards(before, epoch, shuffle)),
        place["iterations_in_epoch"],
        list(_shards(itr, epoch, shuffle)),
        freq,
    )
    says = ", ".join(
        f"{_flag(name)} {_shown(old)} → {_shown(now[name])}" for name, old in changed.items()
    )
    logger.warning(f"{says}: epoch {epoch} goes on {found.in_words()}")
    at_the_end = found.batches >= len(itr)
    return {
        "epoch": epoch + at_the_end,
        "iterations_in_epoch": 0 if at_the_end else found.batches,
    }


def _flag(name: str) -> str:
    return "processes" if name == "distributed_world_size" else f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _iterator_as_before(trainer: Any, epoch: int, options: dict[str, Any]) -> Any:
    """Trainer.get_train_iterator under the options of a checkpoint, as its first process had it."""
    cfg, task = trainer.cfg, trainer.task
    own, task.cfg = task.cfg, copy.deepcopy(task.cfg)
    try:
        if OmegaConf.is_config(task.cfg):
            OmegaConf.set_struct(task.cfg, False)
        for name, value in options.items():
            if hasattr(task.cfg, name):
                setattr(task.cfg, name, value)
        seed = options.get("seed", cfg.common.seed)
        max_tokens = options.get("max_tokens")
        return task.get_batch_iterator(
            dataset=task.dataset(cfg.dataset.train_subset),
            max_tokens=max_tokens,
            max_sentences=options.get("batch_size"),
            max_positions=utils.resolve_max_positions(
                task.max_positions(), trainer.model.max_positions(), max_tokens
            ),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=options.get("required_batch_size_multiple", 8),
            seed=seed + epoch if cfg.dataset.update_ordered_indices_seed else seed,
            num_shards=options.get("distributed_world_size", 1),
            shard_id=0,
            num_workers=0,
            epoch=epoch,
            data_buffer_size=0,
            disable_iterator_cache=True,
            skip_remainder_batch=options.get("skip_remainder_batch", False),
            grouped_shuffling=options.get("grouped_shuffling", False),
            update_epoch_batch_itr=cfg.dataset.update_epoch_batch_itr,
        )
    finally:
        task.cfg = own


def _shards(itr: Any, epoch: int, shuffle: bool) -> Iterator[list]:
    """The batches (lists of indices) of each process, in the order of the epoch."""
    own = itr.shard_id
    for shard in range(itr.num_shards):
        itr.shard_id = shard
        yield itr.ordered_batches(epoch, fix_batches_to_gpus=False, shuffle=shuffle)
    itr.shard_id = own


class Place(NamedTuple):
    """Where an epoch goes on: after `batches` of each process, which are `samples` of `total`."""

    batches: int
    samples: int
    total: int
    seen: int
    again: int
    left_out: int

    def in_words(self) -> str:
        text = f"after {self.samples:,} of its {self.total:,} samples ({self.seen:,} were seen)"
        if not (self.again or self.left_out):
            return f"{text}; none comes again, none is left out"
        return (
            f"{text}; as batches are made anew, {self.again:,} of those seen come again in it and "
            f"{self.left_out:,} others are left out"
        )


def find_place(before: Sequence[Sequence], done: int, now: Sequence[Sequence], freq: int) -> Place:
    """The place among the batches of `now` that is nearest to `done` batches of `before`.

    before, now: batches (of sample indices) of each process; freq: batches a process takes for an
    update, of which the place is a multiple. Of two that are equally near it is the earlier one.
    """
    seen = {i for shard in before for batch in shard[:done] for i in batch}
    length = max(map(len, now))
    sums = [0]
    for k in range(length):
        sums.append(sums[-1] + sum(len(shard[k]) for shard in now if k < len(shard)))
    marks = sorted({*range(0, length, freq), length})
    batches = min(marks, key=lambda mark: (abs(sums[mark] - len(seen)), mark))
    coming = {i for shard in now for batch in shard[batches:] for i in batch}
    everything = coming.union(*(batch for shard in now for batch in shard))
    again, left_out = len(seen & coming), len(everything - seen - coming)
    return Place(batches, sums[batches], sums[-1], len(seen), again, left_out)


# --- the end --------------------------------------------------------------------------------------


def _stop_before_an_update(train: ModuleType) -> None:
    replace(train, "train", _train_unless_finished, ("trainer.train_step(samples)",))


def _train_unless_finished(original: Callable) -> Callable:
    def train(cfg, trainer, task, epoch_itr):
        reached = why_finished(cfg, trainer)
        if reached is None:
            return original(cfg, trainer, task, epoch_itr)
        logger.info(f"already at {reached}: nothing is trained, and nothing written")
        return [None], True

    return train


def _say_the_end(result: tuple, _cfg: Any, trainer: Any, **_kwargs: Any) -> None:
    last = trainer.cfg.optimization.max_epoch
    if last and result[1].next_epoch_idx > last:
        logger.info(f"already at the end of epoch {last} (--max-epoch {last}): nothing is trained")


def why_finished(cfg: Any, trainer: Any) -> Optional[str]:
    """The length that a training has reached, in words; None while it has not."""
    updates = trainer.get_num_updates()
    if updates >= (cfg.optimization.max_update or math.inf):
        return f"{updates:,} updates (--max-update {cfg.optimization.max_update} was asked for)"
    runs = max(
        (vars(t.should_stop_early).get("num_runs", 0) for t in training_commands()), default=0
    )
    if 0 < cfg.checkpoint.patience <= runs:
        return f"{runs} validations without a better one (--patience {cfg.checkpoint.patience})"
    limit = cfg.optimization.stop_time_hours
    hours = trainer.cumulative_training_time() / 3600
    if updates and limit > 0 and hours > limit:
        return f"{hours:.2f} hours of training (--stop-time-hours {limit:g} was asked for)"
    said: Optional[str] = getattr(getattr(trainer, "task", None), "is_done", None)
    return said
