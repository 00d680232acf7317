"""A function over many jobs in processes."""

import os
import time
from functools import partial

import pytest

from ext_common.cli import UserError
from ext_common.parallel import in_order

METHODS = ["fork", "forkserver"]


def slow_first(job):
    time.sleep(0.05 if job == 0 else 0)
    return job, os.getpid()


def dying(job):
    if job == 2:
        os._exit(9)
    return job


def failing(job):
    raise UserError(f"{job} is bad")


def remember(path):
    with open(path, "a") as file:
        file.write("x")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    jobs, pids = zip(*in_order(slow_first, range(20), workers), strict=True)
    assert jobs == tuple(range(20))
    assert (os.getpid() in pids) == (workers == 1)


def test_few_results_are_waiting():
    asked = []
    found = in_order(slow_first, map(lambda job: asked.append(job) or job, range(1000)), 2)
    next(found)
    assert len(asked) <= 2 * 3 + 1
    found.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_dies_is_said_in_a_sentence(method):
    found = in_order(dying, range(9), 2, method=method, near=lambda job: f"job {job}")
    with pytest.raises(UserError, match=r"^a worker process died near job \d .* fewer --workers"):
        list(found)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_stays_what_it_was(method):
    with pytest.raises(UserError, match="^3 is bad$"):
        list(in_order(failing, [3], 2, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_each_worker_begins_with_what_it_is_told(tmp_path, method):
    start = partial(remember, tmp_path / "started")
    list(in_order(slow_first, range(4), 2, method=method, start=start))
    assert (tmp_path / "started").read_text() in ("x", "xx")
