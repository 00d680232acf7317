"""A training that is told to stop: saved after the update it is at, and goes on as if it had not been."""

import os
import signal
import sys

import pytest
from fairseq import checkpoint_utils, trainer

from ext_common import engine, stopping
from ext_common.presets.save_dirs import peek, updates_of
from ext_common.stopping import Wishes, is_due
from tests.trainings import assert_same_run, read

FLAGS = ("--batch-size", 3, "--max-epoch", 2)  # of 8 updates each


@pytest.fixture
def signals(monkeypatch):
    """signals({update: number}): what this process is sent while it makes that update; reset afterwards."""
    engine.apply()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    step = trainer.Trainer.train_step

    def send(at):
        def train_step(self, *args, **kwargs):
            for number in at.get(self.get_num_updates() + 1, ()):
                signal.raise_signal(number)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(trainer.Trainer, "train_step", train_step)

    yield send
    assert {n: signal.getsignal(n) for n in before} == before, "handlers are given back"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(train_here, signals, capfd, number, code):
    """Of updates 3 and 8, one in an epoch and one at its end; a SIGINT that is passed on is one."""
    whole = read(train_here("whole", *FLAGS) / "checkpoint_last.pt")
    for at in (3, 8):
        signals({at: [number, number]})
        with pytest.raises(SystemExit) as ended:
            train_here("stopped", *FLAGS)
        assert ended.value.code == code
    assert_same_run(read(train_here("stopped", *FLAGS) / "checkpoint_last.pt"), whole)
    said = capfd.readouterr()
    assert stopping.NAMES[number] in said.err


def test_what_is_left_of_a_stopped_training(train_here, signals, caplog):
    caplog.set_level("INFO")
    signals({5: [signal.SIGTERM]})
    with pytest.raises(SystemExit):
        train_here("here", *FLAGS, "--no-epoch-checkpoints")
    (path,) = (train_here.folder / "here").glob("*.pt")
    assert path.name == "checkpoint_last.pt" and updates_of(peek(path)) == 5
    assert f"stopped by SIGTERM after update 5: {path} holds it" in caplog.text


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    wishes = Wishes()
    wishes.take(signal.SIGINT, None)
    clock[0] += 0.5  # the same one, passed on by a launcher
    wishes.take(signal.SIGINT, None)
    clock[0] += 1
    with pytest.raises(KeyboardInterrupt):
        wishes.take(signal.SIGINT, None)
    assert wishes.asked == signal.SIGINT


def test_a_loading_worker_lets_the_training_end_it():
    wishes = Wishes()
    reading, writing = os.pipe()
    wishes.listen()
    try:
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)  # sent to the whole group
            os.write(writing, b"alive")
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert os.read(reading, 9) == b"alive"
        assert not wishes.asked
    finally:
        wishes.stop_listening()


def test_a_signal_that_is_ignored_stays_ignored():
    """As `nohup` and a script's `&` leave it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    wishes = Wishes()
    try:
        wishes.listen()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        wishes.stop_listening()
        signal.signal(signal.SIGINT, before)


def test_saved_by_the_clock(train_here, monkeypatch):
    """Between epochs, too, and no more often; the run is the same."""
    assert [is_due(2, s) for s in (0, 119, 120, 500)] == [False, False, True, True]
    assert not is_due(0, 1e9)
    engine.apply()
    written = []
    save = checkpoint_utils.save_checkpoint

    def noted(cfg, trainer, epoch_itr, loss):
        written.append((trainer.get_num_updates(), loss is not None))
        return save(cfg, trainer, epoch_itr, loss)

    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", noted)
    whole = read(train_here("whole", *FLAGS) / "checkpoint_last.pt")
    assert written == [(8, True), (16, True)]
    written.clear()
    due = iter([False] * 2 + [True] + [False] * 99)
    monkeypatch.setattr(stopping, "is_due", lambda minutes, seconds: next(due))
    clocked = read(train_here("clocked", *FLAGS) / "checkpoint_last.pt")
    assert written == [(3, False), (8, True), (16, True)]
    assert_same_run(clocked, whole)


def test_a_start_that_fails_leaves_no_empty_folder(tmp_path, monkeypatch):
    engine.apply()
    noted = []
    monkeypatch.setattr(stopping.atexit, "register", lambda *call: noted.append(call))
    place = tmp_path / "checkpoints" / "run"
    checkpoint_utils.verify_checkpoint_directory(str(place))
    (action, *arguments), *more = noted
    assert not more and place.is_dir()
    action(*arguments)
    assert not list(tmp_path.iterdir())
    # one with a checkpoint stays, and so does one that was there
    place.mkdir(parents=True)
    checkpoint_utils.verify_checkpoint_directory(str(place))
    assert len(noted) == 1
    (place / "x.pt").touch()
    action(*arguments)
    assert place.is_dir()


TOLD = """
import os, signal, sys
from fairseq import trainer
step = trainer.Trainer.train_step
def train_step(self, *args, **kwargs):
    if self.get_num_updates() == 2 and self.data_parallel_rank == {rank}:
        os.kill(os.{whom}(), signal.{number})
    return step(self, *args, **kwargs)
trainer.Trainer.train_step = train_step
from fairseq_cli.train import cli_main
if __name__ == "__main__":
    cli_main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, whom, number, code",
    [(1, "getpid", "SIGTERM", 143), (0, "getppid", "SIGINT", 130)],
)
def test_of_several_processes_all_stop_after_the_same_update(new_toy, rank, whom, number, code):
    """Whichever was told: one of them, or the one that started them."""
    toy = new_toy()
    program = toy.folder / "told.py"
    program.write_text(TOLD.format(rank=rank, whom=whom, number=number))
    flags = ["--batch-size", 3, "--max-epoch", 2]
    log = toy.train(
        "ck",
        *flags,
        *("--distributed-world-size", 2),
        program=(sys.executable, program),
        code=code,
    )
    assert "Traceback" not in log, log[-3000:]
    last = toy.folder / "ck" / "checkpoint_last.pt"
    assert updates_of(peek(last)) in (3, 4)


def test_a_file_asks_for_the_same(train_here, monkeypatch):
    """Where no signal reaches: it is obeyed after its update, with exit code 0, and the run is the same."""
    engine.apply()
    monkeypatch.setattr(stopping, "LOOKS", 0)
    whole = read(train_here("whole", *FLAGS) / "checkpoint_last.pt")
    folder, step = train_here.folder / "asked", trainer.Trainer.train_step

    def train_step(self, *args, **kwargs):
        if self.get_num_updates() == 4:
            (folder / "stop").touch()
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        with pytest.raises(SystemExit) as ended:
            train_here("asked", *FLAGS)
    assert ended.value.code == 0
    assert updates_of(peek(folder / "checkpoint_last.pt")) == 5
    assert (folder / "stopped").exists() and not (folder / "stop").exists()
    assert_same_run(read(train_here("asked", *FLAGS) / "checkpoint_last.pt"), whole)
