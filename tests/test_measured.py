"""`average --validate` and `--best-of`: what validation says decides what is written."""

import shutil
import sys

import pytest
import torch

from ext_common.cli import UserError
from fairseq_ext import average
from fairseq_ext.measured import Measure, measured
from tests.trainings import read, run_command
from tests.translation.conftest import toy_checkpoint, toy_data, toy_tsv  # noqa: F401


@pytest.mark.parametrize("more, better", [(True, "b"), (False, "a")])
def test_the_metric_says_which_way_is_better(more, better):
    a, b = Measure("x", 1.0, more), Measure("x", 2.0, more)
    assert b.is_better_than(a) == (better == "b") and a.is_better_than(b) == (better == "a")
    assert not a.is_better_than(a)


@pytest.fixture
def folder(toy_checkpoint, tmp_path):  # noqa: F811
    """A training whose last checkpoint is spoilt, beside its best one."""
    shutil.copy(toy_checkpoint, tmp_path / "checkpoint_best.pt")
    state = read(toy_checkpoint)
    for value in state["model"].values():
        value.zero_()  # all pieces are alike to it, so that nothing it writes is right
    torch.save(state, tmp_path / "checkpoint1.pt")
    return tmp_path


@pytest.mark.slow
def test_the_better_one_is_written(folder):
    best = read(folder / "checkpoint_best.pt")
    words = [
        sys.executable,
        "-m",
        "fairseq_ext.average",
        folder / "checkpoint1.pt",
        "--output",
        folder / "out.pt",
    ]
    said = run_command([*words, "--validate"], folder)
    assert "on the validation data: the average has bleu" in said
    assert f"use {folder / 'checkpoint_best.pt'}: averaging did not help here" in said
    assert "| INFO |" not in said
    assert not torch.equal(
        read(folder / "out.pt")["model"]["encoder.embed_tokens.weight"],
        best["model"]["encoder.embed_tokens.weight"],
    )
    said = run_command([*words, "--best-of"], folder)
    chosen = read(folder / "out.pt")
    assert f"{folder / 'out.pt'} is now {folder / 'checkpoint_best.pt'}" in said
    assert all(torch.equal(chosen["model"][k], v) for k, v in best["model"].items())
    assert "last_optimizer_state" not in chosen
    words[3] = folder / "checkpoint_best.pt"
    said = run_command([*words, "--best-of"], folder)
    assert f"use {folder / 'out.pt'}" in said

    # Of a training that translated nothing in validation, whose best has the lowest loss, BLEU decides too.
    for name in ("checkpoint1.pt", "checkpoint_best.pt"):
        state = read(folder / name)
        state["cfg"]["task"]["no_valid_text"] = True
        state["cfg"]["checkpoint"]["best_checkpoint_metric"] = "loss"
        state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"] = False
        torch.save(state, folder / name)
    words[3] = folder / "checkpoint1.pt"
    said = run_command([*words, "--validate"], folder)
    assert "the average has bleu" in said and f"use {folder / 'checkpoint_best.pt'}" in said


def test_what_cannot_be_measured_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere is not there: give --data"):
        measured(tmp_path / "a.pt", {"cfg": {"task": {"data": str(tmp_path)}}}, "nowhere")
    with pytest.raises(UserError, match="the data of this training is not there"):
        measured(tmp_path / "a.pt", {"cfg": {}})
    with pytest.raises(UserError, match="checkpoint_best.pt is not there"):
        average.compare(tmp_path / "a.pt", {}, tmp_path / "checkpoint_best.pt", True, None)
