"""What the tests of diffusion share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """checkpoint_last.pt of a small network after two updates on gray 16×16 digits, as users train."""
    folder = tmp_path_factory.mktemp("tiny")
    args = f"""{folder / "data"} --image-dataset digits --image-size 16 --channels 1
        --save-dir {folder / "checkpoints"} --max-update 2 --sample-interval 0
        --base-channels 8 --head-channels 8 --batch-size 8 --lr 0.01 --warmup-updates 1"""
    command = [sys.executable, "-m", "diffusion_ext.train", *args.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "checkpoints" / "checkpoint_last.pt"
