"""Trainings with Noam that must be the same training: resumed, and in two processes."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.trainings import assert_can_be_followed, assert_same_run, read, run_on_terminal

from .conftest import ROOT, train_flags
from .conftest import fairseq as run

BIN = Path(sys.executable).parent
NOAM = ["--lr", 0.25, "--lr-scheduler", "noam", "--warmup-updates", 15, "--log-interval", 1]
QUIET = ["--no-valid-text", "--no-epoch-checkpoints"]
# our own Transformer with Muon, and what has to work with it
MUON = ["--arch", "transformer_compact", "--optimizer", "muon", "--clip-norm", 1, "--store-ema"]
OPTIMIZERS = pytest.mark.parametrize("more", [[], MUON], ids=["adam", "muon"])


def train(data, folder, *flags):
    """(weights, rate of each update) of a training."""
    done = run("train", *train_flags(data, folder, *NOAM, *QUIET, *flags))
    logged = re.findall(r"\| train_inner \| (\{.*\})", done.stdout + done.stderr)
    rates = {int(row["num_updates"]): float(row["lr"]) for row in map(json.loads, logged)}
    weights = torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"]
    return weights, rates


@pytest.mark.slow
@OPTIMIZERS
def test_20_and_20_updates_are_40(toy_data, tmp_path, more):
    """Rates, and weights to the bit."""
    more = [*more, "--dropout", 0.1]
    whole, rates = train(toy_data, tmp_path / "whole", "--max-update", 40, *more)
    half, first = train(toy_data, tmp_path / "halves", "--max-update", 20, *more)
    again, second = train(toy_data, tmp_path / "halves", "--max-update", 40, *more)
    assert len(rates) == 40 and {**first, **second} == rates
    assert sorted(first) == list(range(1, 21)) and min(second) == 21
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # by a command that loads no more than it needs
    command = [sys.executable, "-m", "fairseq_ext.translation.translate", "-", "-"]
    command += ["--path", tmp_path / "whole" / "checkpoint_last.pt", "--beam", "1"]
    done = processes.run(command, cwd=ROOT, input="a\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


@pytest.mark.slow
@OPTIMIZERS
def test_two_processes_are_one_with_update_freq_2(toy_data, tmp_path, more):
    # sums in another order are another bfloat16, and a singular value near 0 may then turn round
    exact = ["--muon-dtype", "float32", "--no-bf16-matrices"] if more else []
    flags = ["--max-update", 12, "--max-tokens", 300, *more, *exact]
    one, rates = train(toy_data, tmp_path / "one", *flags, "--update-freq", 2)
    two, same_rates = train(toy_data, tmp_path / "two", *flags, "--distributed-world-size", 2)
    assert same_rates == rates and len(rates) == 12
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_shortest_command_and_the_one_it_prints_train_the_same(toy_data, tmp_path):
    command = [
        toy_data,
        "--user-dir",
        ROOT / "fairseq_ext",
        "--task",
        "translation_spm",
        "--max-update",
        3,
    ]
    done = run("train", *command, "--no-valid-text", "--save-dir", tmp_path / "short")
    (line,) = re.findall(r"the same again: (.*)", done.stdout + done.stderr)
    words = shlex.split(line.replace(str(tmp_path / "short"), str(tmp_path / "long")))
    run("train", *words[1:])
    short, long = (read(tmp_path / name / "checkpoint_last.pt") for name in ("short", "long"))
    assert_same_run(short, long)
    assert "601 pairs" in json.loads(short["cfg"]["task"]["chosen"])["why"]["data"]


@pytest.mark.slow
def test_a_training_can_be_followed(toy_data, tmp_path, repo_root):
    flags = train_flags(toy_data, tmp_path, "--max-update", 6)
    log = ("--no-progress-bar", "--log-format", "json")
    words = [BIN / "fairseq-train", *(flag for flag in flags if flag not in log)]
    stayed, were = run_on_terminal(words, repo_root)
    assert_can_be_followed(stayed, were, tmp_path, "tokens", 6)
    assert any("bleu" in part for part in stayed[-2:])
