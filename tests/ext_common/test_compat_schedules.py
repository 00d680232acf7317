"""Compat around schedules and the end of a training: hand-over, best metric, loading threads."""

import sys
import threading
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq import trainer
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator
from omegaconf import OmegaConf

from ext_common import compat
from ext_common.compat import schedules, training
from tests import processes

compat.apply()


# --- a schedule may ask for the model ----------------------------------------------------------


def test_no_model_outside_a_trainer():
    assert schedules.trained_model() is None


def test_the_model_is_known_while_the_optimizer_is_built(monkeypatch):
    seen = []
    model = torch.nn.Linear(2, 2)
    options = Namespace(encoder_embed_dim=8)
    cfg = SimpleNamespace(
        model=options,
        optimization=SimpleNamespace(debug_param_names=False, use_bmuf=False),
        common=SimpleNamespace(fp16=False, bf16=False, amp=False, fp16_no_flatten_grads=False),
        distributed_training=SimpleNamespace(zero_sharding="none"),
        optimizer=None,
        lr_scheduler=None,
    )
    stub = SimpleNamespace(cfg=cfg, model=model, criterion=model, is_fsdp=False, cuda=False)
    stub.optimizer = object()
    monkeypatch.setattr(trainer.optim, "build_optimizer", lambda *args: None)

    def build(cfg, optimizer):
        seen.append(schedules.trained_model())
        raise RuntimeError("half-way")

    monkeypatch.setattr(trainer.lr_scheduler, "build_lr_scheduler", build)
    with pytest.raises(RuntimeError, match="half-way"):
        trainer.Trainer._build_optimizer(stub)
    assert seen[0].options is options and seen[0].model is model
    assert schedules.trained_model() is None


# --- the task says what the best checkpoint is ---------------------------------------------------


def config(metric="loss", maximize=False, disable_validation=False):
    cfg = OmegaConf.create(
        {
            "checkpoint": {
                "best_checkpoint_metric": metric,
                "maximize_best_checkpoint_metric": maximize,
            },
            "dataset": {"disable_validation": disable_validation},
        }
    )
    OmegaConf.set_struct(cfg, True)
    return cfg


def chosen(cfg, task):
    before = cfg.checkpoint
    training._choose_best_metric(cfg, task)
    # fairseq_cli.train holds this very object
    assert cfg.checkpoint is before
    return before.best_checkpoint_metric, before.maximize_best_checkpoint_metric


class Judged:
    best_metric = ("bleu", True)


class Undecided:
    @property
    def best_metric(self):
        return None


@pytest.mark.parametrize(
    "argv, cfg, task, expected",
    [
        ([], config(), Judged(), ("bleu", True)),
        ([], config(), Namespace(best_metric=("eer", False)), ("eer", False)),
        ([], config(), object(), ("loss", False)),
        ([], config(), Undecided(), ("loss", False)),
        ([], config("accuracy", True), Judged(), ("accuracy", True)),
        ([], config(disable_validation=True), Judged(), ("loss", False)),
        (["--best-checkpoint-metric", "loss"], config(), Judged(), ("loss", False)),
        (["--best-checkpoint-metric=loss"], config(), Judged(), ("loss", False)),
        (["checkpoint.best_checkpoint_metric=loss"], config(), Judged(), ("loss", False)),
    ],
)
def test_the_best_metric_of_the_task_counts_where_none_was_asked_for(
    argv, cfg, task, expected, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *argv])
    assert chosen(cfg, task) == expected
    if expected[0] == "bleu":
        assert OmegaConf.is_struct(cfg)


JUDGED = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("toy_parts", {path!r})
sys.modules["toy_parts"] = toy = importlib.util.module_from_spec(spec)
from ext_common import compat
compat.apply()
spec.loader.exec_module(toy)
from fairseq.tasks import register_task

@register_task("judged_toy", dataclass=toy.ToyTaskConfig)
class JudgedToy(toy.ToyTask):
    # the loss again, and the highest is kept: the worst epoch, which nothing else would choose
    best_metric = ("npscore", True)
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory, new_toy):
    """Flags of the toy task with a best metric of its own."""
    folder = tmp_path_factory.mktemp("judged") / "judged_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text(JUDGED.format(path=str(new_toy().plugin / "toy.py")))
    return ["--user-dir", folder, "--task", "judged_toy", "--batch-size", 3]


