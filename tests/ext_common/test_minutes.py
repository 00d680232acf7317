"""--minutes: the length that a pace gives, and what it changes in a training."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ext_common.presets import Plan, minutes, plan
from ext_common.presets.minutes import Budget, Intervals, Pace, length_for


def test_a_length_without_validations_is_time_by_speed():
    """100 s for 10 updates a second, 5 s of them for the last validation: 950 updates behind the 20."""
    length = length_for(100, 20, Pace(0.1, 5), 400, 10**9, Intervals(0, 1))
    assert length.updates in (969, 970)  # a billionth of a validation is left out


@given(
    st.floats(10, 1e5),
    st.floats(1e-3, 5),
    st.floats(0, 30),
    st.integers(1, 2000),
    st.sampled_from([0, 50, 200]),
)
def test_what_is_planned_fits_into_the_time(seconds, update, check, epoch, interval):
    """Updates, validations on the way (at most a fifth of the time, but for rounding) and the last one."""
    done = 20
    length = length_for(seconds, done, Pace(update, check), 3000, epoch, Intervals(interval, 1))
    every = length.intervals
    checks = (length.updates / every.updates if every.updates else 0) + length.updates / (
        epoch * every.epochs
    )
    if length.updates == done + 1:
        assert seconds < 2 * check + 2 * update
        return
    took = (length.updates - done) * update + check
    assert seconds * (1 - minutes.CHECKS) - 2 * update <= took <= seconds
    # the rounding of an interval can be one more of each kind
    assert checks * check <= minutes.CHECKS * seconds * 1.5 + 2 * check


def test_as_many_validations_as_there_would_have_been():
    length = length_for(1000, 20, Pace(0.1, 1), 3000, 10**9, Intervals(200, 1))
    assert length.updates == pytest.approx(20 + (1000 - 1 - 15) / 0.1, abs=2)
    assert length.intervals.updates == pytest.approx(length.updates / 15, rel=0.01)


def config(**schedule):
    return OmegaConf.create(
        {
            "optimization": {"max_update": 3000, "update_freq": [1]},
            "lr_scheduler": schedule,
            "checkpoint": {"save_interval_updates": 200, "save_interval": 1, "save_dir": "x"},
            "dataset": {"validate_interval": 1, "disable_validation": True},
            "task": {"chosen": "", "minutes": 1.0, "data": "d"},
        }
    )


@pytest.fixture
def nothing_given(monkeypatch):
    monkeypatch.setattr("ext_common.given.given", lambda: frozenset())


def test_a_cosine_ends_with_the_training(nothing_given):
    cfg = config(_name="cosine", warmup_updates=200, max_update=3000, lr_period_updates=-1)
    assert minutes.fit_schedule(cfg, 600) == {"--warmup-updates": "100"}
    assert (cfg.lr_scheduler.max_update, cfg.optimization.max_update) == (600, 600)
    cfg = config(_name="cosine", warmup_updates=200, max_update=3000, lr_period_updates=2800)
    minutes.fit_schedule(cfg, 6000)
    assert (cfg.lr_scheduler.warmup_updates, cfg.lr_scheduler.lr_period_updates) == (200, 5800)


def test_a_polynomial_ends_with_the_training(nothing_given):
    cfg = config(_name="polynomial_decay", warmup_updates=0, total_num_update=3000)
    assert minutes.fit_schedule(cfg, 600) == {"--total-num-update": "600"}
    assert cfg.lr_scheduler.total_num_update == 600


def test_noam_keeps_its_peak(nothing_given):
    cfg = config(_name="noam", warmup_updates=400, noam_factor=0.45)
    minutes.fit_schedule(cfg, 600)
    options = cfg.lr_scheduler
    assert options.warmup_updates == 100
    assert options.noam_factor / options.warmup_updates**0.5 == pytest.approx(0.45 / 400**0.5)


def test_noams_cooldown_stays_the_same_share(nothing_given):
    cfg = config(
        _name="noam", warmup_updates=10, noam_factor=1.0, noam_cooldown=1000, max_update=3000
    )
    assert minutes.fit_schedule(cfg, 600)["--noam-cooldown"] == "200"
    assert (cfg.lr_scheduler.noam_cooldown, cfg.lr_scheduler.max_update) == (200, 600)


def test_a_warm_up_that_was_given_stays(monkeypatch):
    monkeypatch.setattr("ext_common.given.given", lambda: frozenset({"warmup_updates"}))
    cfg = config(_name="noam", warmup_updates=400, noam_factor=0.45)
    assert minutes.fit_schedule(cfg, 600) == {}
    assert (cfg.lr_scheduler.warmup_updates, cfg.lr_scheduler.noam_factor) == (400, 0.45)


class Training:
    """A trainer whose updates take a second of a clock that nobody waits for."""

    def __init__(self, monkeypatch, plan, update=1.0, start=10.0):
        self.cfg, self.updates, self.rebuilt = config(_name="fixed"), 0, 0
        self.task = SimpleNamespace()
        self.now, self.update, begun = 1000.0, update, 1000.0 - start
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(minutes, "seconds_since_start", lambda: self.now - begun)
        monkeypatch.setattr(minutes, "rebuild_schedule", self.rebuild)
        monkeypatch.setattr(Budget, "writing", lambda _: 0.0)
        self.budget = Budget(plan, self)

    def rebuild(self, _):
        self.rebuilt += 1

    def get_num_updates(self):
        return self.updates

    def run(self, slower_from=10**9):
        """Updates until the training's own end; seconds from start to exit."""
        while self.updates < self.cfg.optimization.max_update:
            self.now += self.update * (5 if self.updates >= slower_from else 1)
            self.updates += 1
            self.budget.updated(lambda: None, range(10**9))
            self.budget.checked(0.0, False)
        return self.budget.elapsed + self.budget.exit


@pytest.fixture
def training(monkeypatch, nothing_given):
    def training(budget, at_most=False, **clock):
        return Training(monkeypatch, Plan([], {}, "d", budget, at_most), **clock)

    return training


@pytest.mark.parametrize("update", [0.01, 0.2, 5.0])
def test_a_training_ends_in_its_time(training, update):
    """The schedule is built once; the length stands in the configuration, for whoever continues."""
    run = training(3, update=update)
    assert run.run() == pytest.approx(180, rel=0.05)
    assert run.rebuilt == 1
    assert plan(run.cfg).updates == run.updates


def test_a_machine_that_gets_slower_stops_in_time(training, caplog):
    run = training(3, update=0.2)
    assert run.run(slower_from=300) == pytest.approx(180 * minutes.LATE, rel=0.03)
    assert "the machine got slower" in caplog.text


def test_a_limit_does_not_make_a_training_longer(training):
    run = training(30, at_most=True, update=0.1)
    run.run()
    assert (run.updates, run.rebuilt) == (3000, 0)
    slow = training(30, at_most=True, update=2.0)
    assert slow.run() == pytest.approx(1800, rel=0.05) and slow.rebuilt == 1


def test_the_age_of_a_process_is_the_kernels():
    age = minutes.seconds_since_start()
    time.sleep(0.05)
    assert 0.04 < minutes.seconds_since_start() - age < 5 and age > 0
