"""What a person sees of a training on a terminal; fairseq's own log goes to SAVE_DIR/train.log meanwhile.

Only there, and only without --log-file, --log-format and --no-progress-bar: elsewhere all is as fairseq
has it.
A task may have

    progress_unit = "images"                   what it counts a second; "tokens" are fairseq's
    next_command(save_dir, checkpoint)         what a user does with a trained model, for the last lines
"""

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Optional, TextIO

from fairseq import checkpoint_utils, trainer
from fairseq.logging import metrics, progress_bar

from ext_common.cli import why_full
from ext_common.compat import messages
from ext_common.compat.command import in_training_command
from ext_common.compat.patching import after, replace
from ext_common.progress import Pace, minutes, training_line, validations_left

LOG = "train.log"
_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
# Seconds between two lines of a training, which replace each other.
_REFRESH = 0.25
_FIRST = ("fairseq_cli.train", "Start iterating over samples")
# Lines of fairseq's log, by logger and beginning, with which a step begins that may take long.
_STEPS = {
    ("fairseq.trainer", "Preparing to load checkpoint"): "looking for a checkpoint",
    ("fairseq.trainer", "loading train data"): "loading the training data",
    ("fairseq_cli.train", "begin dry-run validation"): "loading the validation data",
    _FIRST: "the first update",
    ("fairseq_cli.train", "begin validation on"): "validating",
    ("fairseq.checkpoint_utils", "Preparing to save checkpoint"): "writing a checkpoint",
}
# Those that are shown themselves.
_SHOWN = (
    ("fairseq.trainer", "Loaded checkpoint"),
    ("fairseq_cli.train", "early stop since"),
)
_OWN = ("ext_common", "fairseq_ext", "diffusion_ext")
_END = ("fairseq_cli.train", "done training in")

_screen: Optional["Screen"] = None


def apply() -> None:
    """Show trainings on a terminal; calling it again changes nothing."""
    in_training_command(_watch)
    after(trainer.Trainer, "__init__", _meet, ("self.cfg = cfg",))
    replace(progress_bar, "progress_bar", _with_ours, ("default_log_format",))
    if _close not in messages.before_an_error:
        messages.before_an_error.append(_close)


def wanted(cfg: Any, terminal: bool) -> bool:
    """Whether this process shows its training: the first one, on a terminal, where no log was asked for."""
    common = cfg.common
    asked = common.log_file or common.log_format or common.no_progress_bar
    first = (cfg.distributed_training.distributed_rank or 0) == 0
    # fairseq-hydra-train sets up its own logging later on.
    return terminal and first and not asked and not cfg.get("job_logging_cfg")


def _watch(train: ModuleType) -> None:
    after(train, "add_defaults", _begin, ("merge_with_parent",))
    replace(train, "validate_and_save", _timed, ("should_stop_early(",))


def _begin(_none: None, cfg: Any) -> None:
    global _screen
    _close()
    if wanted(cfg, sys.stdout.isatty()):
        _screen = Screen(cfg, sys.stdout)
        _screen.open()


def _close(*_: Any) -> None:
    global _screen
    if _screen:
        _screen.close()
    _screen = None


def _meet(_none: None, trainer: Any, *_args: Any, **_kwargs: Any) -> None:
    if _screen:
        _screen.trainer = trainer


def _with_ours(original: Callable) -> Callable:
    def progress_bar_(iterator, log_format=None, *args, **kwargs):
        if _screen is None:
            return original(iterator, log_format, *args, **kwargs)
        return Shown(original(iterator, "simple", *args, **kwargs), iterator, _screen, **kwargs)

    return progress_bar_


def _timed(original: Callable) -> Callable:
    def validate_and_save(*args, **kwargs):
        begin = time.monotonic()
        losses, stop = original(*args, **kwargs)
        if _screen:
            _screen.paused(time.monotonic() - begin, losses[0] is not None)
        return losses, stop

    return validate_and_save


