"""The three jobs on a device: on a CPU here, on a GPU where there is one (`-m gpu`, under 8 minutes on one).

Data and checkpoints are those of tests/golden. What has no CPU half is skipped by name without a GPU.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ext_common.random import Stream
from tests.golden import make as golden
from tests.gpu.conftest import DEVICES
from tests.trainings import assert_same_run, read, run_command, traced

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "speaker": golden.SPEAKER,
    "translation": golden.TRANSLATION,
    "diffusion": golden.DIFFUSION,
}
JOBS = list(FLAGS)
CARDS = torch.cuda.device_count()
cuda = pytest.mark.gpu


@pytest.fixture
def train(tmp_path):
    """train(job, device, *flags, name=…): 30 updates or what the flags say; (log, last checkpoint)."""
    shutil.unpack_archive(ROOT / "tests" / "golden" / "before.tar.xz", tmp_path)
    for package in ("ext_common", "fairseq_ext", "diffusion_ext"):
        (tmp_path / package).symlink_to(ROOT / package)

    # all but one of these tests are about one card
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

    def train(job, device, *flags, name="checkpoints", before=(), program=None, code=0, cards=1):
        folder = f"{job}/{name}"
        words = (
            FLAGS[job]
            .replace(f"{job}/checkpoints", folder)
            .replace("--max-update 3", "--max-update 30")
        )
        words = words if device == "cpu" else words.replace(" --cpu", "")
        # dropout is drawn by each device's own generator
        words += " --log-format json" + ("" if job == "diffusion" else " --dropout 0")
        program = [golden.BIN / "fairseq-train"] if program is None else program
        command = [*before, *program, words, *flags]
        visible = {"CUDA_VISIBLE_DEVICES": first} if cards == 1 else {}
        log = run_command(command, tmp_path, code, PYTHONPATH=str(ROOT), **visible)
        return log, tmp_path / folder / "checkpoint_last.pt"

    train.folder = tmp_path
    return train


PRECISIONS = [
    pytest.param("cpu", "--bf16", marks=pytest.mark.slow),
    *(pytest.param("cuda", flag, marks=cuda) for flag in ("--bf16", "--amp", "--fp16")),
]


def check_thirty(log, path, device):
    """The loss falls, and its numbers are numbers; what was computed where is in the log."""
    losses = traced(log, "loss")
    assert len(losses) == 30 and all(float(loss) < 1e4 for loss in losses.values())
    first, last = (sum(float(losses[k]) for k in part) for part in (range(1, 6), range(26, 31)))
    assert last < first
    assert read(path)["optimizer_history"][-1]["num_updates"] == 30
    if device == "cuda":
        assert re.search(r"CUDA enviroments|name = ", log), "it says which card it is"


@pytest.mark.parametrize("device, precision", PRECISIONS)
@pytest.mark.parametrize("job", JOBS)
def test_thirty_updates_in_16_bits(train, job, device, precision):
    check_thirty(*train(job, device, precision), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("job", JOBS)
def test_thirty_updates_and_a_resume_of_the_same_bits(train, job, device):
    """In float32, under --deterministic, from a checkpoint between the epochs' ends."""
    log, whole = train(job, device, "--deterministic", "--save-interval-updates", "14")
    check_thirty(log, whole, device)
    (half,) = whole.parent.glob("checkpoint_*_14.pt")
    resumed = ["--deterministic", "--restore-file", half]
    log, path = train(job, device, *resumed, name="resumed")
    assert min(traced(log, "loss")) == 15
    assert_same_run(read(path), read(whole))


@cuda
@pytest.mark.parametrize("job", JOBS)
def test_the_loss_is_that_of_the_cpu(train, job):
    """To what float32 in another order of sums leaves after ten updates."""
    traces = [
        traced(train(job, device, "--max-update", "10", name=device)[0], "loss")
        for device in ("cpu", "cuda")
    ]
    for update in range(1, 11):
        on_cpu, on_gpu = (float(trace[update]) for trace in traces)
        assert on_gpu == pytest.approx(on_cpu, rel=2e-3), update


