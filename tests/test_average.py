"""Averaging checkpoints: the closed form, what is kept, what is refused."""

import functools
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from omegaconf import OmegaConf

from ext_common.cli import UsageError, UserError
from fairseq_ext import average
from tests import processes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def state(seed, *, tied=True, dim=4, arch="conformer_speaker", updates=1):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, dim), torch.nn.BatchNorm1d(dim))
    module.register_buffer("mask", torch.full((2,), float("-inf")))
    weights = module.state_dict()
    weights["1.num_batches_tracked"].fill_(updates)
    weights["embed"] = torch.randn(5, 2)
    weights["output"] = weights["embed"] if tied else weights["embed"].clone()
    weights["half"] = torch.randn(3).half()
    weights["double"] = torch.randn(3, dtype=torch.float64)
    return {
        "args": None,
        "cfg": {
            "model": {"_name": arch, "x": [updates]},
            "task": {"_name": "speaker_id"},
            "legacy": Namespace(a=1),
        },
        "model": weights,
        "criterion": OrderedDict(scale=torch.randn(2)),
        "optimizer_history": [{"num_updates": updates}],
        "task_state": {"speakers": ["a", "b"], "n": updates},
        "extra_state": {"train_iterator": {"epoch": updates}, "ema": {"w": torch.zeros(1)}},
        "last_optimizer_state": {"state": torch.zeros(9)},
    }


@pytest.fixture
def folder(tmp_path):
    names = ["checkpoint_1_5.pt", "checkpoint1.pt", "checkpoint2.pt", "checkpoint_3_30.pt"]
    for number, name in enumerate(names, 1):
        torch.save(state(number, updates=number), tmp_path / name)
    for name in ("checkpoint_last.pt", "checkpoint_best.pt", "crash.pt", "checkpoint2.pt.tmp"):
        (tmp_path / name).write_bytes(b"not to be read")
    return tmp_path


def run(*argv):
    average.main([str(word) for word in argv])


def load(path):
    return torch.load(path, weights_only=True)


def test_is_the_float64_mean_rounded_once(folder, tmp_path):
    out = tmp_path / "out" / "average.pt"
    paths = [folder / "checkpoint1.pt", folder / "checkpoint2.pt", folder / "checkpoint_1_5.pt"]
    run(*paths, "--output", out)
    result, given = load(out), [load(path) for path in paths]
    for part, name in [("model", "0.weight"), ("model", "half"), ("criterion", "scale")]:
        values = [one[part][name].numpy().astype(np.float64) for one in given]
        np.testing.assert_array_equal(
            result[part][name].numpy(), (sum(values) / 3).astype(np.float32)
        )
    assert result["model"]["half"].dtype == torch.float32
    assert result["model"]["double"].dtype == torch.float64
    doubles = np.mean([one["model"]["double"].numpy() for one in given], axis=0)
    np.testing.assert_allclose(result["model"]["double"].numpy(), doubles, rtol=1e-15)
    assert torch.equal(result["model"]["mask"], torch.full((2,), float("-inf")))


def test_the_rest_is_the_last_ones_without_the_optimizer(folder, tmp_path):
    out = tmp_path / "average.pt"
    run(folder / "checkpoint2.pt", folder / "checkpoint1.pt", "--output", out)
    result, last = load(out), load(folder / "checkpoint1.pt")
    assert set(last) - set(result) == {"last_optimizer_state"}
    for name in ("cfg", "task_state", "optimizer_history"):
        assert result[name] == last[name]
    assert result["extra_state"] == {"train_iterator": {"epoch": 2}}
    assert result["model"]["1.num_batches_tracked"] == 2
    assert result["model"]._metadata == last["model"]._metadata
    assert list(result["model"]) == list(last["model"])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_of_equal_ones_is_itself_bit_by_bit(folder, tmp_path, count):
    path, out = folder / "checkpoint2.pt", tmp_path / "average.pt"
    run(*[path] * count, "--output", out)
    result, same = load(out), load(path)
    for name, value in same["model"].items():
        expected = value.float() if value.dtype == torch.float16 else value
        assert torch.equal(result["model"][name], expected), name
        assert result["model"][name].dtype == expected.dtype


