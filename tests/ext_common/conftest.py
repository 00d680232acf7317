"""Runs of fairseq's own commands with the toy plugin, for the tests of ext_common.compat."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

TOY = Path(__file__).resolve().parent.parent / "toy_plugin"
BIN = Path(sys.executable).parent
PLUGIN = ["--user-dir", str(TOY), "--task", "toy", "--criterion", "toy_mse", "--cpu"]
DATA = ["--required-batch-size-multiple", "1", "--num-workers", "0", "--data-buffer-size", "0"]
TRAIN = ["--arch", "toy_model", "--optimizer", "adam", "--lr", "0.01", "--log-interval", "1"]


class Toy:
    """`train(save_dir, *flags)` and friends, each a process of its own; asserts the exit code."""

    bin, plugin = BIN, TOY

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()

    def run(self, command, *arguments, code=0, before=()):
        result = processes.run(
            [*map(str, before), *map(str, command), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert result.returncode == code, result.stdout[-4000:]
        return result.stdout

    def train(self, save_dir, *flags, program=(BIN / "fairseq-train",), **kwargs):
        command = [*program, self.data, *PLUGIN, *DATA, *TRAIN, "--save-dir", save_dir]
        return self.run(command, *flags, **kwargs)

    def validate(self, path, *flags, **kwargs):
        command = [BIN / "fairseq-validate", self.data, *PLUGIN, *DATA, "--path", path]
        return self.run(command, *flags, **kwargs)

    @staticmethod
    def torchrun(count):
        return [BIN / "torchrun", "--nproc_per_node", count, "--no-python"]


def valid_losses(log: str) -> list[float]:
    return [float(x) for x in re.findall(r"valid on 'valid' subset \| loss ([\d.]+)", log)]


@pytest.fixture(scope="session")
def read_losses():
    """Validation losses in a log, in order."""
    return valid_losses


@pytest.fixture
def train_here(toy_registered, tmp_path, monkeypatch):
    """fairseq-train with the toy plugin in this process: `train_here(save_dir, *flags)`."""
    import torch
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.distributed import utils as distributed_utils
    from fairseq_cli import train

    from ext_common import screen

    (tmp_path / "data").mkdir()
    threads = torch.get_num_threads()

    def run(save_dir, *flags):
        save_dir = tmp_path / save_dir
        words = [tmp_path / "data", *PLUGIN, *DATA, *TRAIN, "--save-dir", save_dir, *flags]
        words = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["fairseq-train", *words])
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        torch.set_num_threads(1)
        distributed_utils.call_main(convert_namespace_to_omegaconf(args), train.main)
        return save_dir

    run.folder = tmp_path
    yield run
    # What the end of a process would do.
    screen._close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def new_toy(tmp_path_factory):
    """A function that makes a fresh :class:`Toy`."""
    return lambda: Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """Checkpoints of 4 uninterrupted epochs of one process: --update-freq 2, batch size 3."""
    toy = Toy(tmp_path_factory.mktemp("reference"))
    flags = ["--batch-size", 3, "--update-freq", 2, "--max-epoch", 4]
    (toy.folder / "log").write_text(toy.train("ck", *flags))
    return toy.folder / "ck"


@pytest.fixture(scope="session")
def toy_registered():
    """The toy plugin imported in this process too."""
    from argparse import Namespace

    from fairseq import utils

    utils.import_user_module(Namespace(user_dir=str(TOY)))
