"""What a user reads: known harmless warnings left out, mistakes told in one sentence."""

import argparse
import logging
import sys
import types
import warnings
from collections.abc import Callable

from ext_common.cli import Parser, UsageError, UserError
from ext_common.compat.patching import replace

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
# said for every epoch and every validation; once is enough
_ONCE_LOG_LINES = {"fairseq.logging.progress_bar": ("tensorboard not found", "wandb not found")}


def leave_out_harmless_warnings() -> None:
    """Symptom: every run begins with a page of deprecations that nobody but fairseq can act on.

    Only those listed above, by category and message; everything else is shown as ever. Two lines
    are out of reach of fairseq-train, as they come before it imports the plugin: torch.jit.script
    and tensorboardX.
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

    Only UserError is told in words (exit code 1, UsageError 2); a bug keeps its traceback.
    """
    if getattr(sys.excepthook, "_ext_common", False):
        return
    before = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, UserError):
            _tell(error)
            if issubclass(kind, UsageError):
                sys.exit(2)
        else:
            before(kind, error, trace)

    hook._ext_common = True
    sys.excepthook = hook


def tell_mistakes_under_hydra() -> None:
    """The same for fairseq-hydra-train: hydra catches the error itself and prints a traceback."""
    from hydra.core.utils import JobReturn

    original = JobReturn.return_value
    if getattr(original.fget, "_ext_common", False):
        return

    def return_value(self):
        error = getattr(self, "_return_value", None)
        if isinstance(error, UserError):
            _tell(error)
            sys.exit(2 if isinstance(error, UsageError) else 1)
        return original.fget(self)

    return_value._ext_common = True
    JobReturn.return_value = property(return_value, original.fset)


def tell_mistakes_of_workers() -> None:
    """Symptom: a mistake found by a loading worker has a traceback of 16 lines for its sentence.

    torch._utils.ExceptionWrapper makes what was printed in the worker the message of a new error.
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
    """
    from fairseq import options

    if not isinstance(options.argparse, _Argparse):
        options.argparse = _Argparse("argparse")


class _Argparse(types.ModuleType):
    """argparse, but for the parser."""

    def __getattr__(self, name: str):
        return getattr(argparse, name)

    class ArgumentParser(Parser):
        def __init__(self, **kwargs) -> None:
            kwargs.setdefault("formatter_class", argparse.HelpFormatter)
            super().__init__(**kwargs)


def _tell(error: UserError) -> None:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)


GAPS = (
    leave_out_harmless_warnings,
    tell_mistakes_in_one_sentence,
    tell_mistakes_under_hydra,
    tell_mistakes_of_workers,
    tell_mistyped_flags_in_one_sentence,
)
