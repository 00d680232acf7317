"""`torchrun --max-restarts`: a killed process brings all back at the last checkpoint, with the same bits."""

import sys

import pytest

from tests.ext_common.conftest import DATA, PLUGIN, TRAIN
from tests.trainings import assert_same_run, read

# Rank 1 is killed in update 6 of the first start; nothing says so to rank 0.
KILLED = """
import os, pathlib, signal, sys
from fairseq import trainer
step = trainer.Trainer.train_step
mark = pathlib.Path({mark!r})
def train_step(self, *args, **kwargs):
    if self.get_num_updates() == 5 and self.data_parallel_rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
trainer.Trainer.train_step = train_step
from fairseq_cli.train import cli_main
cli_main()
"""
FLAGS = ["--batch-size", "3", "--max-epoch", "3"]


@pytest.mark.slow
def test_a_killed_process_brings_all_back(new_toy):
    """Epochs of 4 updates: update 5 is made twice, and the training ends as if it had been made once."""
    toy = new_toy()
    toy.train("whole", *FLAGS, before=toy.torchrun(2))
    program = toy.folder / "killed.py"
    program.write_text(KILLED.format(mark=str(toy.folder / "killed")))
    launcher = [toy.bin / "torchrun", "--nproc_per_node", "2", "--max-restarts", "1"]
    words = [program, toy.data, *PLUGIN, *DATA, *TRAIN, "--save-dir", "ck", *FLAGS]
    log = toy.run(launcher, *words)
    assert (toy.folder / "killed").exists() and "Loaded checkpoint" in log, log[-2000:]
    checkpoints = [toy.folder / name / "checkpoint_last.pt" for name in ("ck", "whole")]
    assert_same_run(*map(read, checkpoints))


@pytest.mark.slow
def test_another_number_of_processes_keeps_batch_and_rate(tmp_path):
    """What the presets planned for two processes goes on in one: all together see as many an update."""
    import tarfile
    from pathlib import Path

    from tests.trainings import run_command

    root = Path(__file__).resolve().parents[2]
    with tarfile.open(root / "tests" / "golden" / "before.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    bin = Path(sys.executable).parent
    train = [bin / "fairseq-train", "speaker/data", "--user-dir", root / "fairseq_ext"]
    train += ["--task", "speaker_id", "--cpu", "--log-format", "json", "--save-dir", "ck"]
    train += ["--d-model", "8", "--nhead", "2", "--d-ffn", "8", "--layers", "1"]
    torchrun = [bin / "torchrun", "--nproc_per_node", "2", "--no-python"]
    stopped = ["--stop-time-hours", "1e-9"]
    run_command([*torchrun, *train, *stopped], tmp_path, PYTHONPATH=str(root))
    first = read(tmp_path / "ck" / "checkpoint_last.pt")
    log = run_command([*train, *stopped], tmp_path, PYTHONPATH=str(root))
    cfg = first["cfg"]
    assert cfg["distributed_training"]["distributed_world_size"] == 2
    batch = cfg["dataset"]["batch_size"]
    assert f"--batch-size {2 * batch}" in log and f"--lr {cfg['optimization']['lr'][0]}" in log
    assert "processes 2 → 1" in log
