"""What a user reads: known harmless warnings left out, mistakes told in one sentence."""

import argparse
import ast
import importlib.util
import logging
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

from ext_common.cli import Parser, UsageError, UserError, refused_by_the_system, why_full
from ext_common.compat.patching import after, as_expected, replace

# (category, start of the message as a regular expression, module that is blamed; "" for any)
_HARMLESS = (
    (FutureWarning, r"`torch\.jit\.script` is deprecated", r"torch\.jit\._script"),
    (FutureWarning, r"`torch\.cuda\.amp\.autocast\(args\.\.\.\)` is deprecated", ""),
    (FutureWarning, r"`torch\.cuda\.amp\.GradScaler\(args\.\.\.\)` is deprecated", ""),
    (FutureWarning, r"`broadcast_buffers` is deprecated", ""),
    (UserWarning, r"'pin_memory' argument is set as true but no accelerator is found", ""),
    (UserWarning, r"hydra\.experimental\.initialize\(\) is no longer experimental", ""),
    (UserWarning, r"hydra\.experimental\.compose\(\) is no longer experimental", ""),
    (UserWarning, r"\nThe version_base parameter is not specified", ""),
    (UserWarning, r"In 'config': Usage of deprecated keyword in package header", ""),
    (UserWarning, r"\n'config' is validated against ConfigStore schema with the same name", ""),
    (UserWarning, r"\nThe strict flag in the compose API is deprecated", ""),
)
# logger -> how the lines begin
_HARMLESS_LOG_LINES = {
    "fairseq.tasks.fairseq_task": (
        "reuse_dataloader = ",
        "rebuild_batches = ",
        "can_reuse_epoch_itr = ",
    ),
    "fairseq.tasks.text_to_speech": ("Please install tensorboardX",),
}
# the least that flags of fairseq's parsers may be; it checks none of them
_LEAST = {
    1: "batch_size max_tokens batch_size_valid max_tokens_valid update_freq log_interval save_interval"
    " validate_interval beam nbest num_shards distributed_world_size",
    0: "buffer_size num_workers max_epoch max_update seed save_interval_updates lr clip_norm",
}
# said for every epoch and every validation; once is enough
_ONCE_LOG_LINES = {"fairseq.logging.progress_bar": ("tensorboard not found", "wandb not found")}


# Called before an error is printed, so that a line which is being rewritten is ended first.
before_an_error: list[Callable[[], None]] = []


def leave_out_harmless_warnings() -> None:
    """Symptom: every run begins with a page of deprecations that nobody but fairseq can act on.

    Only those listed above, by category and message; everything else is shown as ever. Two lines
    are out of reach of fairseq-train, as they come before it imports the plugin: torch.jit.script
    and tensorboardX.

    Thread: none found.
    """
    for category, message, module in _HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for times, lines in ((0, _HARMLESS_LOG_LINES), (1, _ONCE_LOG_LINES)):
        for name, starts in lines.items():
            logger = logging.getLogger(name)
            if not any(isinstance(known, _AtMost) for known in logger.filters):
                logger.addFilter(_AtMost(times, starts))


class _AtMost(logging.Filter):
    """Lets lines with one of these beginnings pass so many times, and all others always."""

    def __init__(self, times: int, starts: tuple[str, ...]) -> None:
        super().__init__()
        self._left = dict.fromkeys(starts, times)

    def filter(self, record: logging.LogRecord) -> bool:
        for start, left in self._left.items():
            if str(record.msg).startswith(start):
                self._left[start] = left - 1
                return left > 0
        return True


def tell_mistakes_in_one_sentence() -> None:
    """Symptom: a mistyped path ends fairseq-train in thirty lines of traceback.

    Told in words are UserError (exit code 1, UsageError 2) and what fairseq itself refuses, by `sentence_of`;
    a bug keeps its traceback.

    Thread: none found.
    """
    if getattr(sys.excepthook, "_ext_common", False):
        return
    before = sys.excepthook

    def hook(kind, error, trace):
        # Ctrl-C is no bug; the process still ends by the signal
        sentence = "interrupted" if kind is KeyboardInterrupt else sentence_of(error)
        if sentence is None:
            return before(kind, error, trace)
        for action in before_an_error:
            action()
        tell(sentence)
        # after any other exception than SystemExit the code is 1
        if issubclass(kind, UsageError):
            sys.exit(2)

    hook._ext_common = True
    sys.excepthook = hook


