"""A function over many jobs in processes, its results in order and few of them waiting."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ext_common.cli import UserError

_AHEAD = 3
_function: Callable[..., Any]


def in_order(function: Callable[..., Any], jobs: Iterable[Any], workers: int) -> Iterator[Any]:
    """``function(job)`` of each job, in order, by ``workers`` processes (1: in this one).

    At most 3 results a worker are waiting. ``function`` may be any callable; jobs and results are
    pickled. UserError where a process is killed.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    # fork: a fresh interpreter would need seconds to import what the function needs. Children use no
    # threads of libraries, so a lock copied while held meets nobody who waits for it.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,))
    waiting: deque[Any] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_call, job))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (out of memory?): run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _start(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    # Ctrl-C is the parent's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(job: Any) -> Any:
    return _function(job)
