"""Checkpoints: nothing in them is run, none is ever half, and runs go on from them bit by bit."""

import codecs
import errno
import io
import os
import pickle
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ext_common import compat
from ext_common.cli import UserError

compat.apply()

from fairseq import checkpoint_utils  # noqa: E402
from fairseq.file_io import PathManager  # noqa: E402

from ext_common.compat import checkpoints, files  # noqa: E402

STATE = {
    "args": None,
    "cfg": {"model": {"_name": "toy_model"}, "task": {"_name": "toy", "data": "x"}},
    "model": OrderedDict(w=torch.arange(2000.0)),
    "optimizer_history": [
        {"criterion_name": "C", "optimizer_name": "O", "lr_scheduler_state": {}, "num_updates": 3}
    ],
    "extra_state": {"train_iterator": {"epoch": 2}},
}


# --- malicious files ----------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class CallsWhileBuilding(Namespace):
    """Pickles as an allowed Namespace whose attribute is a call."""

    def __init__(self, call):
        super().__init__(attribute=call)

    def __reduce__(self):
        return Namespace, (), vars(self)


def attacks(marker: Path):
    touch = f"touch {marker}"
    return {
        "posix.system": Calls(os.system, touch),
        "builtins.eval": Calls(eval, f"open({str(marker)!r}, 'w').close()"),
        "builtins.exec": Calls(exec, f"open({str(marker)!r}, 'w').close()"),
        "builtins.getattr": Calls(getattr, Namespace(), "__class__"),
        "opens a file": Calls(open, str(marker), "w"),
        "in a Namespace": CallsWhileBuilding(Calls(os.system, touch)),
        "as a factory": defaultdict(os.getcwd),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
@pytest.mark.parametrize("place", ["cfg", "model", "extra_state"])
def test_files_that_call_anything_are_refused_unrun(tmp_path, attack, zipped, place):
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    state = {**STATE, place: {"a": attacks(marker)[attack]}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    for load in (
        checkpoint_utils.load_checkpoint_to_cpu,
        checkpoint_utils.load_ema_from_checkpoint,
    ):
        with pytest.raises(UserError) as refused:
            load(str(path))
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    if attack.startswith("builtins") or attack.startswith("posix"):
        name = attack if zipped else attack.split(".")[1]
        assert name in str(refused.value)
    assert not marker.exists()


def test_the_attacks_work_where_the_safety_is_off(tmp_path):
    """Else the test above could not fail."""
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    for attack in ("posix.system", "builtins.eval", "in a Namespace"):
        torch.save(attacks(marker)[attack], path)
        torch.load(path, weights_only=False)
        assert marker.exists(), attack
        marker.unlink()


def test_only_options_and_arrays_of_numbers_are_added_to_what_torch_allows(monkeypatch):
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        monkeypatch.setattr(compat, "_applied", False)
        compat.apply()
        added = [
            one[0] if isinstance(one, tuple) else one
            for one in torch.serialization.get_safe_globals()
        ]
        kinds = {one for one in added if isinstance(one, type) and issubclass(one, np.dtype)}
        rebuild = np.zeros(0).__reduce__()[0]
        assert set(added) - kinds == {Namespace, np.ndarray, codecs.encode, rebuild}
        assert not any(kind().hasobject for kind in kinds - {np.dtype})
    finally:
        torch.serialization.add_safe_globals(before)


def test_options_of_legacy_architectures_are_read(tmp_path):
    path = tmp_path / "legacy.pt"
    cfg = {**STATE["cfg"], "model": Namespace(arch="transformer", layers=[1, 2])}
    torch.save({**STATE, "cfg": cfg}, path)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert state["cfg"].model.arch == "transformer" and state["cfg"].model.layers == [1, 2]


@pytest.mark.slow
def test_a_fresh_checkpoint_names_nothing_unsafe(reference):
    for path in sorted(reference.glob("*.pt")):
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == [], path


# --- damaged and foreign files ------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files_are_told_in_one_sentence(tmp_path, kept):
    path = tmp_path / "cut.pt"
    torch.save(STATE, path)
    assert files.is_whole(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    assert not files.is_whole(path)
    with pytest.raises(UserError, match=r"cut\.pt is truncated or no checkpoint at all"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_each_cut_of_the_end_is_seen(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"model": {"w": torch.zeros(3)}}, path)
    data = path.read_bytes()
    for size in [*range(0, len(data), 17), len(data) - 1]:
        path.write_bytes(data[:size])
        assert not files.is_whole(path), size


def test_other_files_are_told_in_one_sentence(tmp_path):
    load = checkpoint_utils.load_checkpoint_to_cpu
    with pytest.raises(UserError, match="none.pt does not exist"):
        load(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="is a folder"):
        load(str(tmp_path))
    (tmp_path / "text.pt").write_text("hello " * 1000)
    with pytest.raises(UserError, match="text.pt is truncated or no checkpoint"):
        load(str(tmp_path / "text.pt"))
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(UserError, match="raw.pt is truncated or no checkpoint"):
        load(str(tmp_path / "raw.pt"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "dict.pt")
    with pytest.raises(UserError, match="dict.pt is no fairseq checkpoint"):
        load(str(tmp_path / "dict.pt"))
    torch.save(STATE, tmp_path / "raw.pt")
    with pytest.raises(UserError, match="trained without --store-ema"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "raw.pt"))


def test_bugs_while_loading_are_not_hidden(tmp_path):
    torch.save(STATE, tmp_path / "good.pt")
    with pytest.raises(TypeError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "good.pt"), arg_overrides=3)


def test_checkpoints_of_other_models_are_told_in_one_sentence(toy_registered, reference, tmp_path):
    load = checkpoint_utils.load_model_ensemble_and_task
    good = str(reference / "checkpoint1.pt")
    load([good])
    path = tmp_path / "other.pt"
    state = torch.load(good, weights_only=True)

    torch.save({**state, "cfg": {**state["cfg"], "task": {"_name": "elsewhere"}}}, path)
    with pytest.raises(UserError, match=r"other.pt .* task 'elsewhere', .*--user-dir"):
        load([str(path)])
    torch.save({**state, "cfg": {**state["cfg"], "model": {"_name": "nobody"}}}, path)
    with pytest.raises(UserError, match=r"other.pt .* model 'nobody', .*--user-dir"):
        load([str(path)])
    wider = {**state["cfg"]["model"], "toy_hidden": 9}
    torch.save({**state, "cfg": {**state["cfg"], "model": wider}}, path)
    with pytest.raises(UserError, match=r"other.pt does not fit .*size mismatch for first"):
        load([str(path)])
    with pytest.raises(UserError, match=r"gone.pt does not exist"):
        load([str(tmp_path / "gone.pt")])


def test_an_average_is_a_checkpoint_like_another(toy_registered, reference, tmp_path):
    from fairseq_ext import average

    out = str(tmp_path / "average.pt")
    average.main([str(reference), "--last", "2", "--output", out])
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([out])
    (third,), _, _ = checkpoint_utils.load_model_ensemble_and_task([f"{reference}/checkpoint3.pt"])
    (fourth,), _, _ = checkpoint_utils.load_model_ensemble_and_task([f"{reference}/checkpoint4.pt"])
    expected = (third.first.weight.double() + fourth.first.weight.double()) / 2
    assert torch.equal(model.first.weight, expected.float())
    assert cfg.task._name == "toy" and task.state.names == ["a", "b"]


# --- falling back -------------------------------------------------------------------------------


def test_a_damaged_last_is_passed_over_for_the_newest_whole_one(tmp_path, caplog):
    names = ["checkpoint1.pt", "checkpoint_2_30.pt", "checkpoint_best.pt", "crash.pt", "average.pt"]
    for age, name in enumerate(names):
        torch.save(STATE, tmp_path / name)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    last = tmp_path / "checkpoint_last.pt"
    assert checkpoints.whole_checkpoint(str(last)) == str(last), "a first start has none"
    torch.save(STATE, last)
    assert checkpoints.whole_checkpoint(str(last)) == str(last)
    last.write_bytes(last.read_bytes()[:-100])
    assert checkpoints.whole_checkpoint(str(last)) == str(tmp_path / "checkpoint_best.pt")
    assert "checkpoint_last.pt is truncated" in caplog.text
    (tmp_path / "checkpoint_best.pt").write_bytes(b"")
    assert checkpoints.whole_checkpoint(str(last)) == str(tmp_path / "checkpoint_2_30.pt")


def test_no_whole_checkpoint_is_an_error_in_words(tmp_path):
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(b"PK")
    torch.save(STATE, tmp_path / "crash.pt")
    with pytest.raises(UserError, match="no whole checkpoint beside it: delete it"):
        checkpoints.whole_checkpoint(str(last))
    torch.save(STATE, tmp_path / "checkpoint3.pt")
    with pytest.raises(UserError, match=r"given.pt is truncated .* whole one here is .*t3.pt"):
        (tmp_path / "given.pt").write_bytes(b"PK")
        checkpoints.whole_checkpoint(str(tmp_path / "given.pt"))


# --- writing ------------------------------------------------------------------------------------


def test_numpy_scalars_become_numbers_that_can_be_read(tmp_path):
    path = str(tmp_path / "c.pt")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict()
    metrics = [(10, "acc", "AverageMeter", {"val": np.float64(0.1), np.str_("n"): np.int64(3)})]
    checkpoint_utils.torch_persistent_save({"model": model, "metrics": metrics}, path)
    state = torch.load(path, weights_only=True)
    assert state["metrics"] == [(10, "acc", "AverageMeter", {"val": 0.1, "n": 3})]
    assert type(state["metrics"][0][3]["val"]) is float
    assert state["model"]._metadata == model._metadata


def test_only_what_holds_numpy_scalars_is_copied():
    tensor = torch.zeros(2)
    clean = {"a": [tensor, (1, "x")], "b": OrderedDict(c=tensor)}
    assert files.plain_numbers(clean) is clean
    dirty = {"a": clean, "b": {np.float32(2.0)}}
    result = files.plain_numbers(dirty)
    assert result["a"] is clean and result["b"] == {2.0} and dirty["b"] == {np.float32(2.0)}


def test_what_could_not_be_read_back_is_said_when_written(tmp_path, caplog):
    path = str(tmp_path / "c.pt")
    checkpoint_utils.torch_persistent_save({"a": Path("x")}, path)
    assert "pathlib" in caplog.text and "refused when it is read" in caplog.text


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint_utils.torch_persistent_save(STATE, str(path))
    before = path.read_bytes()

    def full(obj, file, **kwargs):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*c\.pt: No space left on device"):
        checkpoint_utils.torch_persistent_save(STATE, str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


def test_a_second_attempt_begins_a_new_file(tmp_path, monkeypatch):
    path, save, failures = tmp_path / "c.pt", torch.save, [1]

    def unlucky(obj, file, **kwargs):
        if failures:
            failures.pop()
            file.write(b"garbage" * 1000)
            raise RuntimeError("network")
        save(obj, file, **kwargs)

    monkeypatch.setattr(torch, "save", unlucky)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    checkpoint_utils.torch_persistent_save({"a": 1}, str(path))
    clean = io.BytesIO()
    save({"a": 1}, clean)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert abs(path.stat().st_size - len(clean.getvalue())) < 1000


def test_a_copy_is_whole_or_absent(tmp_path, monkeypatch):
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    source.write_bytes(b"new" * 1000)
    target.write_bytes(b"old")
    old = os.stat(target).st_ino
    seen = []

    def watch(reader, writer, length):
        writer.write(reader.read(100))
        writer.flush()
        seen.append(target.read_bytes())
        writer.write(reader.read())

    monkeypatch.setattr(shutil, "copyfileobj", watch)
    assert PathManager.copy(str(source), str(target), overwrite=True)
    assert seen == [b"old"]
    assert target.read_bytes() == source.read_bytes()
    # Not a link either: editing one must not edit the other.
    assert len({old, os.stat(target).st_ino, os.stat(source).st_ino}) == 3


@pytest.mark.slow
def test_kill_in_copy_and_in_write_costs_nothing(new_toy, reference):
    """Killed in a copy, started again, killed in a write, started again: as if never killed."""
    toy = new_toy()
    die = Path(__file__).resolve().parent.parent / "toy_plugin" / "die.py"
    flags = ["--batch-size", 3, "--update-freq", 2, "--max-epoch", 4, "--save-interval-updates", 3]

    def killed(*how):
        program = [sys.executable, die, *how]
        log = toy.train("ck", *flags, program=program, code=-signal.SIGKILL)
        for path in (toy.folder / "ck").glob("*.pt"):
            assert files.is_whole(path), path
        return log

    killed("copy", 4)
    assert (toy.folder / "ck" / "checkpoint_last.pt.tmp").exists(), "the kill was in the copy"
    log = killed("write", 3)
    assert "Loaded checkpoint ck/checkpoint_last.pt" in log
    tmp = [path.name for path in (toy.folder / "ck").glob("*.tmp")]
    assert any(name.startswith("checkpoint_2_") or name == "checkpoint2.pt.tmp" for name in tmp)
    log = toy.train("ck", *flags)
    assert "Loaded checkpoint ck/checkpoint_last.pt" in log
    _assert_same_state(toy.folder / "ck" / "checkpoint4.pt", reference / "checkpoint4.pt")


@pytest.mark.slow
def test_a_truncated_last_and_a_new_ema_still_resume(new_toy, reference):
    toy = new_toy()
    shutil.copytree(reference, toy.folder / "ck")
    for name in ("checkpoint_last.pt", "checkpoint4.pt", "checkpoint_best.pt"):
        data = (toy.folder / "ck" / name).read_bytes()
        (toy.folder / "ck" / name).write_bytes(data[: len(data) // 2])
    os.utime(toy.folder / "ck" / "checkpoint3.pt")
    flags = ["--batch-size", 3, "--update-freq", 2, "--max-epoch", 4]
    log = toy.train("ck", *flags, "--store-ema", "--ema-decay", 0.5, "--toy-numpy-state")
    assert "checkpoint_last.pt is truncated" in log and "continuing from ck/checkpoint3.pt" in log
    _assert_same_state(toy.folder / "ck" / "checkpoint4.pt", reference / "checkpoint4.pt")
    state = torch.load(toy.folder / "ck" / "checkpoint4.pt", weights_only=True)
    assert type(state["task_state"]["scale"]) is float
    assert state["extra_state"]["ema"].keys() == state["model"].keys()


def _assert_same_state(path, other):
    state, expected = (torch.load(p, weights_only=True) for p in (path, other))
    for name, value in expected["model"].items():
        assert torch.equal(value, state["model"][name]), name
    optimizer, wanted = state["last_optimizer_state"], expected["last_optimizer_state"]
    for index, values in wanted["state"].items():
        for name, value in values.items():
            same = optimizer["state"][index][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(same)), (index, name)
    assert state["optimizer_history"][-1] == expected["optimizer_history"][-1]
    assert state["extra_state"]["train_iterator"] == expected["extra_state"]["train_iterator"]