def tell_mistakes_under_hydra() -> None:
    """Symptom: the same for fairseq-hydra-train: hydra catches the error and prints a traceback.

    Thread: none found.
    """
    from hydra.core.utils import JobReturn

    original = JobReturn.return_value
    if getattr(original.fget, "_ext_common", False):
        return
    if not as_expected(original.fget, ("raise self._return_value",), "JobReturn.return_value"):
        return

    def return_value(self):
        error = getattr(self, "_return_value", None)
        sentence = sentence_of(error) if isinstance(error, BaseException) else None
        if sentence is not None:
            tell(sentence)
            sys.exit(2 if isinstance(error, UsageError) else 1)
        return original.fget(self)

    return_value._ext_common = True
    JobReturn.return_value = property(return_value, original.fset)


def tell_mistakes_of_workers() -> None:
    """Symptom: a mistake found by a loading worker has a traceback of 16 lines for its sentence.

    torch._utils.ExceptionWrapper makes what was printed in the worker the message of a new error.

    Thread: none found.
    """
    from torch._utils import ExceptionWrapper

    def make(original: Callable) -> Callable:
        def reraise(self):
            kind = self.exc_type
            if not issubclass(kind, UserError):
                return original(self)
            sentence = self.exc_msg.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
            raise (UsageError if issubclass(kind, UsageError) else UserError)(sentence.strip())

        return reraise

    replace(ExceptionWrapper, "reraise", make, ("Original {self.exc_msg}",))


def tell_mistyped_flags_in_one_sentence() -> None:
    """Symptom: a mistyped flag ends in a hundred lines of all flags there are, and then its name.

    fairseq.options makes its parsers by `argparse.ArgumentParser`, after the plugin is imported.

    Thread: none found.
    """
    from fairseq import options

    if isinstance(options.argparse, _Argparse):
        return
    if as_expected(options.get_parser, ("argparse.ArgumentParser(",), "options.get_parser"):
        options.argparse = _Argparse("argparse")


class _Argparse(types.ModuleType):
    """argparse, but for the parser."""

    def __getattr__(self, name: str):
        return getattr(argparse, name)

    class ArgumentParser(Parser):
        def __init__(self, **kwargs) -> None:
            kwargs.setdefault("formatter_class", argparse.HelpFormatter)
            super().__init__(**kwargs)


def tell_missing_flags_and_impossible_numbers() -> None:
    """Symptom: without `--arch` fairseq-train ends in a RuntimeError of no words, without `--path` fairseq-
    interactive in "argument of type 'NoneType' is not iterable"; `--batch-size -3` finds no data,
    `--log-interval 0` divides by it.

    Thread: none found.
    """
    from fairseq import options

    def make(original: Callable) -> Callable:
        def parse_args_and_arch(parser, *args, **kwargs):
            try:
                parsed = original(parser, *args, **kwargs)
            except RuntimeError as error:
                if error.args:
                    raise
                raise UsageError(
                    "--arch, the name of the network, is missing: fairseq-train --help lists them"
                ) from None
            except KeyError as error:
                if error.args != (None,):
                    raise
                raise UsageError(
                    "--task is missing: give the one that the checkpoint was trained with"
                ) from None
            check_flags(parsed[0] if isinstance(parsed, tuple) else parsed)
            return parsed

        return parse_args_and_arch

    replace(
        options, "parse_args_and_arch", make, ("raise RuntimeError()", "TASK_REGISTRY[args.task]")
    )


def refuse_trainings_that_cannot_begin() -> None:
    """Symptom: without `--optimizer` or a batch size fairseq-train ends in a traceback, with
    `--adam-betas x` in a NameError, and a mistyped `--restore-file` begins from scratch.

    Thread: none found.
    """
    # not above: a command imports this room before fairseq, whose import says too much
    from ext_common.compat.command import in_training_command

    in_training_command(_check_first)


def _check_first(train: types.ModuleType) -> None:
    after(train, "add_defaults", _check, ("merge_with_parent",))


def _check(_none: None, cfg: Any) -> None:
    check_training(cfg)


