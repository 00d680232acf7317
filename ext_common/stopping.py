"""A training that is told to stop keeps what it has, and one that goes on is saved by the clock, too.

Without: Ctrl-C and SIGTERM lose all since the last checkpoint, which comes with the end of an epoch. Here
the update that is being made is finished, `checkpoint_last.pt` written, and the exit code is 130 (Ctrl-C) or
143 (SIGTERM); a second Ctrl-C stops at once. Of several processes all stop after the same update, whichever
was told. A file SAVE_DIR/stop asks for the same where no signal reaches: a cluster tells its batch shell, not
the training. It becomes SAVE_DIR/stopped, and the exit code is 0. `--save-minutes` writes
`checkpoint_last.pt` so often whatever the epochs.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from ext_common.compat import messages
from ext_common.compat.command import in_training_command
from ext_common.compat.patching import after, replace

logger = logging.getLogger(__name__)

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# The file that stops a training, what it becomes, and its number among the signals, which count more.
ASKED, OBEYED = "stop", "stopped"
BY_FILE = 1
# Seconds between two looks for it.
LOOKS = 1.0
# Seconds after a Ctrl-C in which another is the same one: launchers pass on what a terminal has sent already.
SAME = 1.0


class Wishes:
    """What this process was asked for since a training began: `asked` is a signal's number, 0 for none."""

    def __init__(self) -> None:
        self.asked = 0
        self._at = 0.0
        self._spared = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take Ctrl-C and SIGTERM from now on; again changes nothing, and what is ignored stays so."""
        if threading.current_thread() is not threading.main_thread():
            return
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in usual.items():
            if signal.getsignal(number) == handler:
                self._before[number] = signal.signal(number, self.take)

    def stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def ignore(self) -> None:
        """Exit undisturbed: a launcher ends the others as soon as the first process has exited."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def take(self, number: int, _frame: FrameType | None) -> None:
        """The handler. A loading worker has inherited it.

        Launchers and terminals send a signal to all of a group, and the training needs its workers for the
        update that it is at; it ends them itself, and where that takes a SIGTERM sends it twice.
        """
        now = time.monotonic()
        if os.getpid() != self._pid:
            if number == signal.SIGTERM and self._spared:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._spared |= number == signal.SIGTERM
            return
        if not self.asked:
            self.asked, self._at = number, now
            again = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
            text = f"\n{NAMES[signal.Signals(number)]}: finishing this update and saving{again}\n"
            # not print: the signal may have come in the middle of another one
            os.write(2, text.encode())
        elif number == signal.SIGINT and now - self._at > SAME:
            raise KeyboardInterrupt


_wishes: Wishes | None = None
_saved_at = 0.0
_looked_at = 0.0


def apply() -> None:
    """Let trainings stop in order, and leave no empty folders; calling it again changes nothing."""
    replace(checkpoint_utils, "verify_checkpoint_directory", _noting_folders, ("os.makedirs(",))
    in_training_command(_watch)
    after(checkpoint_utils, "save_checkpoint", _note_saved, ("checkpoint_conds",))
    replace(distributed_utils, "call_main", _listening, ("distributed_no_spawn", "spawn("))


def _watch(train: ModuleType) -> None:
    replace(train, "train", _begin, ("trainer.train_step(samples)",))
    replace(train, "validate_and_save", _stoppable, ("should_stop_early(",))


def _noting_folders(original: Callable[..., Any]) -> Callable[..., Any]:
    """fairseq makes the folder before it has built anything: a start that fails then leaves it empty."""

    def verify_checkpoint_directory(save_dir: str) -> Any:
        folder = Path(save_dir).resolve()
        made = [place for place in (folder, folder.parent) if not place.exists()]
        if made:
            atexit.register(remove_empty, made)
        return original(save_dir)

    return verify_checkpoint_directory


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those that are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _listening(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_main(*args: Any, **kwargs: Any) -> Any:
        global _wishes
        try:
            return original(*args, **kwargs)
        finally:
            if _wishes:
                _wishes.stop_listening()
            _wishes = None

    return call_main


def _begin(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(*args: Any, **kwargs: Any) -> Any:
        global _wishes, _saved_at
        if _wishes is None:
            _wishes, _saved_at = Wishes(), time.monotonic()
        _wishes.listen()
        return original(*args, **kwargs)

    return train


def _note_saved(*_args: Any, **_kwargs: Any) -> None:
    global _saved_at
    _saved_at = time.monotonic()


def _stoppable(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_and_save(
        cfg: Any, trainer: Any, task: Any, epoch_itr: Any, subsets: Any, end_of_epoch: bool
    ) -> Any:
        before = _saved_at
        losses, stop = original(cfg, trainer, task, epoch_itr, subsets, end_of_epoch)
        saved = _saved_at != before
        due = is_due(getattr(cfg.task, "save_minutes", 0.0), time.monotonic() - _saved_at)
        asked = (_wishes.asked if _wishes else 0) or asked_by_file(cfg)
        done = bool(getattr(task, "is_done", None))
        number, due, done = agreed(asked, due and not stop, done, trainer.device)
        if (number or due or done and not stop) and not saved:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        if number and not stop:
            end(number, cfg, trainer)
        return losses, stop or done

    return validate_and_save


def asked_by_file(cfg: Any) -> int:
    """BY_FILE where the first process finds SAVE_DIR/stop, else 0."""
    global _looked_at
    now = time.monotonic()
    if now - _looked_at < LOOKS or not distributed_utils.is_master(cfg.distributed_training):
        return 0
    _looked_at = now
    return BY_FILE if (Path(cfg.checkpoint.save_dir) / ASKED).exists() else 0


def is_due(minutes: float, seconds: float) -> bool:
    """Whether a checkpoint is due `seconds` after the last one; minutes: 0 for never."""
    return 0 < 60 * minutes <= seconds


def agreed(number: int, due: bool, done: bool, device: Any) -> tuple[int, bool, bool]:
    """What all processes do: the signal that any of them got, a checkpoint where the first one's is due, an
    end where any of them knows that the task is done.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return number, due, done
    wishes = torch.tensor([number, int(due and dist.get_rank() == 0), int(done)], device=device)
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    number, due, done = wishes.tolist()
    return number, bool(due), bool(done)


def end(number: int, cfg: Any, trainer: Any) -> NoReturn:
    """Say where it has stopped and exit, once all processes are here: none is ended while another writes."""
    agreed(number, False, False, trainer.device)
    path = Path(cfg.checkpoint.save_dir) / f"checkpoint_last{cfg.checkpoint.checkpoint_suffix}.pt"
    kept = not cfg.checkpoint.no_save and path.exists()
    by_file = number == BY_FILE
    if distributed_utils.is_master(cfg.distributed_training):
        if by_file:
            os.replace(path.with_name(ASKED), path.with_name(OBEYED))
        name = path.with_name(ASKED) if by_file else NAMES[signal.Signals(number)]
        logger.info(
            f"stopped by {name} after update {trainer.get_num_updates():,}: "
            + (
                f"{path} holds it, and the same command goes on"
                if kept
                else "nothing is kept (--no-save)"
            )
        )
    for action in messages.before_an_error:
        action()
    if _wishes and dist.is_available() and dist.is_initialized():
        _wishes.ignore()
    sys.exit(0 if by_file else 128 + number)
