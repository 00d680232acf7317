"""fairseq's own commands with the speaker task: resume, processes, recipes, fine-tuning, epochs.

Each command is a process of its own, as a user types it (fairseq keeps state inside one).
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.trainings import (
    assert_can_be_followed,
    assert_same_run,
    read,
    run_command,
    run_on_terminal,
    traced,
)

BIN = Path(sys.executable).parent
SMALL = "--d-model 16 --nhead 2 --d-ffn 32 --layers 1 --kernel-size 7 --embedding-dim 16"
TRAIN = (
    "--user-dir fairseq_ext --task speaker_id --arch conformer_speaker --criterion am_softmax"
    " --optimizer adam --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 20 --batch-size 8"
    f" --log-format json --log-interval 1 --crop-frames 30 {SMALL}"
)


@pytest.fixture
def run(repo_root):
    """Run a command as a user would; returns its output, asserts its exit code."""

    def run(*command, code=0):
        return run_command(command, repo_root, code)

    return run


@pytest.fixture
def train(run, tiny_data):
    def train(save_dir, flags="", before=(), code=0):
        program = BIN / "fairseq-train"
        return run(*before, program, tiny_data, TRAIN, "--save-dir", save_dir, flags, code=code)

    return train


def losses(log):
    return traced(log, "loss")


@pytest.mark.slow
def test_muon_trains_the_encoder(train, tmp_path):
    """The matrices of its block have a momentum, all else what Adam keeps; q, k and v are apart."""
    log = losses(train(tmp_path / "m", "--optimizer muon --epoch-updates 10 --max-update 10"))
    assert log[10] < log[1]
    optimizer = read(tmp_path / "m" / "checkpoint_last.pt")["last_optimizer_state"]
    kept = [set(state) for state in optimizer["state"].values()]
    # two feed-forward layers of two matrices, attention's two, the two pointwise convolutions
    assert kept.count({"step", "momentum"}) == 8
    assert kept.count({"step", "exp_avg", "exp_avg_sq"}) == len(kept) - 8
    assert sorted(optimizer["param_groups"][0]["numbers"]) == [1] * 7 + [3]


@pytest.mark.slow
def test_stop_and_resume_is_bit_exact(train, tmp_path):
    """Weights, optimizer, LR, margin and data order: 40 updates = 20 + 20, augmentation on."""
    flags = (
        "--augment channel;specaugment --speed-perturb 0.1 --margin-end 40 --epoch-updates 15"
        " --conv-norm batch --num-workers 1 --max-update"
    )
    whole = train(tmp_path / "whole", f"{flags} 40")
    first = train(tmp_path / "parts", f"{flags} 20")
    second = train(tmp_path / "parts", f"{flags} 40")
    assert_same_run(
        read(tmp_path / "whole" / "checkpoint_last.pt"),
        read(tmp_path / "parts" / "checkpoint_last.pt"),
    )
    for key in ("loss", "lr", "margin", "gnorm"):
        assert {**traced(first, key), **traced(second, key)} == traced(whole, key)
    assert max(traced(first, "lr")) == 20 and min(traced(second, "lr")) == 21


@pytest.mark.slow
def test_two_processes_equal_accumulation(train, tmp_path):
    """torchrun without a distributed flag: one group, the batches of --update-freq 2."""
    flags = "--dropout 0 --max-update 12 --epoch-updates 6 --cpu"
    train(tmp_path / "one", f"{flags} --update-freq 2")
    torchrun = [BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]
    log = train(tmp_path / "two", flags, before=torchrun)
    assert "training on 2 devices" in log
    one = read(tmp_path / "one" / "checkpoint_last.pt")["model"]
    two = read(tmp_path / "two" / "checkpoint_last.pt")["model"]
    moved = 0.0
    for key in one:
        # Adam divides by the root of the second moment, which blows up rounding of tiny gradients
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-4)
        moved = max(moved, float(one[key].abs().max()))
    assert moved > 0.01


@pytest.mark.slow
def test_an_epoch_is_defined_by_duration(train, tmp_path):
    """10 utterances are not one update: at least --epoch-updates, all of them full."""
    log = train(tmp_path / "ck", "--epoch-updates 20 --max-epoch 2")
    updates = losses(log)
    assert sorted(updates) == list(range(1, 41))
    assert set(traced(log, "bsz").values()) == {"8"}
    valid = [json.loads(line) for line in re.findall(r"\| valid \| (\{.*\})", log)]
    # 8 utterances of valid: every accuracy is a multiple of 1/8
    for row in valid:
        assert float(row["valid_accuracy"]) % 12.5 == 0
        assert float(row["valid_bsz"]) * 1 <= 8


@pytest.mark.slow
def test_other_speakers_from_a_checkpoint(train, run, tiny_recordings, tmp_path):
    """--init-from takes the encoder and its sizes, makes new class weights, and can freeze."""
    from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, prepare

    train(tmp_path / "first", "--max-update 5 --pooling statistics")
    other = tmp_path / "other"
    some = tmp_path / "recordings"
    for name in ("anna", "ben", "dora"):
        (some / name).parent.mkdir(exist_ok=True)
        (some / name).symlink_to(tiny_recordings / name)
    prepare(some, other, PrepareOptions(workers=1, valid_fraction=0.2, test_fraction=0.2))
    first = tmp_path / "first" / "checkpoint_last.pt"
    flags = TRAIN.replace(SMALL, "")
    command = [BIN / "fairseq-train", other, flags, "--save-dir", tmp_path / "second"]
    run(*command, "--max-update 5 --freeze-encoder --init-from", first)
    a, b = read(first), read(tmp_path / "second" / "checkpoint_last.pt")
    assert b["cfg"]["model"]["pooling"] == "statistics" and b["cfg"]["model"]["d_model"] == 16
    assert b["model"]["network.head.weight"].shape == (3, 16)
    encoder = [k for k in a["model"] if ".head." not in k]
    assert encoder and all(torch.equal(a["model"][k], b["model"][k]) for k in encoder)
    # resuming a fine-tuning keeps what it has learned, and the same folder refuses other speakers
    run(*command, "--max-update 8 --freeze-encoder --init-from", first)
    c = read(tmp_path / "second" / "checkpoint_last.pt")
    assert c["optimizer_history"][-1]["num_updates"] == 8
    log = run(BIN / "fairseq-train", other, TRAIN, "--save-dir", tmp_path / "first", code=1)
    assert "--init-from" in log.splitlines()[-1] and "Traceback" not in log


@pytest.mark.slow
def test_a_recipe_trains_and_is_identified(run, repo_root, tiny_data, tmp_path):
    """configs/speaker_id through fairseq-hydra-train, then average, validate and identify."""
    save_dir = tmp_path / "ck"
    log = run(
        *(BIN / "fairseq-hydra-train", "--config-dir", repo_root / "configs" / "speaker_id"),
        "--config-name verification lr_scheduler.warmup_updates=5 task.crop_frames=30",
        "model=conformer_speaker_classroom",
        f"task.data={tiny_data} checkpoint.save_dir={save_dir} optimization.max_update=40",
        "task.epoch_updates=20 dataset.batch_size=8 checkpoint.no_epoch_checkpoints=false",
    )
    assert "num_updates 40" in log
    average = tmp_path / "average.pt"
    epochs = sorted(save_dir.glob("checkpoint[0-9].pt"))
    assert len(epochs) == 2
    run(sys.executable, "-m fairseq_ext.average", *epochs, "--output", average)
    valid = run(
        *(BIN / "fairseq-validate", tiny_data, "--user-dir fairseq_ext --task speaker_id"),
        *("--path", average, "--batch-size 4"),
    )
    shown = float(re.findall(r"accuracy ([\d.]+)", valid)[-1])
    output = tmp_path / "predictions.csv"
    run(
        *(sys.executable, "-m fairseq_ext.speaker.identify", tiny_data, "--path", average),
        *("--subset valid --output", output),
    )
    found = json.loads((tmp_path / "predictions.metrics.json").read_text())
    assert np.isclose(100 * found["top1"]["accuracy"], shown, atol=1e-3)


@pytest.mark.slow
def test_someones_own_architecture_trains_and_is_loaded(run, repo_root, tiny_data, tmp_path):
    plugin = repo_root / "benchmarks" / "classroom_baseline"
    flags = (
        "--task speaker_id --arch classroom_baseline --criterion softmax --optimizer adam --lr 1e-3"
    )
    run(
        *(BIN / "fairseq-train", tiny_data, "--user-dir", plugin, flags),
        *("--batch-size 8 --max-update 2 --save-dir", tmp_path),
    )
    path = tmp_path / "checkpoint_last.pt"
    log = run(
        *(sys.executable, "-m fairseq_ext.speaker.identify", tiny_data, "--path", path),
        *("--subset test --output", tmp_path / "predictions.csv"),
    )
    assert "of 8" in log


def test_presets_and_recipes_say_the_same(repo_root):
    import fairseq  # noqa: F401

    from ext_common import compat

    compat.apply()
    from dataclasses import fields

    from fairseq.models import MODEL_DATACLASS_REGISTRY

    from fairseq_ext.speaker.model import PRESETS
    from fairseq_ext.speaker.network import NetworkOptions

    folder = repo_root / "configs" / "speaker_id" / "model"
    assert {p.stem for p in folder.glob("*.yaml")} == set(PRESETS)
    for name in PRESETS:
        defaults = MODEL_DATACLASS_REGISTRY[name]()
        known = {f.name: getattr(defaults, f.name) for f in fields(NetworkOptions)}
        assert yaml.safe_load((folder / f"{name}.yaml").read_text()) == {"_name": name, **known}


def test_class_weights_are_taken_over_by_name():
    from fairseq_ext.speaker.model import copy_head
    from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork

    options = NetworkOptions(d_model=8, nhead=2, d_ffn=8, layers=1, embedding_dim=4, subcenters=2)
    old, new = SpeakerNetwork(options, 40, 3, speeds=3), SpeakerNetwork(options, 40, 4)
    saved = {f"network.{key}": value for key, value in old.state_dict().items()}
    state = {"model": saved, "task_state": {"speakers": ["ann", "ben", "eve"]}}
    drawn = new.head.weight.detach().clone().view(4, 2, 4)
    assert copy_head(new, state, ["ben", "carl", "dora", "ann"]) == 2
    theirs, found = (x.head.weight.detach().view(-1, 2, 4) for x in (old, new))
    assert torch.equal(found, torch.stack([theirs[1], drawn[1], drawn[2], theirs[0]]))
    assert copy_head(new, state, ["carl", "dora", "fay", "gil"]) == 0
    assert torch.equal(new.head.weight.detach().view(-1, 2, 4), found)


def test_default_is_small(repo_root):
    from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork

    network = SpeakerNetwork(NetworkOptions(), 40, 600)
    assert sum(p.numel() for p in network.parameters()) <= 1_400_000


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--pooling atentive_statistics", "attentive_statistics"),
        ("--encoder conforma", "conformer"),
        ("--augment chanel", "channel"),
        ("--criterion softmax --head cosine", "--head"),
        ("--freeze-encoder", "--init-from"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(train, tmp_path, flags, words):
    log = train(tmp_path / "ck", f"{flags} --max-update 1", code=1)
    assert words in log.splitlines()[-1] and "Traceback" not in log


@pytest.mark.slow
def test_the_shortest_command_and_the_one_it_prints_train_the_same(run, tiny_data, tmp_path):
    """Presets say the rest; 3 updates of the real model, and what `--presets off` makes of its line."""
    log = run(
        *(BIN / "fairseq-train", tiny_data, "--user-dir fairseq_ext --task speaker_id"),
        *("--max-update 3 --save-dir", tmp_path / "short"),
    )
    (line,) = re.findall(r"the same again: (.*)", log)
    words = shlex.split(line.replace(str(tmp_path / "short"), str(tmp_path / "long")))
    run(BIN / words[0], *map(Path, words[1:]))
    short, long = (read(tmp_path / name / "checkpoint_last.pt") for name in ("short", "long"))
    assert_same_run(short, long)
    chosen = json.loads(short["cfg"]["task"]["chosen"])
    assert chosen["data"] == str(tiny_data) and "4 speakers" in chosen["why"]["data"]
    assert long["cfg"]["task"]["chosen"] == ""


@pytest.mark.slow
def test_another_number_of_processes_keeps_the_batch_and_the_rate_of_the_presets(
    run, tiny_data, tmp_path
):
    torchrun = [BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]
    short = [BIN / "fairseq-train", tiny_data, "--user-dir fairseq_ext --task speaker_id --cpu"]
    short += ["--log-format json --log-interval 1 --save-dir", tmp_path / "run", "--max-update"]
    rates = []
    for command in ([*torchrun, *short, "2"], [*short, "4"]):
        log = run(*command)
        assert set(traced(log, "bsz").values()) == {"64"}
        rates.append(read(tmp_path / "run" / "checkpoint_last.pt")["cfg"]["optimization"]["lr"])
    assert rates[0] == rates[1] != []
    assert "--batch-size 32 → 64, processes 2 → 1: epoch 1 goes on after 128 of its" in log


@pytest.mark.slow
def test_minutes_choose_a_length_that_a_resume_goes_on_to(run, tiny_data, tmp_path):
    """Start-up alone spends this budget: some updates, a validation and a checkpoint nevertheless."""
    flags = f"--user-dir fairseq_ext --task speaker_id {SMALL} --minutes 0.1 --save-dir"
    log = run(BIN / "fairseq-train", tiny_data, flags, tmp_path / "run")
    assert "0.1 minutes: " in log and "Saved checkpoint" in log and "valid on 'valid' subset" in log
    state = read(tmp_path / "run" / "checkpoint_last.pt")
    length = json.loads(state["cfg"]["task"]["chosen"])["updates"]
    assert 0 < length < 1600 and state["cfg"]["lr_scheduler"]["max_update"] == length
    again = run(BIN / "fairseq-train", tiny_data, flags, tmp_path / "run")
    updates = state["optimizer_history"][-1]["num_updates"]
    assert f"has all its {updates} updates" in again


@pytest.mark.slow
def test_a_training_can_be_followed(tiny_data, tmp_path, repo_root):
    flags = TRAIN.replace("--log-format json", "") + " --cpu --num-workers 0 --max-update 6"
    words = [BIN / "fairseq-train", tiny_data, flags, "--save-dir", tmp_path]
    stayed, were = run_on_terminal(words, repo_root)
    assert_can_be_followed(stayed, were, tmp_path, "utterances", 6)
