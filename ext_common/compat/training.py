"""Around training: averaged weights (EMA), bf16, log file, best metric, data folder, the end."""

import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from fairseq import options, trainer, utils
from fairseq.data import data_utils, iterators
from fairseq.logging import progress_bar
from fairseq.models.ema import ema
from omegaconf import open_dict
from torch.utils.data import dataloader

from ext_common.cli import UserError
from ext_common.compat import processes
from ext_common.compat.messages import check_training
from ext_common.compat.patching import replace

logger = logging.getLogger(__name__)

# fairseq's default of --best-checkpoint-metric.
_DEFAULT_METRIC = "loss"
# Seconds that the end of a program waits for its loading threads: longer than a batch takes.
_PATIENCE = 15.0


def average_any_model() -> None:
    """Symptom: `--store-ema` crashes on BatchNorm, and leaves parameters such as `inversion` at 0.

    EMA._step_internal multiplies the integer num_batches_tracked by the decay, and skips every
    name that contains "version" where it means fairseq's marker buffers named exactly so.
    Integers are copied here; the update is otherwise the original's.
    """

    def make(original: Callable) -> Callable:
        def _step_internal(self, new_model, updates=None):
            averaged = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
            result = {}
            for name, value in new_model.state_dict().items():
                if isinstance(value, dict) or name.rpartition(".")[2] == "version":
                    continue
                mean = averaged.get(name)
                if mean is None:
                    mean = value.float().clone() if value.ndim == 1 else value.clone()
                if value.shape != mean.shape:
                    raise ValueError(f"{name} is {value.shape}, its average {mean.shape}")
                if name in self.skip_keys or not torch.is_floating_point(mean):
                    mean.copy_(value)
                else:
                    mean.mul_(self.decay)
                    mean.add_(value.to(dtype=mean.dtype), alpha=1 - self.decay)
                result[name] = mean
            self.restore(result, build_fp32_params=False)

        return _step_internal

    replace(ema.EMA, "_step_internal", make, ('if "version" in key', "ema_param.mul_(decay)"))


def bf16_without_tpu() -> None:
    """Symptom: `--bf16` ends in 'NoneType' object has no attribute 'xla_device'.

    The parser takes it for a TPU's flag (fairseq issue 2742). Where there is no torch_xla, only
    --tpu itself means a TPU.
    """

    def make(original: Callable) -> Callable:
        def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
            result = original(parser, input_args, *args, **kwargs)
            given = sys.argv[1:] if input_args is None else input_args
            parsed = result[0] if isinstance(result, tuple) else result
            if getattr(parsed, "tpu", False) and "--tpu" not in given and utils.xm is None:
                parsed.tpu = False
            return result

        return parse_args_and_arch

    replace(options, "parse_args_and_arch", make, ("if args.bf16:", "args.tpu = True"))


def refuse_fp16_on_cpu() -> None:
    """Symptom: `--fp16` without a GPU fails deep in an optimizer step."""

    def make(original: Callable) -> Callable:
        def __init__(self, cfg, *args, **kwargs):
            on_cpu = cfg.common.cpu or not torch.cuda.is_available()
            if cfg.common.fp16 and on_cpu and not cfg.common.tpu:
                raise UserError("--fp16 needs a GPU: use --bf16, or leave it out")
            return original(self, cfg, *args, **kwargs)

        return __init__

    replace(trainer.Trainer, "__init__", make, ("cfg.common.fp16",))


def write_log_lines_once() -> None:
    """Symptom: with `--log-file` the lines of epoch N are written N times.

    progress_bar opens the file once more for each epoch.
    """

    def make(original: Callable) -> Callable:
        def progress_bar_(*args, log_file=None, **kwargs):
            opened = {getattr(h, "baseFilename", None) for h in progress_bar.logger.handlers}
            if log_file is not None and os.path.abspath(log_file) in opened:
                log_file = None
            return original(*args, log_file=log_file, **kwargs)

        return progress_bar_

    replace(progress_bar, "progress_bar", make, ("logging.FileHandler(filename=log_file)",))


def name_the_missing_data_folder() -> None:
    """Symptom: a mistyped data folder ends in a FileNotFoundError from a listing of it."""

    def make(original: Callable) -> Callable:
        def raise_if_valid_subsets_unintentionally_ignored(train_cfg):
            data = getattr(train_cfg.task, "data", None)
            for folder in utils.split_paths(data) if isinstance(data, str) else ():
                if not os.path.isdir(folder):
                    raise UserError(f"the data folder {folder} does not exist")
            return original(train_cfg)

        return raise_if_valid_subsets_unintentionally_ignored

    replace(
        data_utils,
        "raise_if_valid_subsets_unintentionally_ignored",
        make,
        ("_find_extra_valid_paths(train_cfg.task.data)",),
    )


def leave_foreign_workers_alone() -> None:
    """Symptom: "Exception ignored in _MultiProcessingDataLoaderIter.__del__ … AssertionError: can
    only test a child process", now and then with `--num-workers` above 0.

    A loader's worker is a fork and inherits the iterators its parent still holds; when its garbage
    collector finds one, PyTorch tries to end workers that are not this process's own.
    """

    def make(original: Callable) -> Callable:
        def __del__(self):
            workers = getattr(self, "_workers", None)
            if workers and getattr(workers[0], "_parent_pid", None) != os.getpid():
                return
            original(self)

        return __del__

    replace(dataloader._MultiProcessingDataLoaderIter, "__del__", make, ("_shutdown_workers()",))