def check_flags(args: argparse.Namespace) -> None:
    """UsageError for a missing --path, for numbers that are too small, and for what is no dictionary."""
    if getattr(args, "path", "") is None:
        raise UsageError("--path is missing: give a checkpoint that fairseq-train wrote")
    for least, names in _LEAST.items():
        for name in names.split():
            value = getattr(args, name, None)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int | float) and one < least:
                    flag = f"--{name.replace('_', '-')}"
                    raise UsageError(f"{flag} {one} is too small: give {least} or more")
    overrides = getattr(args, "model_overrides", None)
    if overrides and not isinstance(_literal(overrides), dict):
        raise UsageError(
            f"--model-overrides {overrides} is no dictionary: give one such as \"{{'data': 'DIR'}}\""
        )


def check_training(cfg: Any) -> None:
    """UsageError for a training that cannot begin: asked before anything is built."""
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise UsageError("--batch-size or --max-tokens, the size of a batch, is missing")
    if not cfg.optimizer:
        raise UsageError("--optimizer is missing: adam is usual")
    betas = cfg.optimizer.get("adam_betas")
    if isinstance(betas, str) and not _are_shares(_literal(betas)):
        raise UsageError(f'--adam-betas {betas} are no two numbers in [0, 1): give "(0.9, 0.98)"')
    if cfg.common.tpu and importlib.util.find_spec("torch_xla") is None:
        raise UsageError("--tpu needs the package torch_xla: leave it out")
    restore, save_dir = cfg.checkpoint.restore_file, cfg.checkpoint.save_dir
    if restore and os.path.dirname(restore) and "://" not in restore:
        elsewhere = os.path.realpath(os.path.dirname(restore)) != os.path.realpath(save_dir)
        if elsewhere and not os.path.isfile(restore):
            raise UsageError(f"--restore-file {restore} is no file: give the path of a checkpoint")


def sentence_of(error: BaseException) -> str | None:
    """What a user reads of an error; None for what may be a bug, whose traceback is needed.

    In words: UserError; an environment that refuses; a path that was typed; parts of fairseq's
    configuration that are missing; and what fairseq's own code raises or asserts with a text, which is
    its check of options.
    """
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        typed = any(str(error.filename) in argument for argument in sys.argv[1:])
        told = typed and not why_full(error)
        return f"{error.filename}: {error.strerror}" if told else refused_by_the_system(error)
    if missing := re.match(r"Error merging override \w+\.(\w+)=null", text):
        return f"--{missing[1].replace('_', '-')} is missing"
    if isinstance(error, MissingMandatoryValue):
        key = text.partition("full_key: ")[2].partition(" ")[0]
        return f"{key} is missing: give it a value (of a recipe's task, as task.{key}=…)"
    if isinstance(error, OmegaConfBaseException) and "Interpolation key" in text:
        key = re.search(r"Interpolation key '([\w.]+)'", text)
        return (
            f"--task, --arch and --criterion do not belong together: one needs {key[1] if key else 'more'},"
            " which the others do not have"
        )
    place = _raised_by_fairseq(error)
    return f"{text} ({place})" if text and place else None


def _raised_by_fairseq(error: BaseException) -> str | None:
    """File and line in fairseq where it refuses something; None for any other error."""
    if not (isinstance(error, AssertionError | ValueError) or type(error) is Exception):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    last = frames[-1]
    found = re.search(r"(?:^|/)((?:fairseq|fairseq_cli)/.+\.py)$", last.filename)
    own = isinstance(error, AssertionError) or (last.line or "").startswith("raise ")
    return f"{found[1]}, line {last.lineno}" if found and own else None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _are_shares(value: Any) -> bool:
    numbers = isinstance(value, tuple | list) and len(value) == 2
    return numbers and all(isinstance(one, int | float) and 0 <= one < 1 for one in value)


def tell(sentence: str) -> None:
    """Print a mistake in its sentence."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)


GAPS = (
    leave_out_harmless_warnings,
    tell_mistakes_in_one_sentence,
    tell_mistakes_under_hydra,
    tell_mistakes_of_workers,
    tell_mistyped_flags_in_one_sentence,
    tell_missing_flags_and_impossible_numbers,
    refuse_trainings_that_cannot_begin,
)
