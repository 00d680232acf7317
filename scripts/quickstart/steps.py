"""What quickstarts and recipes are made of: commands that are shown, run, and skipped once done."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from ext_common.cli import UserError
from ext_common.manifest import atomic_json, sha256_file

ROOT = Path(__file__).resolve().parents[2]


class Steps:
    """The steps of one run in its folder, and the record of those that are done.

    A step is skipped when its command and the files it reads are what they were when it ended, and
    what it wrote is still there. Context manager: one process at a time works in a folder.
    """

    def __init__(self, folder, job, owned, fresh=False, flag="--out"):
        """job: what is run, JSON; its first key is the kind of run, and another job in the same folder
        is refused. owned: names in the folder that --fresh may remove. flag: how the folder was given.
        """
        self.folder, self.job, self.owned, self.fresh = Path(folder), job, owned, fresh
        self.kind, self.flag = next(iter(job)), flag

    @property
    def record_path(self):
        return self.folder / f"{self.kind}.json"

    def __enter__(self):
        here = self.record_path
        if self.folder.is_dir() and any(self.folder.iterdir()) and not here.exists():
            raise UserError(f"{self.folder} holds other files: give a new folder as {self.flag}")
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: give a folder as {self.flag}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.lock)
            raise UserError(
                f"another {self.kind} is at work in {self.folder}: wait for it, or give another "
                f"{self.flag}"
            ) from None
        try:
            self.open_record(here)
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(self, *_):
        os.close(self.lock)

    def open_record(self, here):
        self.record = {"job": self.job, "steps": {}}
        if here.exists() and not self.fresh:
            try:
                self.record = json.loads(here.read_text(encoding="utf-8"))
                before = self.record["job"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{here} is damaged: start over with --fresh") from None
            if before != self.job:
                raise UserError(
                    f"{self.folder} holds a run of {show_job(before)}, not of "
                    f"{show_job(self.job)}: give another {self.flag}, or start over with --fresh"
                )
        if self.fresh:
            for name in self.owned:
                path = self.folder / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self.save()

    def save(self):
        atomic_json(self.record_path, self.record)

    def is_done(self, name, key, outputs):
        """Whether step `name` ended with this `key` and its `outputs` are there."""
        return self.record["steps"].get(name) == key and all(p.exists() for p in outputs)

    def do(self, name, command, inputs=(), outputs=(), run=None, always=False):
        """Run a command unless it is done; returns whether it ran.

        inputs, outputs: files it reads and writes; run: what to call with the command, in place of
        letting it print; always: the command itself finds out whether there is something to do.
        """
        print(f"\n== {name}")
        key = step_key(command, inputs)
        if not always and self.is_done(name, key, outputs):
            print("done before: nothing to do")
            return False
        print(f"$ {show_command(command)}", flush=True)
        (run or run_command)(command)
        self.record["steps"][name] = step_key(command, inputs)
        self.save()
        return True


def step_key(command, inputs):
    """What decides whether a step has to be run again."""
    content = hashlib.sha256()
    for path in inputs:
        content.update(bytes.fromhex(sha256_file(path)) if path.exists() else b"-")
    # Paths in full: the same step from another working folder is typed differently.
    full = [os.path.abspath(p) if isinstance(p, os.PathLike) else str(p) for p in command]
    return {"command": full, "inputs": content.hexdigest()}


def run_command(command, on_line=None):
    """Run a command; `on_line` gets each line of its output, without it the output is shown.

    Raises UserError where it fails: what it printed has said why. It dies with this process.
    """
    parts = [str(part) for part in command]
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if on_line else {}
    sys.stdout.flush()
    process = subprocess.Popen(
        [program(parts[0]), *parts[1:]],
        stdin=subprocess.DEVNULL,
        # Not reached by Ctrl-C: it would print its own farewell beside ours.
        process_group=0,
        preexec_fn=die_with_parent,
        # A line of the log must not wait in a buffer.
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        errors="replace",
        **captured,
    )
    try:
        for line in process.stdout or ():
            on_line(line)
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    if code:
        raise UserError(f"this step failed (exit code {code}): {show_command(command)}")


def die_with_parent():
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def program(name):
    """The file of a program: Python and what is installed beside it come from this environment."""
    if name == "python":
        return sys.executable
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def show_command(command):
    """A command as one would type it; flags on lines of their own where it is long."""
    parts = [shlex.quote(str(part)) for part in command]
    line = " ".join(parts)
    if len(line) <= 100:
        return line
    lines, current = [], ""
    for part in parts:
        if current and len(current) + len(part) > 90 and part.startswith("-"):
            lines.append(current)
            current = "   "
        current = f"{current} {part}" if current else part
    return " \\\n".join([*lines, current])


def show_job(job):
    return " ".join(str(value) for value in job.values() if value is not None)


def relative(path):
    """A path as short as it can be typed from here."""
    path = os.path.abspath(path)
    here = os.path.relpath(path)
    return Path(path if here.startswith("..") else here)
