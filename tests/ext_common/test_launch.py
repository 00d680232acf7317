"""SLURM jobs: what is written, and real trainings under stand-ins for `sbatch`, `srun` and `scontrol`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ext_common.cli import UsageError, UserError
from ext_common.launch import LaunchOptions, main, script
from ext_common.presets.save_dirs import peek, updates_of
from tests.trainings import assert_same_run, read

TRAIN = ["fairseq-train", "DATA", "--user-dir", "fairseq_ext", "--task", "speaker_id"]
STUBS = {
    # one node: what is behind the options is run here, once
    "srun": 'while [[ $1 == -* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"',
    "scontrol": 'echo "$*" >> "$LOG"\n[ "$1" = show ] && echo 127.0.0.1; :',
    "sbatch": 'echo "sbatch $*" >> "$LOG"',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of SLURM's commands in the path; the file that has what they were asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    log = tmp_path / "asked"
    paths = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = dict(
        PATH=os.pathsep.join(paths),
        LOG=str(log),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="here",
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return log


def test_a_training_is_one_task_a_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, text = script(TRAIN, LaunchOptions(nodes=3, gpus=8, cpus=6, sbatch=["--partition=gpu"]))
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    assert asked == [
        "job-name=DATA-speaker_id",
        "ntasks-per-node=1",
        "nodes=3",
        "gpus-per-node=8",
        "cpus-per-task=48",
        "time=1-00:00:00",
        "signal=B:USR1@120",
        "requeue",
        "open-mode=append",
        "partition=gpu",
    ]
    assert '--nproc_per_node 8 --max-restarts 3 --node_rank "$SLURM_NODEID"' in text
    assert "fairseq-train DATA --user-dir fairseq_ext --task speaker_id --save-dir" in text
    assert name == "DATA-speaker_id" and "folder=checkpoints/DATA-speaker_id\n" in text
    module = ["python", "-m", "diffusion_ext.train", "IMAGES"]
    name, text = script(module, LaunchOptions())
    assert "folder=checkpoints/IMAGES-diffusion\n" in text and "--no-python" not in text
    assert "torchrun -m diffusion_ext.train IMAGES --save-dir" in text


def test_data_is_copied_to_each_node(tmp_path, slurm):
    """Whole or not at all, once, whatever is in its name."""
    parts = [tmp_path / "a b", tmp_path / "c"]
    for part in parts:
        part.mkdir()
        (part / "features.bin").write_text(part.name)
    train = ["fairseq-train", ":".join(map(str, parts)), "--save-dir", str(tmp_path / "ck")]
    place = tmp_path / "scratch"
    _, text = script(train, LaunchOptions(stage=str(place)))
    staged = f"{place / 'a b'}:{place / 'c'}"
    assert f"fairseq-train '{staged}' --save-dir" in text
    (place / "c.partial").mkdir(parents=True)
    (place / "c.partial" / "torn").touch()
    text = text.replace("fairseq-train", "true").replace("torchrun --nnodes", "true --nnodes")
    for _ in range(2):
        subprocess.run(["bash", "-c", text], check=True)
        assert [(place / part.name / "features.bin").read_text() for part in parts] == ["a b", "c"]
        assert sorted(os.listdir(place)) == ["a b", "c"] and not (place / "c" / "torn").exists()


@pytest.mark.parametrize(
    "words, options, said",
    [
        (TRAIN, {"array": 4}, "a training has --nodes"),
        (["true"], {"nodes": 2}, "for trainings"),
        (["fairseq-train", "--task", "x"], {}, "DATA comes right behind fairseq-train"),
        (["fairseq-hydra-train"], {}, "checkpoint.save_dir is missing"),
        (["fairseq-train", "a/x:b/x", "--save-dir", "c"], {"stage": "s"}, "have one name"),
    ],
)
def test_what_cannot_be_is_refused(words, options, said):
    with pytest.raises(UsageError, match=said):
        script(words, LaunchOptions(**options))


@pytest.mark.parametrize("trap", ["--ntasks-per-node=8", "-n 4", "--gpus-per-task=1"])
def test_several_trainings_into_one_folder_are_refused(trap):
    with pytest.raises(ValueError, match="several trainings that each see one GPU"):
        LaunchOptions(sbatch=[trap])


def test_and_where_they_begin_too(monkeypatch):
    """srun --ntasks 4 fairseq-train: each task sees one GPU, and believes itself alone."""
    from types import SimpleNamespace

    from ext_common.compat.launchers import refuse_one_task_each

    alone = SimpleNamespace(
        distributed_world_size=1, distributed_init_method=None, distributed_port=-1
    )
    refuse_one_task_each(alone)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="one of 4 tasks .* use python -m ext_common.launch"):
        refuse_one_task_each(alone)
    for more in ({"distributed_port": 5}, {"distributed_world_size": 4}):
        refuse_one_task_each(SimpleNamespace(**{**vars(alone), **more}))


def test_it_is_written_and_submitted(tmp_path, slurm, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--array", "3", "--submit", "--", "python", "-m", "fairseq_ext.backtranslation.generate"])
    path = "fairseq_ext.backtranslation.sbatch"
    assert slurm.read_text() == f"sbatch {path}\n"
    assert "#SBATCH --array=0-2\n" in (tmp_path / path).read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not here"):
        main(["--submit", "--", "true"])
    with pytest.raises(UsageError, match="the command is missing"):
        main(["--submit"])


def until(condition, process, seconds=300):
    """Wait for a condition; what the process has said where it ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_task_that_is_preempted_is_queued_again(tmp_path, slurm, number):
    """The same task of the array, ended and not killed."""
    body = f"trap 'touch {tmp_path}/told; exit 143' TERM; touch {tmp_path}/begun; while :; do sleep 0.1; done"
    _, text = script(["bash", "-c", body], LaunchOptions(array=4))
    more = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    job = subprocess.Popen(
        ["bash", "-c", text], env={**os.environ, **more}, stdout=subprocess.PIPE, text=True
    )
    until((tmp_path / "begun").exists, job)
    job.send_signal(number)
    assert job.wait(60) == 0 and (tmp_path / "told").exists()
    assert slurm.read_text() == "requeue 70_3\n"
    # what ends by itself keeps its code
    _, text = script(["bash", "-c", "exit 7"], LaunchOptions())
    assert subprocess.run(["bash", "-c", text]).returncode == 7
    assert slurm.read_text() == "requeue 70_3\n"


