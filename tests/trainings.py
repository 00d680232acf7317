"""What tests of whole trainings share: commands as a user types them, their logs and checkpoints."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios

import torch

from tests import processes


def run_command(words, cwd, code=0, **environment):
    """Output of a command, one thread; asserts its exit code. A text among `words` is split at spaces."""
    words = [w for part in words for w in (part.split() if isinstance(part, str) else [part])]
    result = processes.run(
        [str(w) for w in words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == code, result.stdout[-3000:]
    return result.stdout


def read(path):
    """A checkpoint."""
    from ext_common.compat.files import allow_namespace

    allow_namespace()
    return torch.load(path, weights_only=True)


def traced(log, key):
    """Update → value in the lines of --log-format json."""
    lines = re.findall(r"\| train_inner \| (\{.*\})", log)
    return {int(row["num_updates"]): row[key] for row in map(json.loads, lines)}


def assert_same_run(a, b):
    """Two checkpoints have bit-equal weights and optimizer states."""
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    ours, theirs = (run["last_optimizer_state"]["state"] for run in (a, b))
    assert ours and ours.keys() == theirs.keys()
    for key, state in ours.items():
        assert state and state.keys() == theirs[key].keys()
        for name, value in state.items():
            assert torch.as_tensor(value).equal(torch.as_tensor(theirs[key][name])), (key, name)


def run_on_terminal(words, cwd):
    """(lines that stayed, all lines that were there) of a training on a pseudo-terminal."""
    words = [w for part in words for w in (part.split() if isinstance(part, str) else [part])]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(
        [str(w) for w in words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    text = b""
    with open(master, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        # Linux ends a pseudo-terminal, whose last writer is gone, with an error.
        while piece := screen.read(65536):
            text += piece
    assert process.wait(60) == 0, text[-3000:]
    pieces = [re.split("\r\x1b\\[K", line) for line in text.decode().split("\r\n")]
    return [line[-1] for line in pieces if line[-1]], [part for line in pieces for part in line]


def assert_can_be_followed(stayed, were, folder, unit, updates):
    """From the first update to the last words; fairseq's log is in its file and not on the screen."""
    assert f"the log is {folder}/train.log" in stayed
    assert "loading the training data …" in were and "the first update …" in were
    line = rf"update 1 of {updates} · loss [\d.]+ · [\d.,]+ {unit}/s"
    assert any(re.fullmatch(line, part) for part in were), were
    validated = [part for part in stayed if re.match(r"update \d+ · valid loss [\d.]+", part)]
    assert validated[-1].startswith(f"update {updates} · ")
    assert any(part.startswith(f"done: {updates} updates") for part in stayed[-3:])
    assert any(f"{folder}/checkpoint_best.pt" in part for part in stayed[-3:])
    assert not any("num. shared model params" in part for part in were)
    assert "num. shared model params" in (folder / "train.log").read_text()
