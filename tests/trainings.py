"""What tests of whole trainings share: commands as a user types them, their logs and checkpoints."""

import json
import os
import re
import subprocess

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
    theirs = b["last_optimizer_state"]["state"]
    for key, state in a["last_optimizer_state"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.as_tensor(state[name]).equal(torch.as_tensor(theirs[key][name]))