class Screen(logging.Handler):
    """One training on a terminal: a line that is rewritten, and lines that stay."""

    def __init__(
        self, cfg: Any, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self.cfg, self.stream, self.clock = cfg, stream, clock
        self.trainer: Any = None
        self.pace = Pace()
        self.values: dict[str, float] = {}
        self.per_update: dict[str, float] = {}
        self.best: Optional[float] = None
        self.begun = clock()
        self._pause = 0.0
        self._next = 0.0
        self._rewriting = False
        self._elsewhere: list[logging.Handler] = []
        self._file: Optional[logging.Handler] = None

    # --- where the log goes ---------------------------------------------------------------------

    def open(self) -> None:
        """Send what is logged to a file beside the checkpoints, and here what a person wants of it."""
        path = Path(self.cfg.checkpoint.save_dir) / LOG
        self._file = _LogFile(path, encoding="utf-8", delay=True)
        self._file.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
        root = logging.getLogger()
        self._elsewhere = [h for h in root.handlers if type(h) is logging.StreamHandler]
        for handler in self._elsewhere:
            root.removeHandler(handler)
        root.addHandler(self._file)
        root.addHandler(self)
        logging.captureWarnings(True)
        self.stay(f"the log is {path}")
        self.now("building the model …")

    def close(self) -> None:
        """Give the log back."""
        root = logging.getLogger()
        self._end_line()
        root.removeHandler(self)
        if self._file:
            root.removeHandler(self._file)
            self._file.close()
            logging.captureWarnings(False)
        for handler in self._elsewhere:
            root.addHandler(handler)
        self._elsewhere, self._file = [], None

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        step = next((step for key, step in _STEPS.items() if _is(record, text, key)), None)
        if step == _STEPS[_FIRST] and self.pace.update is not None:
            return
        if step:
            self.now(f"{step} …")
        elif _is(record, text, _END):
            self.end()
        elif record.levelno >= logging.WARNING:
            # Python's own are of several lines, of which the place comes first.
            text = re.sub(r"^\S+:\d+: \w+: (.*)(\n.*)*$", r"\1", text)
            self.stay(f"{record.levelname.lower()}: {text}")
        elif record.name.split(".")[0] in _OWN or any(_is(record, text, key) for key in _SHOWN):
            self.stay(text)

    # --- lines ----------------------------------------------------------------------------------

    def now(self, text: str) -> None:
        """Rewrite the line that is being rewritten."""
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[K" + (text if len(text) <= width else text[: width - 1] + "…"))
        self.stream.flush()
        self._rewriting = True

    def stay(self, text: str) -> None:
        """A line that is there to stay."""
        self.stream.write(("\r\x1b[K" if self._rewriting else "") + text + "\n")
        self.stream.flush()
        self._rewriting = False

    def _end_line(self) -> None:
        if self._rewriting:
            self.stream.write("\n")
            self.stream.flush()
            self._rewriting = False

    # --- what happens ---------------------------------------------------------------------------

    def paused(self, seconds: float, validated: bool) -> None:
        """Between two updates `seconds` went into a validation and a checkpoint, or into neither."""
        self._pause += seconds
        if validated:
            self.pace.validated(seconds)

    def updated(self, seconds: float, epoch: int, done_in_epoch: int, epoch_length: int) -> None:
        """An update is over, which with the pause after it took `seconds`."""
        self.pace.updated(max(seconds - self._pause, 0.0))
        self._pause = 0.0
        if self.due():
            self.take(metrics.get_meters("train_inner") or {})
            done = self.trainer.get_num_updates()
            self.now(self.line(done, epoch, done_in_epoch, epoch_length))

    def due(self) -> bool:
        """Whether it is time to rewrite the line."""
        if self.clock() < self._next:
            return False
        self._next = self.clock() + _REFRESH
        return True

    def take(self, stats: Mapping[str, Any]) -> None:
        """Remember what is shown of the statistics of training."""
        for name, place in (
            ("loss", self.values),
            ("bsz", self.per_update),
            ("wpb", self.per_update),
        ):
            value = getattr(stats.get(name), "avg", stats.get(name))
            if value is not None:
                place[name] = float(value)

    def line(self, done: int, epoch: int, done_in_epoch: int, epoch_length: int) -> str:
        unit = getattr(self.trainer.task, "progress_unit", "samples")
        each, one = self.per_update.get("wpb" if unit == "tokens" else "bsz"), self.pace.update
        total = total_updates(self.cfg, done, epoch, done_in_epoch, epoch_length)
        left = None
        if total:
            every = validated_every(self.cfg, epoch_length)
            checks = 0 if every is None else validations_left(done, total, every)
            left = self.pace.left(max(total - done, 0), checks)
        speed = each / one if each and one else None
        return training_line(done, total, self.values, speed, unit, left)

    def validated(self, subset: str, stats: Mapping[str, Any], number: int) -> None:
        """A validation is over: what came of it stays."""
        chosen = self.cfg.checkpoint
        name = chosen.best_checkpoint_metric
        values = {key: float(stats[key]) for key in ("loss", name) if stats.get(key) is not None}
        text = training_line(self.trainer.get_num_updates(), None, values)
        text = text.replace(" · ", f" · {subset} ", 1)
        if number == 0 and name in values:
            self.values[f"{subset} {name}"] = values[name]
            known = (self.best, getattr(checkpoint_utils.save_checkpoint, "best", None))
            before = [float(value) for value in known if value is not None]
            better = max if chosen.maximize_best_checkpoint_metric else min
            self.best = better([values[name], *before])
            if self.best not in before:
                text += " · the best so far"
        self.stay(text)

    def end(self) -> None:
        """The last lines: the best checkpoint, its metric, and what a user does next."""
        updates = self.trainer.get_num_updates() if self.trainer else 0
        self.stay(f"done: {updates:,} updates, {minutes(self.clock() - self.begun)}")
        chosen = self.cfg.checkpoint
        names = (f"checkpoint_{name}{chosen.checkpoint_suffix}.pt" for name in ("best", "last"))
        paths = [os.path.join(chosen.save_dir, name) for name in names]
        path = next((path for path in paths if os.path.exists(path)), None)
        if path:
            best = getattr(checkpoint_utils.save_checkpoint, "best", None)
            told = f", {chosen.best_checkpoint_metric} {best:.4g}" if best is not None else ""
            self.stay(
                f"best checkpoint: {path}{told}" if path == paths[0] else f"checkpoint: {path}"
            )
            ask = getattr(getattr(self.trainer, "task", None), "next_command", None)
            following = ask(chosen.save_dir, path) if ask else None
            if following:
                self.stay(f"next: {following}")
        _close()


class Shown(progress_bar.BaseProgressBar):
    """A bar of fairseq's, whose lines go to the log, and what it knows for the screen."""

    def __init__(
        self, bar: Any, iterator: Any, screen: Screen, prefix: Any = None, **_: Any
    ) -> None:
        self.bar, self.iterable, self.screen = bar, iterator, screen
        self.epoch = getattr(bar, "epoch", None)
        self.validating = prefix is not None

    def __iter__(self) -> Iterator[Any]:
        begin, total = self.screen.clock(), len(self.iterable)
        # An epoch that is resumed begins at `n`.
        for done, item in enumerate(self.bar, getattr(self.iterable, "n", 0) + 1):
            yield item
            now = self.screen.clock()
            if not self.validating:
                self.screen.updated(now - begin, self.epoch, done, total)
            elif self.screen.due():
                self.screen.now(f"validating: batch {done:,} of {total:,}")
            begin = now

    def log(self, stats: Mapping[str, Any], tag: Any = None, step: Any = None) -> None:
        self.screen.take(stats)
        self.bar.log(stats, tag=tag, step=step)

    def print(self, stats: Mapping[str, Any], tag: Any = None, step: Any = None) -> None:
        if self.validating:
            subsets = self.screen.cfg.dataset.valid_subset.split(",")
            number = subsets.index(tag) if tag in subsets else 0
            self.screen.validated(tag, stats, number)
        self.bar.print(stats, tag=tag, step=step)

    def update_config(self, config: Any) -> None:
        self.bar.update_config(config)


def total_updates(
    cfg: Any, done: int, epoch: int, done_in_epoch: int, epoch_length: int
) -> Optional[int]:
    """Updates of the whole training, by --max-update and --max-epoch; None where neither is given."""
    limits = []
    if cfg.optimization.max_update:
        limits.append(cfg.optimization.max_update)
    if cfg.optimization.max_epoch:
        epochs = max(cfg.optimization.max_epoch - epoch, 0)
        limits.append(done + epoch_length - done_in_epoch + epochs * epoch_length)
    return min(limits, default=None)


def validated_every(cfg: Any, epoch_length: int) -> Optional[int]:
    """Updates between two validations; 0 where there is one at the end only, None where there is none."""
    if cfg.dataset.disable_validation:
        return None
    intervals = (
        cfg.dataset.validate_interval_updates,
        cfg.checkpoint.save_interval_updates,
        cfg.dataset.validate_interval * epoch_length,
    )
    return min((interval for interval in intervals if interval > 0), default=0)


class _LogFile(logging.FileHandler):
    """Made when something is logged: a start that fails before leaves no folder."""

    told = False

    def _open(self) -> TextIO:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said once, and the training goes on without its log."""
        full = why_full(sys.exc_info()[1])
        if full is None:
            return super().handleError(record)
        if not self.told:
            self.told = True
            sys.stderr.write(
                f"\n{self.baseFilename} cannot be written ({full}): the log ends here\n"
            )


def _is(record: logging.LogRecord, text: str, key: tuple[str, str]) -> bool:
    return record.name == key[0] and text.startswith(key[1])
