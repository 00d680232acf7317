"""Checkpoints: read without running what they hold, written whole, resumed in words."""

import logging
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from fairseq import checkpoint_utils, trainer
from fairseq.file_io import PathManager

from ext_common.cli import UserError
from ext_common.compat.command import training_commands
from ext_common.compat.files import (
    allow_namespace,
    first_line,
    foreign_globals,
    is_whole,
    plain_numbers,
    why_misfit,
    why_unreadable,
    written_whole,
)
from ext_common.compat.patching import before, replace

logger = logging.getLogger(__name__)

_OWN_NAMES = r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+|_last){}\.pt"
_WRITE_ATTEMPTS = 3


def allow_what_checkpoints_hold() -> None:
    """Symptom: since torch 2.6 a checkpoint of a legacy architecture ends in an UnpicklingError.

    It holds the architecture's options as an argparse.Namespace; one of `--eval-bleu` holds what
    was logged as arrays of numbers. Nothing else is allowed here.

    Thread: fairseq 5610, RVC 2419; PR 5611 switches the safety off instead.
    """
    allow_namespace()


def explain_unreadable_checkpoints() -> None:
    """Symptom: a truncated, foreign or malicious file ends in a traceback of torch's zip reader.

    Thread: fairseq 2684 (a damaged file).
    """

    def make(original: Callable) -> Callable:
        def load_checkpoint_to_cpu(path, *args, **kwargs):
            try:
                state = original(path, *args, **kwargs)
            except Exception as error:
                reason = why_unreadable(os.fspath(path), error)
                if reason is None:
                    raise
                raise UserError(reason) from error
            return _ema_from_model(state) if _ema_wanted else state

        return load_checkpoint_to_cpu

    replace(checkpoint_utils, "load_checkpoint_to_cpu", make, ("torch.load(f, map_location",))

    def make_ema(original: Callable) -> Callable:
        def load_ema_from_checkpoint(fpath):
            try:
                return original(fpath)
            except Exception as error:
                if isinstance(error, KeyError) and error.args == ("ema",):
                    raise UserError(
                        f"{fpath} holds no averaged weights: it was trained without --store-ema"
                    ) from error
                reason = why_unreadable(os.fspath(fpath), error)
                if reason is None:
                    raise
                raise UserError(reason) from error

        return load_ema_from_checkpoint

    replace(checkpoint_utils, "load_ema_from_checkpoint", make_ema, ('["ema"]',))


def explain_checkpoints_of_other_models() -> None:
    """Symptom: a checkpoint of another plugin or size ends in an assertion that prints everything.

    Thread: fairseq 3683, 3964, 3677, 4717 ("Could not infer task type").
    """

    def make(original: Callable) -> Callable:
        def load_model_ensemble_and_task(filenames, *args, **kwargs):
            for filename in filenames if not kwargs.get("suffix") else ():
                if not os.path.exists(filename) and not PathManager.exists(filename):
                    if kwargs.get("num_shards", 1) == 1:
                        raise UserError(f"{filename} does not exist: give the path of a checkpoint")
            try:
                return original(filenames, *args, **kwargs)
            except (AssertionError, RuntimeError, KeyError) as error:
                reason = _why_unfit(str(filenames[0]), error)
                if reason is None:
                    raise
                raise UserError(reason) from error

        return load_model_ensemble_and_task

    replace(
        checkpoint_utils, "load_model_ensemble_and_task", make, ("tasks.setup_task(cfg.task, from",)
    )


def resume_from_whole_checkpoints() -> None:
    """Symptom: a file cut short by a full disk or an older run's kill stops every later start.

    A damaged checkpoint_last.pt is passed over for the newest whole checkpoint of its folder, with
    a warning. Here too: `--store-ema` turned on when resuming a run without (KeyError 'model':
    Trainer.load_checkpoint uses what it deleted) begins with the model's weights, and a checkpoint
    that does not fit says which parameter, instead of "ensure that the architectures match".

    Thread: fairseq 2684, 1192.
    """

    def make(original: Callable) -> Callable:
        def load_checkpoint(self, filename, *args, **kwargs):
            global _ema_wanted
            filename = whole_checkpoint(filename, self.checkpoint_suffix)
            _ema_wanted = bool(self.cfg.ema.store_ema)
            try:
                return original(self, filename, *args, **kwargs)
            except UserError:
                raise
            except Exception as error:
                # fairseq hides what a model said in words behind "ensure that the architectures match"
                said = _user_error_behind(error)
                reason = str(said) if said else _why_unfit(filename, error)
                if reason is None:
                    raise
                raise UserError(reason) from error
            finally:
                _ema_wanted = False

        return load_checkpoint

    replace(
        trainer.Trainer,
        "load_checkpoint",
        make,
        ("Cannot load model parameters from checkpoint", 'if "ema" not in extra_state'),
    )


_ema_wanted = False


def _ema_from_model(state: dict) -> dict:
    extra = state.get("extra_state")
    if isinstance(extra, dict) and "ema" not in extra and "model" in state:
        logger.warning("no averaged weights in the checkpoint: they begin as the model's weights")
        extra["ema"] = OrderedDict(state["model"])
    return state


