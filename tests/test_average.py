"""Averaging checkpoints: the closed form, what is kept, what is refused."""

import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch

from ext_common.cli import UsageError, UserError
from fairseq_ext import average


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


def test_ten_comes_after_nine(tmp_path):
    for epoch in (9, 10, 11):
        (tmp_path / f"checkpoint{epoch}.pt").touch()
    chosen = average.choose([str(tmp_path)], 2)
    assert [path.name for path in chosen] == ["checkpoint10.pt", "checkpoint11.pt"]


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
    with pytest.raises(UserError, match="holds 4 checkpoints .* but 9 are asked for"):
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


def test_as_a_command(folder, tmp_path):
    command = [sys.executable, "-m", "fairseq_ext.average"]
    done = subprocess.run([*command, folder, "--output", tmp_path / "a.pt"], capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "a.pt").exists()
    done = subprocess.run([*command, "none.pt", "--output", "a.pt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: none.pt does not exist: give the path of a checkpoint\n"