@pytest.mark.slow
def test_a_training_that_is_preempted_and_loses_a_process_has_the_same_bits(new_toy, slurm):
    """Two processes, told by the batch shell within an epoch, and queued again; there one is killed.

    Preemption loses no update; after the kill torchrun brings both back at the last checkpoint.
    """
    toy = new_toy()
    flags = ["--batch-size", "3", "--max-epoch", "3", "--distributed-backend", "gloo"]
    toy.train("whole", *flags, before=toy.torchrun(2))
    slow = toy.folder / "slow.py"
    slow.write_text(SLOW)
    program = toy.folder / "fairseq-train"
    program.write_text(f'#!/bin/bash\nexec {sys.executable} {slow} "$@"\n')
    program.chmod(0o755)
    save_dir, killed = toy.folder / "ck", toy.folder / "killed"
    words = [str(program), str(toy.data), *toy_flags(), "--save-dir", str(save_dir), *flags]
    _, text = script(words, LaunchOptions(processes=2, restarts=1))
    path = toy.folder / "job.sbatch"
    path.write_text(text)

    def submitted(**environment):
        return subprocess.Popen(
            ["bash", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = submitted(PAUSE="0.3")
    until((save_dir / "begun").exists, job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "requeue 4711" in slurm.read_text()
    updates = updates_of(peek(save_dir / "checkpoint_last.pt"))
    assert f"stop after update {updates}" in said and 2 <= updates < 12
    assert not (save_dir / "stop").exists() and not (save_dir / "stopped").exists()

    job = submitted(KILLED=str(killed))
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and killed.exists(), said
    assert said.count("Loaded checkpoint") == 2, said
    assert_same_run(
        read(save_dir / "checkpoint_last.pt"), read(toy.folder / "whole" / "checkpoint_last.pt")
    )
    assert slurm.read_text().count("requeue") == 1


def toy_flags():
    from tests.ext_common.conftest import DATA, PLUGIN
    from tests.ext_common.conftest import TRAIN as MODEL

    return [*PLUGIN, *DATA, *MODEL]


# Rank 1 is killed once, two updates behind a checkpoint (epochs have 4); nothing says so to rank 0.
SLOW = """
import os, pathlib, signal, sys, time
from fairseq import trainer
step = trainer.Trainer.train_step
mark = pathlib.Path(os.environ.get("KILLED", "/"))
def train_step(self, *args, **kwargs):
    pause = float(os.environ.get("PAUSE", 0))
    if pause and self.get_num_updates() == 2:
        pathlib.Path(self.cfg.checkpoint.save_dir, "begun").touch()
    if self.get_num_updates() >= 9 and self.data_parallel_rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause)
    return step(self, *args, **kwargs)
trainer.Trainer.train_step = train_step
from fairseq_cli.train import cli_main
cli_main()
"""