def write_checkpoints_whole() -> None:
    """Symptom: kill -9 inside a copy leaves a truncated checkpoint_last.pt, which resume picks up.

    Only the first name of a checkpoint is written aside and renamed; `_best` and `_last` are then
    copied in place (checkpoint_utils.save_checkpoint, file_io.PathManager.copy), and nothing is
    synced. Here every file is written aside, synced and renamed. A retry begins a new file: the
    original appends to the half-written one.

    Also here: a metric logged as np.float64 makes a file that weights_only refuses, so numpy
    scalars become Python numbers on the way.

    Thread: fairseq 2684, 5603 (numpy).
    """

    def make(original: Callable) -> Callable:
        def torch_persistent_save(obj, filename, async_write=False):
            if async_write or not _is_local(filename):
                return original(obj, filename, async_write=async_write)
            obj = plain_numbers(obj)
            _write_with_retries(filename, obj)

        return torch_persistent_save

    replace(checkpoint_utils, "torch_persistent_save", make, ('filename + ".tmp"', "async_write"))

    def make_copy(original: Callable) -> Callable:
        def copy(src_path, dst_path, overwrite=False):
            if not (_is_local(src_path) and _is_local(dst_path)):
                return original(src_path, dst_path, overwrite=overwrite)
            with open(src_path, "rb") as source, written_whole(dst_path) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            return dst_path

        return copy

    replace(PathManager, "copy", make_copy, ("shutil.copyfile(src_path, dst_path)",))


def forget_the_run_before() -> None:
    """Symptom: the second training of one process never writes checkpoint_best.pt.

    The best value is an attribute of save_checkpoint and outlives the run, the count of --patience
    one of should_stop_early; load_checkpoint, which every training calls once before it begins,
    sets the former again from the checkpoint it resumes.

    Thread: none found.
    """

    def forget(cfg, trainer, **kwargs):
        if hasattr(checkpoint_utils.save_checkpoint, "best"):
            del checkpoint_utils.save_checkpoint.best
        for train in training_commands():
            for name in ("best", "num_runs"):
                vars(train.should_stop_early).pop(name, None)

    before(checkpoint_utils, "load_checkpoint", forget, ("save_checkpoint.best = extra_state",))


GAPS = (
    allow_what_checkpoints_hold,
    explain_unreadable_checkpoints,
    explain_checkpoints_of_other_models,
    resume_from_whole_checkpoints,
    write_checkpoints_whole,
    forget_the_run_before,
)


# --- what the gaps stand on ---------------------------------------------------------------------


def whole_checkpoint(path: str, suffix: str = "") -> str:
    """`path`, or the newest whole checkpoint beside it where `path` is a damaged `_last`."""
    if not _is_local(path) or not os.path.isfile(path) or is_whole(path):
        return path
    folder, name = os.path.split(path)
    others = [
        os.path.join(folder, other)
        for other in os.listdir(folder or ".")
        if other != name and re.fullmatch(_OWN_NAMES.format(re.escape(suffix)), other)
    ]
    whole = sorted((other for other in others if is_whole(other)), key=os.path.getmtime)
    damaged = f"{path} is truncated ({os.path.getsize(path):,} bytes)"
    if not whole:
        raise UserError(
            f"{damaged} and there is no whole checkpoint beside it: delete it to begin again"
        )
    if name != f"checkpoint_last{suffix}.pt":
        raise UserError(f"{damaged}: give another one, the newest whole one here is {whole[-1]}")
    logger.warning("%s: continuing from %s", damaged, whole[-1])
    return whole[-1]


def _why_unfit(path: str, error: Exception) -> str | None:
    text = str(error)
    misfit = why_misfit(path, error)
    if misfit is not None:
        return misfit
    unknown = re.match(r"Could not infer (task|model) type from", text)
    # fairseq formats its own message about an unknown model twice and trips over it.
    if unknown or (isinstance(error, KeyError) and error.args == ("'_name'",)):
        part = unknown[1] if unknown else "model"
        return (
            f"{path} was trained with the {part} {_named(path, part)}, which is not registered "
            "here: add the --user-dir it was trained with"
        )
    if re.match(r"(Criterion|Optimizer) does not match; please reset", text):
        return f"{path}: {first_line(error)}"
    return None


def _user_error_behind(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _named(path: str, part: str) -> str:
    try:
        return repr(checkpoint_utils.load_checkpoint_to_cpu(path)["cfg"][part]["_name"])
    except Exception:
        return "of an unknown name"


def _write_with_retries(path: str, obj: Any) -> None:
    for attempt in range(1, _WRITE_ATTEMPTS + 1):
        try:
            with written_whole(path) as file:
                torch.save(obj, file)
            break
        except UserError:
            raise
        except Exception:
            if attempt == _WRITE_ATTEMPTS:
                raise
            logger.warning("writing %s failed, trying again", path, exc_info=True)
            time.sleep(2.5)
    foreign = foreign_globals(path)
    if foreign:
        logger.warning(
            "%s holds %s, which will be refused when it is read: keep plain numbers, text, lists "
            "and dicts in the task's state and in logged metrics",
            path,
            ", ".join(foreign),
        )


def _is_local(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and not PathManager.path_requires_pathmanager(
        os.fspath(path)
    )
