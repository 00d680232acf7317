"""Folders that are whole or absent, whoever is killed and whoever comes at the same time."""

import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

from ext_common import folders
from ext_common.cli import UserError
from ext_common.folders import difference, exclusive, is_made, lock, making, partial_folder

FILES = 5


def in_process(function):
    """A forked process that is started; 0 where `function` ended, 3 where it lost against another one."""

    def run():
        try:
            function()
        except UserError as error:
            lost = "is being written by another process" in str(error) and "\n" not in str(error)
            os._exit(3 if lost else 4)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def content(folder):
    """The text that all files of a folder hold, None where it is not whole."""
    found = [(folder / str(n)).read_text() for n in range(FILES) if (folder / str(n)).exists()]
    return found[0] if len(found) == FILES and len(set(found)) == 1 else None


def make(dest, text, pause=0.0):
    """Files that all hold `text`, written one after the other; whether it was made now."""
    with making(dest, lambda: content(dest) == text) as folder:
        for n in range(FILES if folder else 0):
            (folder / str(n)).write_text(text)
            time.sleep(pause)
    return folder is not None


def unsupported(*_):
    raise OSError(errno.EINVAL, "Invalid argument")


# --- whole or absent -----------------------------------------------------------------------------


def test_made_once_and_replaced_whole(tmp_path):
    dest = tmp_path / "new" / "data"
    assert make(dest, "a") and not make(dest, "a") and make(dest, "b")
    assert content(dest) == "b"
    assert [path.name for path in dest.parent.iterdir()] == ["data"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    make(tmp_path / "far" / "data", "a")
    (tmp_path / "data").symlink_to(tmp_path / "far" / "data")
    make(tmp_path / "data", "b")
    assert (tmp_path / "data").is_symlink() and content(tmp_path / "far" / "data") == "b"


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_failed_is_gone_unless_it_can_be_gone_on_with(tmp_path, goes_on):
    dest = tmp_path / "data"
    continues = (lambda part: (part / "half").exists()) if goes_on else None
    with pytest.raises(ZeroDivisionError), making(dest, continues=continues) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert partial_folder(dest).exists() == goes_on and not dest.exists()
    with making(dest, continues=continues) as folder:
        assert (folder / "half").exists() == goes_on
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_each_step_of_replacing(tmp_path, monkeypatch, exchange):
    """The old folder or the new one, nothing hidden for ever; where names can be exchanged at no moment
    neither."""
    dest, died = tmp_path / "data", []
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", unsupported)

    def dying_at(step):
        steps = iter(range(1, 99))

        def before(function):
            def call(*args, **kwargs):
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(os, "rename", before(os.rename))
        monkeypatch.setattr(shutil, "rmtree", before(shutil.rmtree))
        monkeypatch.setattr(folders, "_exchange", before(folders._exchange))
        make(dest, "new")

    for step in range(1, 99):
        shutil.rmtree(dest, ignore_errors=True)
        make(dest, "old")
        process = in_process(lambda step=step: dying_at(step))
        process.join()
        died.append(process.exitcode)
        if exchange:
            assert content(dest) in ("old", "new"), step
        again = content(dest) or "old"
        assert not make(dest, again) and content(dest) == again, step
        assert not (tmp_path / ".data.replaced").exists(), step
        make(dest, "other")
        assert content(dest) == "other"
        assert [path.name for path in tmp_path.iterdir()] == ["data"], step
        if process.exitcode == 0:
            break
    # rmtree of what an earlier run left, renames, rmtree of the old one
    assert died == [-signal.SIGKILL] * (4 if exchange else 7) + [0]


# --- one at a time -------------------------------------------------------------------------------


def test_a_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Replaced between opening and locking, or removed: who holds the old file holds nothing."""
    path, flock = tmp_path / "x", fcntl.flock
    happens = [lambda: os.replace(tmp_path / "other", path), path.unlink]
    (tmp_path / "other").touch()

    def late(handle, how):
        if happens:
            happens.pop()()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    handle = lock(path, "x")
    assert not happens and os.path.samestat(os.fstat(handle), os.stat(path))
    monkeypatch.undo()
    with pytest.raises(UserError, match="x is being written by another process: wait for it"):
        lock(path, "x")
    os.close(handle)
    os.close(lock(path, "x"))


def test_a_lock_file_is_gone_afterwards_and_one_that_was_left_does_not_matter(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "x", "x"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_lock_file_is_removed_while_it_is_held(tmp_path, monkeypatch):
    """Afterwards it could be another process's."""
    path, unlink, refused = tmp_path / "x", os.unlink, []

    def late(name):
        with pytest.raises(UserError, match="being written") as error:
            lock(path, "x")
        refused.append(error)
        unlink(name)

    monkeypatch.setattr(os, "unlink", late)
    with exclusive(path, "x"):
        pass
    assert len(refused) == 1 and not path.exists()


def test_who_waits_finds_it_made(tmp_path, capfd):
    dest, results = tmp_path / "data", []

    def slow():
        make(dest, "a", pause=0.1)

    process = in_process(slow)
    while not partial_folder(dest).exists():
        time.sleep(0.001)
    with making(dest, lambda: content(dest) == "a", wait=True) as folder:
        results.append(folder)
    process.join()
    assert results == [None] and content(dest) == "a"
    assert f"waiting for another process that writes {dest}" in capfd.readouterr().err


@pytest.mark.parametrize("count", [2, 10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", [True, False])
def test_many_at_once_killed_at_random(tmp_path, monkeypatch, count, exchange):
    """They replace each other's folder, and each that ends well has left it whole."""
    draw, dest = random.Random(count), tmp_path / "data"
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", unsupported)
    for round_ in range(4):
        text = f"{round_}"
        processes = [in_process(lambda text=text: make(dest, text, 0.002)) for _ in range(count)]
        for process in draw.sample(processes, count // 2):
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert set(codes) <= {0, 3, -signal.SIGKILL}
        if 0 in codes:
            assert content(dest) == text
        elif exchange and round_:
            assert content(dest) in (text, f"{round_ - 1} again")
        # another text: what is there already would be left without a look at what the killed ones left
        make(dest, f"{text} again")
        assert [p.name for p in tmp_path.iterdir()] == ["data"]


# --- is it the one that these options make --------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, text",
    [
        ({"seed": 1}, {"seed": 2}, "--seed 1, not 2"),
        ({"a": 1, "n_mels": [1, 2]}, {"a": 1, "n_mels": []}, "--n-mels 1,2, not empty"),
        (
            {"options": {"seed": 1}},
            {"options": {"seed": 1, "opencc": "t2s"}},
            "--opencc none, not t2s",
        ),
        ({"mono": "ab", "mode": 1}, {"mono": "cd", "mode": 2}, "other text"),
        ({"name": "beam"}, {"name": "topk"}, "mode beam → topk"),
        ({"given": {"valid": 1}}, {"given": {"valid": 2}}, "other files"),
        ({"gone": 1}, {}, "--gone 1, not none"),
        ({"gone": None}, {}, "other options"),
    ],
)
def test_what_two_plans_differ_in(old, new, text):
    words = {"mono": "other text", "name": "mode {before} → {now}", "given": "other files"}
    assert difference(old, new, words) == text


def test_made_by_these_options_or_not(tmp_path):
    dest, plans = tmp_path / "data", {}

    def asked(plan, **more):
        return is_made(dest, plan, lambda folder: plans.get(folder), **more)

    assert not asked({"seed": 1})
    dest.mkdir()
    assert not asked({"seed": 1})
    (dest / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
        asked({"seed": 1}, overwrite=True)
    plans[dest] = {"seed": 1}
    assert asked({"seed": 1}) and not asked({"seed": 1}, overwrite=True)
    with pytest.raises(
        UserError, match="prepared with --seed 1, not 2: use --overwrite to replace"
    ):
        asked({"seed": 2})
    assert not asked({"seed": 2}, overwrite=True)
    shutil.rmtree(dest)
    dest.touch()
    with pytest.raises(UserError, match="is a file: give a folder to write"):
        asked({"seed": 1})
