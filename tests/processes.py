"""Commands as processes of their own, without the seconds that importing torch and fairseq takes in each.

One process imports them once, and none of this project's modules, and forks for every command: the fork has
its own arguments, environment, folder, streams and exit code, as if it had been started. Commands that a
script of scripts/, a benchmark or torchrun starts are forks of it.
"""

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# what is imported before forking; a command that may not see fairseq loaded gets the first
_READY = {
    "python": ("numpy", "torch"),
    # torch imports _dynamo with the first optimizer, which takes longer than a tiny training
    "fairseq": (
        "numpy",
        "torch",
        "torch._dynamo",
        "sacrebleu",
        "fairseq_cli.train",
        "fairseq_cli.hydra_train",
    ),
}
_TRAINS = ("diffusion_ext.train", "diffusion_ext.distill")
# these load fairseq anyway
_LOADS_FAIRSEQ = (
    *_TRAINS,
    "fairseq_ext.average",
    "fairseq_ext.translation.prepare",
    "fairseq_ext.translation.translate",
    "fairseq_ext.backtranslation.generate",
    "fairseq_ext.backtranslation.assemble",
)
_BENCHMARKS = ("benchmarks.backtranslation", "benchmarks.translation")
_ROOT = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_servers: dict[str, subprocess.Popen] = {}
_turn = threading.Lock()


def run(
    words,
    cwd=None,
    env=None,
    input=None,
    capture_output=False,
    text=False,
    timeout=600,
    check=False,
    **streams,
) -> subprocess.CompletedProcess:
    """`subprocess.run` for `python -m MODULE …`, `python scripts/FILE …`, torchrun and fairseq's commands.

    Others are started as they are. streams: stdout and stderr, PIPE or (stderr) STDOUT.
    """
    words = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in words]
    kind = _kind(words)
    if capture_output:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if kind is None or not streams:
        return subprocess.run(
            words, cwd=cwd, env=env, input=input, text=text, timeout=timeout, check=check, **streams
        )
    with tempfile.TemporaryDirectory() as folder:
        names = {name: os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")}
        Path(names["stdin"]).write_bytes((input or "").encode() if text else input or b"")
        joined = streams.get("stderr") == subprocess.STDOUT
        files = [names["stdin"], names["stdout"], names["stdout" if joined else "stderr"]]
        code = run_on(files, words, cwd, env, timeout)
        out = Path(names["stdout"]).read_bytes()
        err = None if joined else Path(names["stderr"]).read_bytes()
    if text:
        out, err = out.decode(), err if err is None else err.decode()
    if check and code:
        raise subprocess.CalledProcessError(code, words, out, err)
    return subprocess.CompletedProcess(words, code, out, err)


def call(main, *args, cwd=None) -> subprocess.CompletedProcess:
    """What a command of ours says and ends with, in this process: where the process is not what is tested."""
    from ext_common import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        try:
            cli.run(main, [str(word) for word in args])
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_on(streams: list[str], words, cwd=None, env=None, timeout=600) -> int:
    """The exit code of such a command, whose standard input, output and errors are these files."""
    words = [str(word) for word in words]
    request = {
        "words": words,
        "cwd": os.fspath(cwd or os.getcwd()),
        "env": dict(os.environ if env is None else env),
        "streams": streams,
        "timeout": timeout,
    }
    code = _ask(_kind(words), request)
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout)
    return code


def _kind(words: list[str]) -> str | None:
    if Path(words[0]).name.startswith("fairseq-") and Path(words[0]).parent == _bin():
        return "fairseq"
    if _starts_others(words):
        return "fairseq"
    if words[:2] == [sys.executable, "-m"] and not words[2].startswith("pytest"):
        return "fairseq" if words[2] in _LOADS_FAIRSEQ else "python"
    return None


def _starts_others(words: list[str]) -> bool:
    if words[0] == sys.executable:
        return "scripts" in Path(words[1]).parts or words[1] == "-m" and words[2] in _BENCHMARKS
    return words[0] == str(_bin() / "torchrun")


def _bin() -> Path:
    return Path(sys.executable).parent


