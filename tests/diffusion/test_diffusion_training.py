"""diffusion_ext.train and fairseq-train with the diffusion task, as one types them.

Each command is a process of its own (fairseq keeps state inside one).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.trainings import (
    assert_can_be_followed,
    assert_same_run,
    read,
    run_command,
    run_on_terminal,
    traced,
)

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = (
    "--image-size 8 --base-channels 8 --channel-mults 1,2 --blocks 1 --attention-resolutions 4"
    " --batch-size 8 --lr 0.002 --warmup-updates 5 --epoch-updates 12 --timesteps 100 --autocast fp32"
    " --log-format json --log-interval 1 --sample-grid 2 --sample-steps 3"
)
AUGMENTED = "--hflip 0.5 --color-jitter 0.3,0.3,0.3,0.1 --dropout 0.1 --ema-half-life 100,1000"


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """40 colour images of 8 × 8, all different."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(1)
    for k in range(40):
        pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / f"{k:02}.png")
    return folder


@pytest.fixture
def run(repo_root, tmp_path):
    """Run a command as a user would; returns its output, asserts its exit code."""

    def run(*command, code=0):
        return run_command(command, repo_root, code, XDG_CACHE_HOME=str(tmp_path / "cache"))

    return run


@pytest.fixture
def train(run, faces):
    def train(save_dir, flags="", before=(), code=0, data=faces):
        command = [*before, sys.executable, "-m", "diffusion_ext.train", data]
        return run(*command, "--save-dir", save_dir, SMALL, flags, code=code)

    return train


def last(folder):
    return read(folder / "checkpoint_last.pt")


@pytest.mark.slow
def test_killed_and_resumed_is_bit_exact_with_and_without_grids(train, repo_root, faces, tmp_path):
    """Weights, averages, optimizer and losses: 30 updates = 15 + kill −9 + the rest."""
    flags = f"{AUGMENTED} --self-condition --save-interval-updates 5 --max-update 30"
    whole = train(tmp_path / "whole", f"{flags} --sample-interval 7")
    train(tmp_path / "plain", f"{flags} --sample-interval 0")
    assert sorted(p.name for p in (tmp_path / "whole" / "samples").iterdir()) == [
        f"update_{n:07}.png" for n in (7, 14, 21, 28)
    ]
    assert_same_run(last(tmp_path / "whole"), last(tmp_path / "plain"))

    command = [sys.executable, "-m", "diffusion_ext.train", faces, *SMALL.split(), *flags.split()]
    command += ["--save-dir", tmp_path / "parts", "--sample-interval", "4"]
    child = subprocess.Popen(
        [str(part) for part in command],
        cwd=repo_root,
        env={**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    fifteen = tmp_path / "parts" / "checkpoint_2_15.pt"
    for _ in range(3000):
        if fifteen.exists() or child.poll() is not None:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert fifteen.exists()
    second = train(tmp_path / "parts", f"{flags} --sample-interval 4")
    assert_same_run(last(tmp_path / "whole"), last(tmp_path / "parts"))
    resumed = traced(second, "loss")
    assert 1 < min(resumed) <= 31
    assert resumed == {n: v for n, v in traced(whole, "loss").items() if n in resumed}


@pytest.mark.slow
def test_two_processes_equal_accumulation(train, tmp_path):
    """Noise belongs to the image, not to the rank; the gradient is a mean, not a sum."""
    # --curriculum: fairseq shuffles batches, of which 8 images at a time are others than 16 at a time
    flags = "--hflip 0.5 --max-update 12 --sample-interval 6 --cpu --curriculum 9"
    train(tmp_path / "one", f"{flags} --update-freq 2")
    torchrun = [BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]
    log = train(tmp_path / "two", flags, before=torchrun)
    assert "training on 2 devices" in log
    train(tmp_path / "large", f"{flags} --batch-size 16")
    # without torchrun fairseq spawns the processes, as it does on a machine with several GPUs
    train(tmp_path / "spawned", f"{flags} --distributed-world-size 2")
    runs = ("one", "two", "large", "spawned")
    one, two, large, spawned = (last(tmp_path / name)["model"] for name in runs)
    for key in one:
        assert torch.equal(two[key], spawned[key])
        # Adam divides by the root of the second moment, which blows up rounding of tiny gradients
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(large[key], one[key], rtol=1e-3, atol=2e-4)
    assert max(float(one[key].abs().max()) for key in one) > 0.01


@pytest.mark.slow
def test_the_printed_command_trains_the_same(train, run, tmp_path):
    """`--print-command` is a whole fairseq-train line."""
    flags = "--max-update 4 --sample-interval 0"
    train(tmp_path / "ours", flags)
    line = train(tmp_path / "printed", f"{flags} --print-command").strip()
    assert not (tmp_path / "printed").exists()
    words = shlex.split(line)
    flags = [word for word in words if word.startswith("--")]
    assert words[0] == "fairseq-train" and len(flags) == len(set(flags))
    run(BIN / "fairseq-train", *[Path(word) for word in words[1:]])
    assert_same_run(last(tmp_path / "ours"), last(tmp_path / "printed"))


@pytest.mark.slow
def test_the_shortest_command_is_fairseqs_too(run, faces, repo_root, tmp_path):
    """`python -m diffusion_ext.train IMAGES` trains what `fairseq-train IMAGES --task diffusion` trains."""
    more = ["--max-update 3 --sample-interval 0 --disable-validation --save-dir"]
    ours = [sys.executable, "-m", "diffusion_ext.train", faces, *more]
    log = run(*ours, tmp_path / "ours")
    assert "40 images, 16 × 16 pixels" in log
    theirs = [BIN / "fairseq-train", faces, "--user-dir diffusion_ext --task diffusion", *more]
    run(*theirs, tmp_path / "theirs")
    assert_same_run(last(tmp_path / "ours"), last(tmp_path / "theirs"))


@pytest.mark.slow
def test_a_recipe_is_the_same_as_its_flags(train, tmp_path, repo_root):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "common: {user_dir: diffusion_ext, seed: 3}\n"
        "task: {_name: diffusion, data: '???', objective: eps, color_jitter: [0.1, 0.1, 0, 0],"
        " leaky_augment: true}\n"
        "model: {_name: ddpm_unet, scale_shift: true}\n"
        "lr_scheduler: {_name: cosine, warmup_updates: 2}\n"
        "optimization: {lr: [0.01], max_update: 100}\n"
    )
    typed = train(
        tmp_path / "x",
        "--seed 3 --objective eps --color-jitter 0.1,0.1,0,0 --leaky-augment --scale-shift"
        " --lr-scheduler cosine --max-update 9 --print-command",
    )
    read_from = train(tmp_path / "x", f"--config {recipe} --max-update 9 --print-command")
    assert sorted(shlex.split(typed)) == sorted(shlex.split(read_from))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "emoji32", "faces64", "cifar10"])
