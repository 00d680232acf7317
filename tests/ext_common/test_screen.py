"""What a person sees of a training on a terminal, and what goes to the log meanwhile."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ext_common import engine, screen
from ext_common.cli import UserError
from ext_common.progress import Pace, training_line, validations_left
from ext_common.trainlog import collect_curves, parse_log

engine.apply()


# --- how long it takes --------------------------------------------------------------------------


def test_time_left_is_that_of_a_usual_update():
    pace = Pace()
    assert pace.update is None and pace.left(10, 1) is None
    # The first update was slow, and says nothing of the others.
    pace.updated(9.0)
    assert pace.left(4, 0) is None
    pace.updated(0.5)
    assert pace.left(4, 0) == 2.0
    for seconds in (0.5, 30.0, 0.5, 0.5):
        pace.updated(seconds)
    assert pace.left(100, 0) == 50.0


def test_validations_count_once_one_is_known():
    pace = Pace()
    pace.updated(1.0)
    pace.updated(1.0)
    assert pace.left(10, 3) == 10.0
    pace.validated(4.0)
    assert pace.left(10, 3) == 22.0


def test_only_recent_updates_count():
    pace = Pace(recent=3)
    for seconds in (1.0, 1.0, 1.0, 2.0, 2.0):
        pace.updated(seconds)
    assert pace.update == 2.0


@pytest.mark.parametrize("total", [1, 7, 12])
@pytest.mark.parametrize("every", [0, 1, 3, 4, 50])
def test_validations_left_are_those_that_come(total, every):
    def validated(update):
        return update == total or bool(every) and update % every == 0

    for done in range(total + 1):
        coming = sum(validated(update) for update in range(done + 1, total + 1))
        assert validations_left(done, total, every) == coming


def test_the_line():
    values = {"loss": 1.23456, "valid accuracy": 93.0}
    assert training_line(1200, 25000, values, 310.4, "images", 3792) == (
        "update 1,200 of 25,000 · loss 1.235 · valid accuracy 93 · 310 images/s · 1:03:12 left"
    )
    assert training_line(3, None, {}, 0.256, "utterances") == "update 3 · 0.26 utterances/s"


# --- how long it is -----------------------------------------------------------------------------


def config(**groups):
    defaults = {
        "common": {"log_file": None, "log_format": None, "no_progress_bar": False},
        "distributed_training": {"distributed_rank": 0},
        "optimization": {"max_update": 0, "max_epoch": 0},
        "dataset": {
            "disable_validation": False,
            "validate_interval_updates": 0,
            "validate_interval": 1,
            "valid_subset": "valid,other",
        },
        "checkpoint": {
            "save_interval_updates": 0,
            "save_dir": "none",
            "best_checkpoint_metric": "accuracy",
            "maximize_best_checkpoint_metric": True,
            "checkpoint_suffix": "",
        },
    }
    return OmegaConf.create(
        {name: {**value, **groups.get(name, {})} for name, value in defaults.items()}
    )


@pytest.mark.parametrize(
    "limits, total",
    [
        ({}, None),
        ({"max_update": 50}, 50),
        # In epoch 2 of 3, 4 of its 10 updates done, 14 in all: 6 and 10 are left.
        ({"max_epoch": 3}, 30),
        ({"max_epoch": 3, "max_update": 50}, 30),
        ({"max_epoch": 3, "max_update": 20}, 20),
    ],
)
def test_the_length_by_updates_and_epochs(limits, total):
    assert screen.total_updates(config(optimization=limits), 14, 2, 4, 10) == total


@pytest.mark.parametrize(
    "dataset, checkpoint, every",
    [
        ({}, {}, 10),
        ({"validate_interval": 3}, {}, 30),
        ({"validate_interval_updates": 4}, {}, 4),
        ({"validate_interval_updates": 4}, {"save_interval_updates": 2}, 2),
        ({"disable_validation": True}, {}, None),
    ],
)
def test_how_often_it_is_validated(dataset, checkpoint, every):
    assert screen.validated_every(config(dataset=dataset, checkpoint=checkpoint), 10) == every


# --- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, terminal, wanted",
    [
        ({}, True, True),
        ({}, False, False),
        ({"common": {"log_file": "x"}}, True, False),
        ({"common": {"log_format": "json"}}, True, False),
        ({"common": {"no_progress_bar": True}}, True, False),
        ({"distributed_training": {"distributed_rank": 1}}, True, False),
        ({"distributed_training": {"distributed_rank": None}}, True, True),
    ],
)
def test_only_on_a_terminal_and_where_no_log_was_asked_for(groups, terminal, wanted):
    assert screen.wanted(config(**groups), terminal) == wanted


def test_not_beside_the_logging_of_hydra():
    cfg = config()
    cfg.job_logging_cfg = {"version": 1}
    assert not screen.wanted(cfg, True)


# --- what ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text):
    """(lines that stayed, all lines that were there for a while) of what a terminal was sent."""
    # pytest lets every warning through
    pieces = [
        re.split("\r\x1b\\[K", line) for line in text.split("\n") if "'pin_memory'" not in line
    ]
    return [line[-1] for line in pieces if line[-1]], [part for line in pieces for part in line]


@pytest.fixture
def display():
    made = screen.Screen(config(), Terminal(), clock=lambda: 0.0)
    made.trainer = SimpleNamespace(get_num_updates=lambda: 7, task=None)
    return made


def log(display, name, level, text):
    display.emit(logging.LogRecord(name, level, "", 0, text, (), None))


def test_of_the_log_only_warnings_our_own_lines_and_steps_are_shown(display):
    log(display, "fairseq_cli.train", logging.INFO, "num. shared model params: 21")
    log(display, "fairseq.trainer", logging.INFO, "loading train data for epoch 1")
    log(display, "ext_common.engine", logging.INFO, "the best checkpoint is …")
    log(display, "fairseq.data", logging.WARNING, "3 samples are too long")
    log(display, "py.warnings", logging.WARNING, "/a/b.py:3: UserWarning: odd: very\n  f(x)\n")
    stayed, were = shown(display.stream.getvalue())
    assert stayed == [
        "the best checkpoint is …",
        "warning: 3 samples are too long",
        "warning: odd: very",
    ]
    assert were[:3] == ["", "loading the training data …", "the best checkpoint is …"]


def test_a_validation_says_whether_it_is_the_best(display, monkeypatch):
    from fairseq import checkpoint_utils

    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
    for subset, number, accuracy in (
        ("valid", 0, 90.0),
        ("other", 1, 99.0),
        ("valid", 0, 89.0),
        ("valid", 0, 91.0),
    ):
        display.validated(subset, {"loss": 0.5, "accuracy": accuracy}, number)
    assert shown(display.stream.getvalue())[0] == [
        "update 7 · valid loss 0.5 · accuracy 90 · the best so far",
        "update 7 · other loss 0.5 · accuracy 99",
        "update 7 · valid loss 0.5 · accuracy 89",
        "update 7 · valid loss 0.5 · accuracy 91 · the best so far",
    ]
    assert display.values["valid accuracy"] == 91.0


def test_a_long_line_is_cut_at_the_edge(display, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    display.now("x" * 50)
    assert shown(display.stream.getvalue())[1][-1] == "x" * 18 + "…"


def test_speed_is_what_the_task_counts(display):
    display.pace.updated(0.5)
    display.take({"loss": 2.0, "bsz": 16.0, "wpb": 300.0})
    for unit, speed in (("images", "32 images/s"), ("tokens", "600 tokens/s")):
        display.trainer.task = SimpleNamespace(progress_unit=unit)
        assert speed in display.line(1, 1, 1, 10)


def test_a_training_on_a_terminal(train_here, monkeypatch, caplog):
    """The screen from the first update to the last words; the log in its file, as it was on the screen."""
    terminal, before = Terminal(), list(logging.getLogger().handlers)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(screen, "_REFRESH", 0.0)
    caplog.set_level(logging.INFO)
    folder = train_here("ck", "--batch-size", 3, "--max-epoch", 2)
    assert logging.getLogger().handlers == before and screen._screen is None
    stayed, were = shown(terminal.getvalue())
    assert stayed[0] == f"the log is {folder}/train.log"
    assert [line.split(" · ")[0] for line in stayed[1:3]] == ["update 8", "update 16"]
    assert re.fullmatch(r"done: 16 updates, 0:0\d", stayed[-2])
    assert stayed[-1].startswith(f"best checkpoint: {folder}/checkpoint_best.pt, loss ")
    updates = [line for line in were if re.match(r"update \d+ of", line)]
    assert [int(line.split()[1]) for line in updates] == list(range(1, 17))
    assert all(
        re.fullmatch(
            r"update \d+ of 16 · loss [\d.]+( · valid loss [\d.]+)? · .* samples/s( · \d:\d\d left)?",
            line,
        )
        for line in updates
    )
    assert [line.endswith(" left") for line in updates] == [False] + [True] * 15
    # The curve is drawn from the log, of which nothing is missing.
    lines = (folder / "train.log").read_text().splitlines()
    curves = collect_curves(parse_log(lines))
    assert [update for update, _ in curves["loss"]["train"]] == list(range(1, 17))
    assert [update for update, _ in curves["loss"]["valid"]] == [8, 16]
    assert any("num. shared model params" in line for line in lines)


def test_a_start_that_fails_at_once_leaves_no_folder(train_here, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout", Terminal())
    with pytest.raises(UserError, match="the size of a batch, is missing"):
        train_here("ck")
    assert not (tmp_path / "ck").exists()


def test_a_resumed_and_a_finished_training_say_so(train_here, monkeypatch, caplog):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    caplog.set_level(logging.INFO)
    train_here("ck", "--batch-size", 3, "--max-update", 3)
    for length in (5, 5):
        terminal.truncate(0)
        folder = train_here("ck", "--batch-size", 3, "--max-update", length)
    stayed, _ = shown(terminal.getvalue().replace("\0", ""))
    assert stayed[1] == f"Loaded checkpoint {folder}/checkpoint_last.pt (epoch 1 @ 5 updates)"
    assert stayed[2].startswith("already at 5 updates") and stayed[3].startswith("done: 5 updates")


def test_the_command_that_comes_next_is_the_tasks(display, tmp_path, monkeypatch):
    display.cfg.checkpoint.save_dir = str(tmp_path)
    display.trainer.task = SimpleNamespace(next_command=lambda folder, path: f"use {folder} {path}")
    (tmp_path / "checkpoint_last.pt").touch()
    display.end()
    assert shown(display.stream.getvalue())[0][1:] == [
        f"checkpoint: {tmp_path}/checkpoint_last.pt",
        f"next: use {tmp_path} {tmp_path}/checkpoint_last.pt",
    ]


def test_a_mistake_ends_the_line_that_is_rewritten(display, monkeypatch, capsys):
    import sys

    from ext_common.cli import UserError

    display.now("the first update …")
    monkeypatch.setattr(screen, "_screen", display)
    sys.excepthook(UserError, UserError("no x in y"), None)
    assert display.stream.getvalue().endswith("the first update …\n")
    assert capsys.readouterr().err == "error: no x in y\n"
