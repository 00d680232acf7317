"""What the tests of diffusion share."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import processes


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """checkpoint_last.pt of a small network after two updates on gray 16×16 digits, as users train."""
    folder = tmp_path_factory.mktemp("tiny")
    args = f"""{folder / "data"} --image-dataset digits --image-size 16 --channels 1
        --save-dir {folder / "checkpoints"} --max-update 2 --sample-interval 0
        --base-channels 8 --head-channels 8 --batch-size 8 --lr 0.01 --warmup-updates 1"""
    command = [sys.executable, "-m", "diffusion_ext.train", *args.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "checkpoints" / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def small_images(tmp_path_factory) -> Path:
    """24 colour images of 8 × 8, all different, in the folders (classes) ant, bee and cat."""
    folder = tmp_path_factory.mktemp("small") / "images"
    rng = np.random.default_rng(1)
    for k in range(24):
        path = folder / ("ant", "bee", "cat")[k % 3] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def build(small_images):
    """build(task=…, criterion=…, model=…): options → task, criterion and a tiny model with random weights.

    As fairseq-train would make them for the small images, in this process; build.task(…) is the task alone.
    """
    from omegaconf import OmegaConf

    from ext_common.checkpoints import untouched_logging

    with untouched_logging():
        import fairseq  # noqa: F401

    from ext_common import compat

    compat.apply()
    from diffusion_ext.criterion import DdpmCriterion, DdpmCriterionConfig
    from diffusion_ext.model import DdpmUNet, DdpmUNetConfig
    from diffusion_ext.task import DiffusionConfig, DiffusionTask

    def task_of(changes):
        common = dict(
            data=str(small_images),
            image_size=[8],
            image_store=str(small_images.parent / "store"),
            timesteps=100,
            seed=1,
            save_dir="no/such/folder",
            train_subset="train",
            batch_size=4,
            update_freq=[1],
            autocast="fp32",
        )
        return DiffusionTask(OmegaConf.structured(DiffusionConfig(**{**common, **changes})))

    def build(task=None, criterion=None, model=None):
        made = task_of(task or {})
        options = DdpmCriterionConfig(**{"autocast": "fp32", **(criterion or {})})
        loss = DdpmCriterion(OmegaConf.structured(options), made)
        small = dict(
            base_channels=8,
            channel_mults=[1, 2],
            blocks=1,
            attention_resolutions=[4],
            head_channels=8,
        )
        config = OmegaConf.structured(DdpmUNetConfig(**{**small, **(model or {})}))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            net = DdpmUNet.build_model(config, made)
            for weight in net.net.parameters():
                weight.add_(torch.randn(weight.shape) * 0.05)
        net.ema.update(net.net, 0, 1)
        return SimpleNamespace(task=made, criterion=loss, model=net)

    build.task = task_of
    return build


@pytest.fixture
def fresh_samplers(monkeypatch):
    """SAMPLERS; what a test enters is out of it afterwards."""
    from diffusion_ext.samplers import SAMPLERS

    for table in ("_entries", "_options"):
        monkeypatch.setattr(SAMPLERS, table, dict(getattr(SAMPLERS, table)))
    return SAMPLERS
