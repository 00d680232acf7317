"""Around training: averaged weights (EMA), bf16, log file, data folder, the command itself, the end."""

import atexit
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

import torch
from fairseq import options, trainer, utils
from fairseq.data import data_utils, iterators
from fairseq.logging import progress_bar
from fairseq.models.ema import ema
from fairseq.optim import amp_optimizer
from fairseq.tasks import TASK_REGISTRY
from torch.utils.data import dataloader

from ext_common.cli import UserError
from ext_common.compat.command import in_training_command
from ext_common.compat.patching import after, as_expected, before, replace
from ext_common.given import given

# Seconds that the end of a program waits for its loading threads: longer than a batch takes.
_PATIENCE = 15.0


def average_any_model() -> None:
    """Symptom: `--store-ema` crashes on BatchNorm, and leaves parameters such as `inversion` at 0.

    EMA._step_internal multiplies the integer num_batches_tracked by the decay, and skips every
    name that contains "version" where it means fairseq's marker buffers named exactly so.
    Integers are copied here; the update is otherwise the original's.

    Thread: none in fairseq's; BiomedGPT 16 has it too.
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

    The parser takes it for a TPU's flag. Where there is no torch_xla, only --tpu itself means a TPU.

    Thread: fairseq 2742.
    """

    def make(original: Callable) -> Callable:
        def parse_args_and_arch(parser, *args, **kwargs):
            result = original(parser, *args, **kwargs)
            parsed = result[0] if isinstance(result, tuple) else result
            if getattr(parsed, "tpu", False) and utils.xm is None and "tpu" not in given():
                parsed.tpu = False
            return result

        return parse_args_and_arch

    replace(options, "parse_args_and_arch", make, ("if args.bf16:", "args.tpu = True"))


def unscale_once() -> None:
    """Symptom: under `--amp` SGD stands still, and Adam's eps is as if 128 times larger or more.

    Gradients are divided by the loss scale when they are clipped, for the optimizer of PyTorch, and
    again in the step, which names fairseq's own around it: torch's GradScaler takes it for another.

    Thread: none found.
    """

    def make(_original: Callable) -> Callable:
        def step(self):
            self.scaler.step(self.optimizer)
            self.scaler.update()

        return step

    replace(amp_optimizer.AMPOptimizer, "step", make, ("self.scaler.step(self.fp32_optimizer)",))


def refuse_fp16_on_cpu() -> None:
    """Symptom: `--fp16` without a GPU fails deep in an optimizer step.

    Thread: none found.
    """

    def refuse_fp16(self, cfg, *args, **kwargs):
        on_cpu = cfg.common.cpu or not torch.cuda.is_available()
        if cfg.common.fp16 and on_cpu and not cfg.common.tpu:
            raise UserError("--fp16 needs a GPU: use --bf16, or leave it out")

    before(trainer.Trainer, "__init__", refuse_fp16, ("if cfg.common.fp16:",))


def write_log_lines_once() -> None:
    """Symptom: with `--log-file` the lines of epoch N are written N times.

    progress_bar opens the file once more for each epoch.

    Thread: none found.
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
    """Symptom: a mistyped data folder ends in a FileNotFoundError from a listing of it.

    Thread: none found.
    """

    def make(original: Callable) -> Callable:
        def raise_if_valid_subsets_unintentionally_ignored(train_cfg):
            data = getattr(train_cfg.task, "data", None)
            task = TASK_REGISTRY.get(getattr(train_cfg.task, "_name", None))
            found = os.path.exists if getattr(task, "data_may_be_file", False) else os.path.isdir
            for folder in utils.split_paths(data) if isinstance(data, str) else ():
                if not found(folder):
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

    Thread: none in fairseq's; many in others', as Patch-NetVLAD 34.
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

    Thread: none found.
    """
    reader = iterators.BackgroundConsumer
    expects = ("self.count >= self._max_len", "self._queue.put(_sentinel)")
    if as_expected(reader, expects, "BackgroundConsumer"):
        atexit.unregister(stop_loading)
        atexit.register(stop_loading)


def stop_loading(patience: float = _PATIENCE) -> None:
    """Stop the threads that read ahead; returns when they have ended or after `patience` seconds.

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


def name_the_metrics_there_are() -> None:
    """Symptom: `--best-checkpoint-metric` naming no metric ends in a KeyError after the first epoch.

    One sentence lists those there are; a metric that only the task's post_validate adds no longer
    fails at the second validation.

    Thread: fairseq 3881, 2141, 1910.
    """
    in_training_command(_know_the_metrics)


def give_mbart_its_options() -> None:
    """Symptom: `--task translation_from_pretrained_bart` ends in "has no attribute 'args'".

    It was written when a task called its options so.

    Thread: none found.
    """

    def name_them(_none: None, self, args, *_more: object) -> None:
        self.args = args

    task = TASK_REGISTRY["translation_from_pretrained_bart"]
    after(task, "__init__", name_them, ('args.langs.split(",")',))


GAPS = (
    average_any_model,
    bf16_without_tpu,
    unscale_once,
    refuse_fp16_on_cpu,
    write_log_lines_once,
    name_the_missing_data_folder,
    leave_foreign_workers_alone,
    stop_loading_before_exit,
    name_the_metrics_there_are,
    give_mbart_its_options,
)


def _know_the_metrics(train: ModuleType) -> None:
    replace(train, "get_valid_stats", _with_known_metrics, ("best_checkpoint_metric",))


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