@cuda
@pytest.mark.parametrize("job", ["speaker", "diffusion"])
def test_two_processes_on_one_gpu_train_as_one(train, job):
    """By gloo. Losses as of one process that takes two batches for an update.

    On CPUs test_two_processes_equal_accumulation of tests/speaker and tests/diffusion show it.
    """
    torchrun = [golden.BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]
    gloo = ["--distributed-backend", "gloo", "--batch-size", "2"]
    both, _ = train(job, "cuda", *gloo, name="two", before=torchrun)
    one, _ = train(job, "cuda", "--batch-size", "2", "--update-freq", "2", name="one")
    for update, loss in traced(one, "loss").items():
        assert float(traced(both, "loss")[update]) == pytest.approx(float(loss), rel=5e-3)


NO_NUMBER = """
import sys
import torch
from fairseq import trainer
import fairseq_cli.train
step = trainer.Trainer.train_step
def train_step(self, *args, **kwargs):
    if self.get_num_updates() == 3 and self.data_parallel_rank == 1:
        with torch.no_grad():
            next(self.model.parameters()).fill_(torch.nan)
    return step(self, *args, **kwargs)
trainer.Trainer.train_step = train_step
fairseq_cli.train.cli_main()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_one_process_that_finds_no_number_ends_all(train, device):
    """In seconds, with its sentence once, and no time-out of those who waited."""
    program = train.folder / "no_number.py"
    program.write_text(NO_NUMBER)
    torchrun = [golden.BIN / "torchrun", "--nproc_per_node", "2", program]
    gloo = ["--distributed-backend", "gloo", "--batch-size", "2"]
    log, _ = train("diffusion", device, *gloo, before=torchrun, program=(), code=1)
    assert (
        log.count("error: training stops: the loss of 2 of 2 images is not finite at update 4") == 1
    )
    assert "imed out" not in log


@cuda
@pytest.mark.skipif(CARDS < 2, reason=f"{CARDS} GPUs here")
@pytest.mark.parametrize("job", JOBS)
def test_two_gpus_by_nccl(train, job):
    log, path = train(job, "cuda", cards=CARDS)
    assert "distributed init (rank 1)" in log and read(path)["optimizer_history"]


@cuda
def test_random_words_are_those_of_the_cpu():
    """Integers and uniform numbers to the bit, normals to 2 ulp: of a million hardly one differs at all."""
    stream, ids = Stream("noise", 7, 3), torch.arange(-50, 50)
    there = ids.cuda()
    assert torch.equal(stream.bits(there, 1000).cpu(), stream.bits(ids, 1000))
    assert torch.equal(stream.uniforms(there, 1000).cpu(), stream.uniforms(ids, 1000))
    assert torch.equal(stream.integers(there, 1000).cpu(), stream.integers(ids, 1000))
    ours, theirs = stream.normals(ids, (10_000,)), stream.normals(there, (10_000,)).cpu()
    ulps = (ours.view(torch.int32).long() - theirs.view(torch.int32).long()).abs()
    assert ulps.max() <= 2 and (ulps > 0).sum() <= 1


COMMANDS = {
    "identify": "-m fairseq_ext.speaker.identify speaker/data --path speaker/checkpoint.pt --output who.csv",
    "embed": "-m fairseq_ext.speaker.embed speaker/data --path speaker/checkpoint.pt --output e.npz",
    "translate": "-m fairseq_ext.translation.translate lines.en out.zh --path translation/checkpoint.pt",
    "sample": "-m diffusion_ext.sample samples --path diffusion/checkpoint.pt --num 8 --steps 2",
    "evaluate": "-m diffusion_ext.evaluate --real diffusion/data --fake samples"
    " --extractor classifier:updates=2",
    "export": "-m diffusion_ext.export diffusion/checkpoint.pt exported --format diffusers",
}


@pytest.mark.parametrize("device", DEVICES)
def test_commands(train, device):
    """Each on the device, from the checkpoints of tests/golden."""
    (train.folder / "lines.en").write_text("I like red apples.\nwe see big houses.\n")
    for name, command in COMMANDS.items():
        words = [sys.executable, *shlex.split(command)]
        words += [] if name == "export" else ["--device", device]
        run_command(words, train.folder, PYTHONPATH=str(ROOT))
    assert (train.folder / "out.zh").read_text("utf-8").count("\n") == 2
    assert len(list((train.folder / "samples").glob("0*.png"))) == 8


@cuda
def test_memory_of_a_step_is_told(train):
    """fairseq writes the peak under this name; the job must fit a card a hundred times over."""
    log, _ = train("diffusion", "cuda")
    left = traced(log, "gb_free")
    assert left and min(float(free) for free in left.values()) > 0.5