def stop_loading_before_exit() -> None:
    """Symptom: now and then a finished run ends in "terminate called without an active exception"
    and exit code -6.

    BufferedIterator reads ahead in a daemon thread that nobody stops: after --max-update it is in
    the middle of the data, after the last validation it may still be ending its workers. While
    Python finalises it ends such a thread as soon as the thread asks for the GIL; where that is in
    a destructor of PyTorch (each operation gives the GIL away and takes it back in one), C++ aborts
    the process. Here the threads are stopped while Python is still whole, and the DataLoader's
    workers with them.
    """
    atexit.unregister(stop_loading)
    atexit.register(stop_loading)


def stop_loading(patience: float = _PATIENCE) -> None:
    """Stop the threads that read ahead; returns when they have ended or after ``patience`` seconds.

    A thread ends with the batch it is at. One that needs longer is left to its fate.
    """
    loading = [t for t in threading.enumerate() if isinstance(t, iterators.BackgroundConsumer)]
    # A loader's worker is a fork of such a thread: it is itself the one that is listed.
    threads = [thread for thread in loading if thread is not threading.current_thread()]
    for thread in threads:
        thread._max_len = 0
    deadline = time.monotonic() + patience
    for thread in threads:
        while thread.is_alive() and time.monotonic() < deadline:
            # It may be waiting for room for the batch, and then for the mark of the end.
            try:
                thread._queue.get(timeout=0.05)
            except queue.Empty:
                pass


def take_the_best_metric_from_the_task() -> None:
    """Symptom: a task that is judged by BLEU or accuracy keeps the checkpoint of lowest loss, or
    with `--best-checkpoint-metric bleu` alone the worst one, as it is then minimised.

    A task may have ``best_metric = (name, maximize)``; it counts where no metric was asked for.
    """

    def make(original: Callable) -> Callable:
        def __init__(self, cfg, task, *args, **kwargs):
            original(self, cfg, task, *args, **kwargs)
            _choose_best_metric(self.cfg, task)

        return __init__

    replace(trainer.Trainer, "__init__", make, ("self.cfg = cfg",))


def mend_the_training_command() -> None:
    """The gaps inside fairseq_cli.train, which need not be imported yet when the plugin is.

    - `--best-checkpoint-metric` naming no metric: KeyError after the first epoch (fairseq issues
      3881, 2141, 1910). One sentence lists those there are; a metric that only the task's
      post_validate adds no longer fails at the second validation.
    - no optimizer, no batch size, …: see messages.check_training.
    - the count of `--patience` outlives a training in one process.
    - fairseq-hydra-train under torchrun: see processes.join_late.
    """

    def make(original: Callable) -> Callable:
        def import_user_module(args):
            original(args)
            _mend_train()

        return import_user_module

    replace(utils, "import_user_module", make, ("import_user_module.memo",))
    _mend_train()


GAPS = (
    average_any_model,
    bf16_without_tpu,
    refuse_fp16_on_cpu,
    write_log_lines_once,
    name_the_missing_data_folder,
    leave_foreign_workers_alone,
    stop_loading_before_exit,
    take_the_best_metric_from_the_task,
    mend_the_training_command,
)


def _choose_best_metric(cfg: Any, task: Any) -> None:
    best = getattr(task, "best_metric", None)
    flags = ("--best-checkpoint-metric", "checkpoint.best_checkpoint_metric")
    asked = any(argument.lstrip("+").startswith(flags) for argument in sys.argv[1:])
    asked = asked or cfg.checkpoint.best_checkpoint_metric != _DEFAULT_METRIC
    if best is None or asked or cfg.dataset.disable_validation:
        return
    # The same object as in fairseq_cli.train.main, which reads it after every validation.
    with open_dict(cfg):
        cfg.checkpoint.best_checkpoint_metric, cfg.checkpoint.maximize_best_checkpoint_metric = best
    rule = "highest" if best[1] else "lowest"
    logger.info(f"the best checkpoint is the one with the {rule} {best[0]}")


def _mend_train() -> None:
    for module in _training_commands():
        replace(module, "get_valid_stats", _with_known_metrics, ("best_checkpoint_metric",))
        replace(module, "add_defaults", _after_joining_late)


def _training_commands() -> list[ModuleType]:
    """fairseq_cli.train where it is imported, under its name or as the program itself."""
    candidates = (sys.modules.get("fairseq_cli.train"), sys.modules.get("__main__"))
    needed = ("get_valid_stats", "add_defaults", "should_stop_early")
    return [module for module in candidates if all(hasattr(module, name) for name in needed)]


def _with_known_metrics(original: Callable) -> Callable:
    def get_valid_stats(cfg, trainer, stats, tracking_best):
        metric = cfg.checkpoint.best_checkpoint_metric
        stats = original(cfg, trainer, stats, tracking_best and metric in stats)
        return _ValidStats(stats)

    return get_valid_stats


class _ValidStats(OrderedDict):
    def __missing__(self, name):
        known = set(self) - {"num_updates", "wps", "ups", "wpb", "bsz"}
        raise UserError(
            f"--best-checkpoint-metric {name} is not measured in validation: "
            f"choose one of {', '.join(sorted(known))}"
        )


def _after_joining_late(original: Callable) -> Callable:
    def add_defaults(cfg):
        original(cfg)
        check_training(cfg)
        processes.join_late(cfg)

    return add_defaults
