"""fairseq-train seen from outside: its output kept in a file, a few lines of it on the screen."""

import contextlib
import sys
import time

from steps import run_command

from ext_common.cli import UserError
from ext_common.trainlog import parse_log


class TrainingDisplay:
    """A line for each validation; on a terminal also one that follows the updates."""

    def __init__(
        self,
        updates,
        log,
        stream=None,
        clock=time.monotonic,
        metric="accuracy",
        unit=" %",
        digits=1,
    ):
        """updates: how many in all; log: open file that gets every line; metric, unit, digits: what of
        a validation is shown, and how many digits behind the point.
        """
        self.metric, self.unit, self.digits = metric, unit, digits
        self.updates, self.log = updates, log
        self.stream, self.clock = stream or sys.stdout, clock
        self.began = self.loss = None
        self.first = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()

    def line(self, text):
        """One line of fairseq's output."""
        self.log.write(text)
        self.log.flush()
        for point in parse_log([text]):
            if point.update is None:
                continue
            if self.began is None:
                self.began, self.first = self.clock(), point.update
            if point.subset == "train_inner":
                self.loss = point.stats.get("loss", self.loss)
                self.follow(point.update)
            elif point.subset != "train" and self.metric in point.stats:
                self.validated(point)

    def validated(self, point):
        self.clear()
        loss = "" if self.loss is None else f"training loss {self.loss:6.3f}   "
        left = self.time_left(point.update)
        print(
            f"update {point.update:5}/{self.updates}   {loss}"
            f"{self.metric} on {point.subset} {point.stats[self.metric]:5.{self.digits}f}{self.unit}{left}",
            file=self.stream,
            flush=True,
        )

    def follow(self, update):
        if self.stream.isatty():
            text = f"update {update:5}/{self.updates}   training loss {self.loss:6.3f}"
            self.stream.write(f"\r{text}{self.time_left(update)}\033[K")
            self.stream.flush()

    def clear(self):
        if self.stream.isatty():
            self.stream.write("\r\033[K")
            self.stream.flush()

    def time_left(self, update):
        """`   0:42 left`, nothing where it is not known or over."""
        done = update - self.first
        if done <= 0 or update >= self.updates:
            return ""
        seconds = round((self.clock() - self.began) / done * (self.updates - update))
        return f"   {seconds // 60}:{seconds % 60:02} left"

    def check(self, best):
        """UserError where training ended without a checkpoint."""
        if not best.exists():
            raise UserError(f"training wrote no {best}: see {self.log.name}")


def train_shown(
    steps,
    data,
    command,
    updates,
    best,
    name=None,
    log="train.log",
    inputs=(),
    prepared="corpus.json",
    **shown,
):
    """The step that trains: `command` with its output appended to a log and a few lines shown.

    best: the checkpoint it leaves; name: of the step; log: file in the folder of the steps; inputs: files
    that it reads beside DATA; prepared: the file by which DATA is known; shown: what of a validation, as
    TrainingDisplay takes it.
    """
    log = steps.folder / log

    def show_training(command):
        print(f"(its output goes to {log})", flush=True)
        # Appended: the curve of a run that was stopped goes on.
        with open(log, "a", encoding="utf-8") as file:
            with TrainingDisplay(updates, file, **shown) as display:
                try:
                    run_command(command, on_line=display.line)
                except UserError as error:
                    raise UserError(explain_failure(error, log)) from None
        display.check(best)

    steps.do(
        name or f"train for {updates} updates",
        command,
        inputs=[data / prepared, *inputs],
        outputs=[best],
        run=show_training,
    )


def explain_failure(error, log):
    """A sentence for a training that failed: what it said itself, and where the rest is."""
    said = ""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        said = said or next((line for line in reversed(lines) if line.strip()), "")
    said = said.removeprefix("error: ").strip()
    return f"training failed: {said} ({log} has all of it)" if said else f"{error}; see {log}"