def read(path):
    return torch.load(path, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--distributed-world-size", 2]], ids=["one process", "spawned"]
)
def test_best_checkpoint_and_patience_follow_the_task(new_toy, judged, more):
    """The real program: get_valid_stats, save_checkpoint and should_stop_early all see it."""
    toy = new_toy()
    log = toy.train("ck", *judged, "--max-epoch", 6, "--patience", 2, *more)
    assert log.count("the best checkpoint is the one with the highest npscore") == 1
    assert "early stop" in log and "end of epoch 3" in log and "end of epoch 4" not in log
    best = read(toy.folder / "ck" / "checkpoint_best.pt")
    assert best["extra_state"]["train_iterator"]["epoch"] == 2  # written at the end of the first
    assert best["extra_state"]["best"] == best["extra_state"]["val_loss"]
    last = read(toy.folder / "ck" / "checkpoint_last.pt")
    assert last["extra_state"]["val_loss"] < best["extra_state"]["val_loss"]
    assert last["cfg"]["checkpoint"]["best_checkpoint_metric"] == "npscore"


@pytest.mark.slow
def test_the_loss_that_was_asked_for_is_the_loss(new_toy, judged):
    toy = new_toy()
    log = toy.train("ck", *judged, "--max-epoch", 3, "--best-checkpoint-metric", "loss")
    assert "the best checkpoint is" not in log
    best = read(toy.folder / "ck" / "checkpoint_best.pt")
    assert best["extra_state"]["train_iterator"]["epoch"] == 4


# --- no thread reads data when Python ends -------------------------------------------------------


def loading():
    return [t for t in threading.enumerate() if isinstance(t, BackgroundConsumer)]


class Source:
    """Endless work in small pieces; ``gate`` holds back every item after the first ``free``."""

    def __init__(self, free=10**9):
        self.free, self.gate, self.given = free, threading.Event(), 0

    def __len__(self):
        return 10**6

    def __iter__(self):
        while True:
            if self.given >= self.free:
                self.gate.wait()
            self.given += 1
            yield self.given


def test_threads_that_read_ahead_are_stopped():
    """One waits for room in its queue, one is at an item, one has been read to its end."""
    full, busy, ended = Source(), Source(free=3), [1, 2]
    iterators = [BufferedIterator(2, source) for source in (full, busy, ended)]
    assert [next(iterator) for iterator in iterators] == [1, 1, 1]
    assert list(iterators[2]) == [2]
    threading.Timer(0.2, busy.gate.set).start()
    training.stop_loading()
    assert not loading()
    assert full.given <= 6 and busy.given <= 4  # each ended with the item it was at


def test_a_thread_that_does_not_end_is_not_waited_for_for_ever():
    stuck = Source(free=1)
    iterator = BufferedIterator(2, stuck)
    assert next(iterator) == 1
    training.stop_loading(patience=0.1)
    (thread,) = loading()
    stuck.gate.set()
    thread.join(10)
    assert not thread.is_alive() and stuck.given == 2


# Without the remedy this ends in "terminate called without an active exception", exit code -6.
READS_AHEAD = """
import sys
import torch
from fairseq.data.iterators import BufferedIterator
from ext_common import compat

class Source:
    def __len__(self):
        return 50

    def __iter__(self):
        matrix = torch.ones(300, 300)
        for _ in range(50):
            for _ in range(100):
                matrix @ matrix
            yield 1

compat.apply()
ahead = BufferedIterator(2, Source())
next(ahead)
print("done training", flush=True)
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_ends_while_its_data_are_being_read(code, tmp_path, repo_root):
    ended = processes.run(
        [sys.executable, "-c", READS_AHEAD.format(code=code)],
        cwd=repo_root,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stderr[-2000:]
    assert ended.stdout.endswith("done training\n") and "terminate called" not in ended.stderr


LAST_WORDS = """
import atexit, threading
# Handlers run in reverse order: this one after everything that fairseq and compat register.
atexit.register(lambda: print("ALIVE", [type(t).__name__ for t in threading.enumerate()]))
from fairseq_cli.train import cli_main
if __name__ == "__main__":
    cli_main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_stops_in_the_middle_of_its_data(new_toy, workers):
    toy = new_toy()
    (toy.folder / "last_words.py").write_text(LAST_WORDS)
    flags = ["--batch-size", 1, "--max-update", 2, "--num-workers", workers, "--no-save"]
    log = toy.train(
        "ck",
        *flags,
        *("--data-buffer-size", 5, "--disable-validation"),
        program=(sys.executable, toy.folder / "last_words.py"),
    )
    assert "ALIVE ['_MainThread']" in log
