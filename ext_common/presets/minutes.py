"""`--minutes`: a training that ends on time, by the clock, from the start of its process to its exit.

The first process measures the speed of some updates behind the first few, and what a validation and a
checkpoint take. From these follow the length of the training and the intervals of its validations; the
schedule of the rate is built once more for that length, which then stands in the checkpoint: a training that
continues goes on to it. Should the machine get slower, the training stops in time nevertheless, with a
validation and its last checkpoint. A task may have

    early_check(updates)                           how often a validation after so many fits into one of now
    length_chosen(trainer, updates, before)        called when the length has been chosen
    being_measured                                 set to True while updates are measured: to take no pause
"""

import dataclasses
import logging
import math
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ext_common.presets.choices import Plan, plan, short_warmup
from ext_common.presets.save_dirs import absolute

logger = logging.getLogger(__name__)

# Updates that are not measured: memory is allocated, caches are cold.
FIRST_UPDATES = 10
LEAST_UPDATES = 5
# Of the time there is: what is measured, at the longest, what validations before the last one may take.
MEASURED, MEASURED_AT_MOST, CHECKS = 0.05, 0.3, 0.2
# A training whose machine got slower is stopped where it would take so many times its time.
LATE = 1.08
NEVER = 1 << 30
# Python takes down what was imported in such a part of the time to the first update, at most so many seconds.
EXIT, EXIT_AT_MOST = 0.3, 6.0


@dataclass(frozen=True)
class Pace:
    """What was measured, seconds: of an update, of a validation with its checkpoint."""

    update: float
    check: float


@dataclass(frozen=True)
class Intervals:
    """How often a training is validated and saved: every so many updates (0: not), every so many epochs."""

    updates: int
    epochs: int


@dataclass(frozen=True)
class Length:
    """updates: of the whole training."""

    updates: int
    intervals: Intervals


def length_for(
    seconds: float, done: int, pace: Pace, before: int, epoch: int, intervals: Intervals
) -> Length:
    """The length of a training that has `seconds` left, its last validation among them.

    done: updates so far; before: the length that `intervals` are for; epoch: its updates. There are as many
    validations as there would have been, but no more than CHECKS of the time allows.
    """
    left = max(0.0, seconds - pace.check)
    allowed = CHECKS * left / pace.check if pace.check else math.inf
    planned = before / intervals.updates if intervals.updates else 0.0
    updates = done + left / pace.update
    for _ in range(20):
        checks = planned + updates / (epoch * intervals.epochs)
        updates = done + (left - min(checks, allowed) * pace.check) / pace.update
    stretch = max(1.0, checks / max(allowed, 1 / NEVER))
    whole = max(done + 1, int(updates))
    every = intervals.updates and max(1, round(stretch * intervals.updates * whole / before))
    epochs = math.ceil(min(stretch, whole) * intervals.epochs)
    return Length(whole, Intervals(min(every, whole), epochs))