def test_tied_tensors_stay_tied_and_only_those(folder, tmp_path):
    out = tmp_path / "average.pt"
    run(folder / "checkpoint1.pt", folder / "checkpoint2.pt", "--output", out)
    weights = load(out)["model"]
    assert weights["embed"].data_ptr() == weights["output"].data_ptr()
    torch.save(state(9, tied=False), tmp_path / "untied.pt")
    run(folder / "checkpoint1.pt", tmp_path / "untied.pt", "--output", out)
    weights = load(out)["model"]
    assert weights["embed"].data_ptr() != weights["output"].data_ptr()


def test_a_folder_gives_its_newest_and_says_which(folder, tmp_path, capsys):
    out = tmp_path / "average.pt"
    run(folder, "--last", 2, "--output", out)
    said = capsys.readouterr().out.splitlines()
    names = ["checkpoint2.pt", "checkpoint_3_30.pt"]
    assert said[1:3] == [f"  {folder / name}" for name in names]
    expected = sum(load(folder / name)["model"]["embed"].double() for name in names) / 2
    assert torch.equal(load(out)["model"]["embed"], expected.float())
    assert [path.name for path in average.choose([str(folder)], None)] == [
        *("checkpoint_1_5.pt", "checkpoint1.pt", "checkpoint2.pt", "checkpoint_3_30.pt")
    ]