def _ask(kind: str, request: dict) -> int | None:
    with _turn:
        server = _servers.get(kind)
        if server is None or server.poll() is not None:
            server = _servers[kind] = subprocess.Popen(
                [sys.executable, __file__, kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            atexit.register(server.kill)
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


# --- in the process that forks ------------------------------------------------------------------------


def serve(kind: str) -> None:
    """Fork for each request on standard input and answer with its exit code; a fork runs it and returns."""
    # what fairseq prints while it is imported is nobody's output
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name in _READY[kind]:
        __import__(name)
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = {os.path.abspath(entry) for entry in listed if entry}
    installed = [entry for entry in sys.path[1:] if os.path.abspath(entry) not in own]
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return become(installed, **request)
        signal.signal(signal.SIGALRM, lambda *_, pid=pid: os.killpg(pid, signal.SIGKILL))
        signal.alarm(int(request["timeout"]))
        _, status = os.waitpid(pid, 0)
        timed_out = not signal.alarm(0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps(None if timed_out and code == -signal.SIGKILL else code), file=answers)
        answers.flush()
    os._exit(0)


def become(installed: list[str], words, cwd, env, streams, timeout) -> None:
    """Turn this process into the command, as far as the command can tell, and run it."""
    os.setsid()
    modes = (
        os.O_RDONLY,
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    )
    opened = [os.open(name, mode) for name, mode in zip(streams, modes, strict=True)]
    if _starts_others(words):
        hidden = [name for name in sys.modules if name.split(".")[0] in ("fairseq", "fairseq_cli")]
        libraries = {name: sys.modules.pop(name) for name in hidden}
        log = (logging.root.level, logging.root.handlers[:])
        subprocess.Popen = functools.partial(Fork, installed, libraries, log)
    elif words[1:2] == ["-m"] and words[2] not in _TRAINS:
        # fairseq's training writes its log to standard output from the moment it is imported
        logging.root.handlers.clear()
        logging.root.setLevel(logging.WARNING)
    run_as_main(installed, words, cwd, env, opened)


def run_as_main(installed: list[str], words: list[str], cwd, env, streams) -> None:
    """Run a command in this process, in which no other has begun.

    None as folder or environment, and -1 as one of the three streams: what the process has.
    """
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    for number, stream in enumerate(streams):
        if stream >= 0:
            os.dup2(stream, number)
    sys.stdin = open(0, encoding=sys.stdin.encoding, closefd=False)
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [entry for entry in listed if entry]
    if words[1:2] == ["-m"]:
        sys.path[:] = [os.getcwd(), *paths, *installed]
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        # the command as the main module, which processes that it spawns begin with
        sys.argv = words[1:] if words[0] == sys.executable else words
        sys.path[:] = [os.path.dirname(sys.argv[0]), *paths, *installed]
        runpy.run_path(sys.argv[0], run_name="__main__")


class Fork(subprocess.Popen):
    """`subprocess.Popen` of what starts others: the commands that `run` forks are forks of its process.

    libraries: modules that it must not see loaded, and its commands may; log: level and handlers before it.
    """

    def __init__(self, installed, libraries, log, args, **options):
        self.installed, self.libraries, self.log = installed, libraries, log
        super().__init__(args, **options)

    def _execute_child(self, *started):
        words, _, before, _, _, cwd, env, _, _, _, *pipes = started
        *_, new_session, group = pipes
        if not isinstance(words, list | tuple) or _kind(words := [*map(str, words)]) is None:
            super()._execute_child(*started)
            return
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*pipes[:6])
            return
        code = 1
        try:
            if new_session:
                os.setsid()
            if group >= 0:
                os.setpgid(0, group)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before:
                before()
            sys.stdout.reconfigure(line_buffering=True)
            for name, module in list(sys.modules.items()):
                file = getattr(module, "__file__", None) or ""
                if file.startswith(_ROOT) and "site-packages" not in file and name != "__main__":
                    del sys.modules[name]
            sys.modules.update(self.libraries)
            level, logging.root.handlers[:] = self.log
            logging.root.setLevel(level)
            subprocess.Popen = Fork.__base__
            run_as_main(self.installed, words, cwd, env, (pipes[0], pipes[3], pipes[5]))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            # as an interpreter ends, which must not go back into the script
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