def seconds_since_start() -> float:
    """Age of this training: of its process, or of the one that started it together with others."""
    from ext_common.compat.processes import launched

    together = multiprocessing.parent_process() is not None or launched()
    pid = os.getppid() if together else os.getpid()
    with open(f"/proc/{pid}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


# --- in fairseq's training ----------------------------------------------------------------------


def apply() -> None:
    """Let trainings end on time; calling it again changes nothing."""
    from ext_common.compat.command import in_training_command

    in_training_command(_watch)


def _watch(train: ModuleType) -> None:
    from ext_common.compat.patching import replace

    def _on_time(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_and_save(
            cfg: Any,
            trainer: Any,
            task: Any,
            epoch_itr: Any,
            valid_subsets: Any,
            end_of_epoch: bool,
        ) -> Any:
            arguments = (cfg, trainer, task, epoch_itr, valid_subsets)
            if not hasattr(trainer, "minutes"):
                trainer.minutes = budget_of(cfg, trainer)
            budget = trainer.minutes
            if budget is None:
                return original(*arguments, end_of_epoch)
            budget.updated(lambda: train.validate(*arguments), epoch_itr)
            begin = time.monotonic()
            losses, stop = original(*arguments, end_of_epoch)
            budget.checked(time.monotonic() - begin, losses[0] is not None)
            return losses, stop

        return validate_and_save

    replace(train, "validate_and_save", _on_time, ("should_stop_early(",))


def budget_of(cfg: Any, trainer: Any) -> "Budget | None":
    """The budget of a training; None where there is none, or the length was chosen already."""
    from ext_common.given import given

    chosen = plan(cfg)
    minutes = chosen.minutes if chosen else getattr(cfg.task, "minutes", 0.0)
    if not minutes or (chosen and chosen.updates):
        return None
    if chosen is None:
        limited = bool({"max_update", "max_epoch"} & given())
        chosen = Plan([], {}, absolute(str(cfg.task.data)), minutes, limited)
    return Budget(chosen, trainer)


class Budget:
    """The time of one training, in each of its processes; the first one decides for all."""

    def __init__(self, chosen: Plan, trainer: Any) -> None:
        self.chosen, self.trainer, self.cfg = chosen, trainer, trainer.cfg
        self.seconds = 60 * chosen.minutes
        self.begun = time.monotonic() - seconds_since_start()
        self.exit = min(EXIT_AT_MOST, EXIT * self.elapsed)
        self.first_update = trainer.get_num_updates()
        self.since: tuple[int, float] | None = None
        self.pauses = 0.0
        self.check = 0.0
        self.decided = False
        self.every = 1

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def updated(self, validate: Callable[[], Any], epoch_itr: Any) -> None:
        """Between an update and its validation: measure, decide once, then watch the clock."""
        done = self.trainer.get_num_updates()
        if self.decided:
            if done % self.every == 0 and self.agreed(self.is_late()):
                self.stop(done)
        elif self.since is None:
            warm = done - self.first_update >= FIRST_UPDATES - 1
            if self.agreed(warm or self.elapsed > MEASURED_AT_MOST / 2 * self.seconds):
                self.since, self.pauses = (done, time.monotonic()), 0.0
                self.trainer.task.being_measured = True
        elif self.agreed(self.is_measured(done)):
            self.decide(done, validate, epoch_itr)

    def checked(self, seconds: float, validated: bool) -> None:
        """A validation, with its checkpoint, or neither took so long."""
        self.pauses += seconds
        if validated:
            self.check = seconds

    def is_measured(self, done: int) -> bool:
        assert self.since is not None
        spent = time.monotonic() - self.since[1]
        enough = spent >= MEASURED * self.seconds and done - self.since[0] >= LEAST_UPDATES
        return enough or self.elapsed + self.check > MEASURED_AT_MOST * self.seconds

    def is_late(self) -> bool:
        return self.elapsed + self.check + self.exit > LATE * self.seconds

    def agreed(self, value: Any) -> Any:
        """What the first process says."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def decide(self, done: int, validate: Callable[[], Any], epoch_itr: Any) -> None:
        assert self.since is not None
        spent = time.monotonic() - self.since[1] - self.pauses
        update = spent / max(1, done - self.since[0])
        before = self.cfg.optimization.max_update or 0
        self.decided, self.trainer.task.being_measured = True, False
        self.every = self.agreed(max(1, int(0.01 * self.seconds / update)))
        # twice its time: validations are not measured yet
        short = self.elapsed + 2 * (before - done) * update < self.seconds
        if self.agreed(self.chosen.at_most and bool(before) and short):
            return
        if not self.cfg.dataset.disable_validation:
            begin = time.monotonic()
            validate()
            self.check = time.monotonic() - begin
            if hasattr(self.trainer.task, "early_check"):
                self.check /= self.trainer.task.early_check(self.seconds / update)
        self.check += self.writing()
        pace = Pace(update, self.check)
        intervals = Intervals(
            max(0, self.cfg.checkpoint.save_interval_updates), self.cfg.dataset.validate_interval
        )
        epoch = max(1, len(epoch_itr) // self.cfg.optimization.update_freq[0])
        left = self.seconds - self.elapsed - self.exit
        length = length_for(left, done, pace, before or done + 1, epoch, intervals)
        length = self.agreed(length)
        if self.chosen.at_most and before and before <= length.updates:
            return
        self.take(length, pace, before)

    def writing(self) -> float:
        """Seconds to write the files of a checkpoint."""
        from fairseq import checkpoint_utils

        trainer = self.trainer
        trainer.consolidate_optimizer()
        if self.cfg.checkpoint.no_save or not trainer.should_save_checkpoint_on_current_rank:
            return 0.0
        path = os.path.join(self.cfg.checkpoint.save_dir, ".measured.pt")
        os.makedirs(self.cfg.checkpoint.save_dir, exist_ok=True)
        begin = time.monotonic()
        try:
            checkpoint_utils.torch_persistent_save(trainer.state_dict(), path)
        finally:
            if os.path.exists(path):
                os.remove(path)
        # best, last, and the one with a number
        return 3 * (time.monotonic() - begin)

    def take(self, length: Length, pace: Pace, before: int) -> None:
        """The chosen length, in the configuration and in all that depends on it."""
        from omegaconf import open_dict

        cfg = self.cfg
        changed = {"--max-update": str(length.updates)}
        with open_dict(cfg):
            changed |= fit_schedule(cfg, length.updates)
            if length.intervals.updates:
                cfg.checkpoint.save_interval_updates = length.intervals.updates
                changed["--save-interval-updates"] = str(length.intervals.updates)
            if length.intervals.epochs != cfg.dataset.validate_interval:
                for group, name in (
                    (cfg.dataset, "validate_interval"),
                    (cfg.checkpoint, "save_interval"),
                ):
                    group[name] = length.intervals.epochs
                    changed[f"--{name.replace('_', '-')}"] = str(length.intervals.epochs)
            self.chosen = dataclasses.replace(self.chosen, updates=length.updates)
            cfg.task.chosen = self.chosen.to_text()
        rebuild_schedule(self.trainer)
        told = getattr(self.trainer.task, "length_chosen", None)
        if told:
            told(self.trainer, length.updates, before)
        flags = [word for pair in changed.items() for word in pair]
        logger.info(
            f"{self.chosen.minutes:g} minutes: {pace.update:.3g} s an update and {pace.check:.1f} s a"
            f" validation with its checkpoint give {length.updates:,} updates"
        )
        if self.chosen.command:
            command = [*self.chosen.command, "--minutes", "0", *flags]
            logger.info(f"as long again: fairseq-train {shlex.join(command)}")

    def stop(self, done: int) -> None:
        """End with this update; what comes after it is as at any end."""
        from omegaconf import open_dict

        length = self.cfg.optimization.max_update
        if length and done >= length:
            return
        logger.warning(
            f"the machine got slower: the training stops after {done:,} of {length:,} updates, to end in"
            f" {self.chosen.minutes:g} minutes"
        )
        with open_dict(self.cfg):
            self.cfg.optimization.max_update = done
        self.every = NEVER


def fit_schedule(cfg: Any, updates: int) -> dict[str, str]:
    """Write a length into the options of the training and of its schedule; the flags that say the same.

    A warm-up that nobody gave gets shorter with a short training, and noam's cooldown stays the same share of
    it; noam keeps its peak.
    """
    from ext_common.given import given

    before, cfg.optimization.max_update = cfg.optimization.max_update, updates
    options, changed = cfg.lr_scheduler, {}
    names = set(options) if options else set()
    for name in {"max_update", "total_num_update"} & names:
        options[name] = updates
        if name == "total_num_update":
            changed["--total-num-update"] = str(updates)
    warmup = options.warmup_updates if "warmup_updates" in names else 0
    if warmup and "warmup_updates" not in given():
        options.warmup_updates = short_warmup(updates, warmup)
        changed["--warmup-updates"] = str(options.warmup_updates)
        if "noam_factor" in names and "noam_factor" not in given():
            options.noam_factor *= math.sqrt(options.warmup_updates / warmup)
            changed["--noam-factor"] = repr(options.noam_factor)
    cooldown = options.noam_cooldown if "noam_cooldown" in names else 0
    if cooldown and before and "noam_cooldown" not in given():
        options.noam_cooldown = max(1, round(cooldown * updates / before))
        changed["--noam-cooldown"] = str(options.noam_cooldown)
    if "lr_period_updates" in names and options.lr_period_updates > 0:
        options.lr_period_updates = updates - options.warmup_updates
        changed["--lr-period-updates"] = str(options.lr_period_updates)
    return changed


def rebuild_schedule(trainer: Any) -> None:
    """Build the schedule of the rate anew from the options; it goes on where the training is."""
    from fairseq.optim import lr_scheduler

    from ext_common.engine import building

    best = trainer.lr_scheduler.state_dict()
    with building(trainer):
        trainer._lr_scheduler = lr_scheduler.build_lr_scheduler(
            trainer.cfg.lr_scheduler, trainer.optimizer
        )
    trainer._lr_scheduler.load_state_dict(best)
    trainer.lr_step_update()