def test_the_recipes_of_the_project_train(run, faces, repo_root, tmp_path, name):
    """Two updates as each recipe says, but with small batches; the checkpoint holds what it said."""
    recipe = repo_root / "configs" / "diffusion" / f"{name}.yaml"
    # in a folder of their own, for the recipe may ask for classes
    shutil.copytree(faces, tmp_path / "images" / "face")
    command = [sys.executable, "-m", "diffusion_ext.train", tmp_path / "images", "--config", recipe]
    run(
        *command,
        "--save-dir",
        tmp_path / "run",
        "--batch-size 2 --max-update 2 --sample-interval 0",
    )
    cfg, said = last(tmp_path / "run")["cfg"], yaml.safe_load(recipe.read_text())
    for group, options in said.items():
        for key, value in options.items():
            # what the command line above gives is not the recipe's
            if value != "???" and key not in (
                "user_dir",
                "batch_size",
                "max_update",
                "sample_interval",
            ):
                assert cfg[group][key] == value, (group, key)


def test_a_number_that_is_none_stops_training_in_one_sentence(train, tmp_path):
    """The learning rate is absurd; what was saved before stays."""
    flags = "--lr 1e30 --clip-norm 0 --warmup-updates 0 --lr-scheduler fixed --max-update 9"
    log = train(tmp_path / "x", f"{flags} --sample-interval 0", code=1)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in log, log[-2000:]
    assert re.search(r"not finite at update \d+ \((nan|inf) at t = \d+", errors[0])
    assert "no checkpoint was written yet" in errors[0] and "Warning" not in log
    assert not (tmp_path / "x").exists()


def one_error(log):
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in log, log[-2000:]
    return errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--image-size 1", "images of 1 × 1 are too small for --channel-mults"),
        ("--beta-schedule sigmoyd", "unknown beta schedule 'sigmoyd': did you mean 'sigmoid'?"),
        ("--objective epsilon", "unknown objective 'epsilon'"),
        ("--loss-weighting minsnr", "unknown loss weighting 'minsnr': did you mean 'min_snr'?"),
        ("--objective eps --zero-terminal-snr", "--objective eps cannot work"),
        ("--color-jitter 0.5", "--color-jitter takes four numbers"),
        ("--timesteps 1", "--timesteps 1 is too few"),
        ("--autocast fp8", "--autocast fp8 is unknown"),
        ("--base-channels 7", "--base-channels is a multiple of 4"),
    ],
)
def test_mistakes_in_flags_are_one_sentence(train, tmp_path, flags, words):
    assert words in one_error(train(tmp_path / "x", flags, code=1))


@pytest.mark.slow
def test_a_training_can_be_followed(faces, tmp_path, repo_root):
    flags = SMALL.replace("--log-format json", "--user-dir diffusion_ext --task diffusion --cpu")
    more = "--arch ddpm_unet --criterion ddpm --optimizer adam --num-workers 0 --max-update 6"
    words = [BIN / "fairseq-train", faces, flags, more, "--save-dir", tmp_path]
    stayed, were = run_on_terminal(words, repo_root)
    assert_can_be_followed(stayed, were, tmp_path, "images", 6)