RECIPES = sorted(CONFIGS.glob("*/*.yaml"))
# What the recipes' own comments and the page on speakers say is averaged afterwards.
AVERAGED = {
    **dict.fromkeys(
        "fsdd hw4 libri251 verification lstm tiny_short compact_short forward reverse".split(), 5
    ),
    **dict.fromkeys(("tiny", "base"), 10),
}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_leaves_what_is_averaged(path, tmp_path, monkeypatch):
    """By fairseq's own rules of what is kept; the others are told the flags that keep it."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    said = re.search(r"average .* --last (\d+)", path.read_text(encoding="utf-8"))
    number = AVERAGED.get(path.stem, 0)
    assert not said or int(said[1]) == number
    cfg = OmegaConf.merge(CheckpointConfig(), recipe["checkpoint"], {"save_dir": str(tmp_path)})
    updates = recipe["optimization"]["max_update"]
    epoch = recipe["task"].get("epoch_updates") or updates // 10
    keep_as_fairseq_does(cfg, updates, max(epoch, updates // 20), monkeypatch)
    if number:
        chosen = average.choose([str(tmp_path)], number)
        assert len(chosen) == len(set(chosen)) == number
    else:
        with pytest.raises(UserError, match="--keep-last-epochs 5 instead of --no-epoch-checkp"):
            average.choose([str(tmp_path)], 5)


def keep_as_fairseq_does(cfg, updates, epoch, monkeypatch):
    """The files of a training that saves after each epoch, and within epochs where asked for."""
    monkeypatch.setattr(checkpoint_utils.save_checkpoint, "best", 0.0, raising=False)
    every = cfg.save_interval_updates or updates
    ends = set(range(epoch, updates + 1, epoch))
    for done in sorted({*ends, *range(every, updates, every)}):
        epoch = SimpleNamespace(
            epoch=1 + sum(end < done for end in ends),
            end_of_epoch=functools.partial(bool, done in ends),
            state_dict=dict,
        )
        trainer = SimpleNamespace(
            data_parallel_rank=0,
            data_parallel_world_size=1,
            is_fsdp=False,
            should_save_checkpoint_on_current_rank=True,
            consolidate_optimizer=lambda: None,
            get_num_updates=functools.partial(int, done),
            checkpoint_suffix="",
            task=None,
            save_checkpoint=lambda path, extra_state: Path(path).touch(),
        )
        checkpoint_utils.save_checkpoint(cfg, trainer, epoch, -done)


def test_ten_comes_after_nine(tmp_path):
    for epoch in (9, 10, 11):
        (tmp_path / f"checkpoint{epoch}.pt").touch()
    chosen = average.choose([str(tmp_path)], 2)
    assert [path.name for path in chosen] == ["checkpoint10.pt", "checkpoint11.pt"]


@pytest.mark.parametrize(
    "metric, order", [("bleu", [30, 9.5, 9.499]), ("loss", [-1, 9.499, 9.5]), ("ppl", [2, 3, 10])]
)
def test_best_ones_by_value_and_direction_of_the_metric(tmp_path, metric, order):
    # As fairseq writes them: three decimals and a random digit.
    for number, value in enumerate([order[1], order[2], order[0]]):
        (tmp_path / f"checkpoint.best_{metric}_{value:.3f}{number}.pt").touch()
    for name in ("checkpoint_best.pt", "checkpoint3.pt", f"checkpoint.best_{metric}_99.0000.tmp"):
        (tmp_path / name).touch()
    chosen = average.choose([str(tmp_path)], best=2)
    assert [path.name.split("_")[2][:-4] for path in chosen] == [f"{v:.3f}" for v in order[:2]]


def test_best_ones_of_equal_value_are_both_taken(tmp_path):
    for digit in "73":
        (tmp_path / f"checkpoint.best_bleu_20.000{digit}.pt").touch()
    assert len(average.choose([str(tmp_path)], best=2)) == 2


@pytest.mark.parametrize("maximise", [True, False])
def test_best_ones_by_an_unknown_metric_ask_the_checkpoint(tmp_path, maximise):
    for number in (1, 2, 3):
        one = state(number)
        one["cfg"]["checkpoint"] = {"maximize_best_checkpoint_metric": maximise}
        torch.save(one, tmp_path / f"checkpoint.best_comet_{number}.0000.pt")
    out = tmp_path / "average.pt"
    run(tmp_path, "--best", 2, "--output", out)
    kept = (2, 3) if maximise else (1, 2)
    expected = sum(state(number)["model"]["embed"].double() for number in kept) / 2
    assert torch.equal(load(out)["model"]["embed"], expected.float())
    torch.save(state(4), tmp_path / "checkpoint.best_comet_0.0000.pt")
    for number in (1, 2, 3):
        (tmp_path / f"checkpoint.best_comet_{number}.0000.pt").unlink()
    with pytest.raises(UserError, match="does not say whether more comet is better"):
        run(tmp_path, "--best", 1, "--output", out)


def test_best_ones_that_are_not_there_or_not_comparable_are_told(tmp_path):
    out = tmp_path / "out" / "average.pt"
    with pytest.raises(UserError, match="holds 0 .* 3 are asked for: .*--keep-best-checkpoints 3"):
        run(tmp_path, "--best", 3, "--output", out)
    for name in ("bleu_1.0000", "loss_2.0000"):
        (tmp_path / f"checkpoint.best_{name}.pt").touch()
    with pytest.raises(UserError, match="by bleu and by loss"):
        run(tmp_path, "--best", 1, "--output", out)
    with pytest.raises(UsageError, match="--last or --best, not both"):
        run(tmp_path, "--best", 1, "--last", 1, "--output", out)
    with pytest.raises(UsageError, match="--best must be at least 1"):
        run(tmp_path, "--best", 0, "--output", out)
    with pytest.raises(UsageError, match="--best goes with one folder"):
        run(tmp_path / "checkpoint1.pt", "--best", 1, "--output", out)


def test_translation_average_is_the_same_command(tmp_path):
    # The state of a Transformer with --share-all-embeddings: three names, one tensor.
    names = ["encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"]
    for number in (1, 2):
        torch.manual_seed(number)
        shared = torch.nn.Embedding(9, 4).weight.data
        weights = {f"{name}.weight": shared for name in names}
        task_state = {"translation": {"spm": {"en": torch.arange(9, dtype=torch.uint8)}}}
        cfg = {"model": Namespace(arch="transformer"), "task": {"_name": "translation_spm"}}
        one = {"cfg": cfg, "model": weights, "task_state": task_state}
        torch.save(one, tmp_path / f"checkpoint.best_bleu_{number}.0000.pt")
    out = tmp_path / "average.pt"
    command = [sys.executable, "-m", "fairseq_ext.translation.average", tmp_path, "--best", "2"]
    done = processes.run([*command, "--output", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = torch.load(out, weights_only=False)
    assert len({weight.untyped_storage().data_ptr() for weight in result["model"].values()}) == 1
    given = [load_any(path)["model"][f"{names[0]}.weight"] for path in tmp_path.glob("*best*")]
    mean = (given[0].double() + given[1].double()) / 2
    assert torch.equal(result["model"][f"{names[2]}.weight"], mean.float())
    assert torch.equal(result["task_state"]["translation"]["spm"]["en"], torch.arange(9).byte())
    usage = processes.run([*command[:3], "--help"], capture_output=True, text=True).stdout
    assert "fairseq_ext.translation.average" in usage and "--best N" in usage


def load_any(path):
    return torch.load(path, weights_only=False)


def test_other_architectures_are_refused_in_one_sentence(folder, tmp_path):
    good, bad, out = folder / "checkpoint1.pt", tmp_path / "bad.pt", tmp_path / "average.pt"

    def refused(other, match):
        torch.save(other, bad)
        with pytest.raises(UserError, match=match) as error:
            run(good, bad, "--output", out)
        assert str(bad) in str(error.value) and "\n" not in str(error.value)
        assert not out.exists()

    refused(state(1, arch="other"), "speaker_id / other, .* speaker_id / conformer_speaker")
    refused(state(1, dim=5), r"model\.0\.weight is \(5, 3\) in .* but \(4, 3\) in ")
    more = state(1)
    more["model"]["extra"] = torch.zeros(1)
    refused(more, r"only .*bad\.pt has model\.extra")
    less = state(1)
    del less["model"]["embed"]
    refused(less, r"only .*checkpoint1\.pt has model\.embed")
    refused({"weights": 1}, "is no fairseq checkpoint")


def test_bad_usage_and_bad_files_are_told(folder, tmp_path):
    out = tmp_path / "average.pt"
    with pytest.raises(UserError, match="checkpoint_last.pt is truncated or no checkpoint"):
        run(folder / "checkpoint_last.pt", "--output", out)
    with pytest.raises(UserError, match="none.pt does not exist"):
        run(tmp_path / "none.pt", "--output", out)
    with pytest.raises(
        UserError, match="holds 4 checkpoints .* but 9 are asked for: give --last 4, or"
    ):
        run(folder, "--last", 9, "--output", out)
    with pytest.raises(UsageError, match="--last must be at least 1"):
        run(folder, "--last", 0, "--output", out)
    with pytest.raises(UsageError, match="or one folder"):
        run(folder, folder, "--output", out)
    with pytest.raises(UsageError, match="--last goes with one folder"):
        run(folder / "checkpoint1.pt", "--last", 1, "--output", out)
    with pytest.raises(UsageError, match="is a folder"):
        run(folder, "--output", tmp_path)


def test_a_file_that_calls_is_refused_unrun(tmp_path):
    class Calls:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": {"w": Calls()}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt holds builtins\.print"):
        run(tmp_path / "bad.pt", "--output", tmp_path / "out.pt")


@pytest.mark.slow
def test_as_a_command(folder, tmp_path):
    command = [sys.executable, "-m", "fairseq_ext.average"]
    done = processes.run([*command, folder, "--output", tmp_path / "a.pt"], capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "a.pt").exists()
    done = processes.run([*command, "none.pt", "--output", "a.pt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: none.pt does not exist: give the path of a checkpoint\n"
