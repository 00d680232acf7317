"""A function over many jobs in processes, its results in order and few of them waiting."""

import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ext_common.cli import UserError

_AHEAD = 3
_function: Callable[[Any], Any] | None = None


def in_order(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    workers: int,
    *,
    method: str = "fork",
    preload: Sequence[str] = (),
    start: Callable[[], object] | None = None,
    near: Callable[[Any], str] | None = None,
) -> Iterator[Any]:
    """`function(job)` of each job, in order, by `workers` processes (1: in this one).

    At most 3 results a worker are waiting. `function` may be any callable; jobs and results are pickled.
    method, preload: how processes begin ("fork" or "forkserver", which loads these modules once); start: the
    first thing that each does. UserError where a process is killed; near(job): where that was, in words.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    # fork: a fresh interpreter would need seconds to import what the function needs. Children use no
    # threads of libraries, so a lock copied while held meets nobody who waits for it.
    context = multiprocessing.get_context(method)
    if preload:
        context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function, start))
    waiting: deque[tuple[Any, Future[Any]]] = deque()

    def oldest() -> Any:
        result = waiting[0][1].result()
        waiting.popleft()
        return result

    try:
        for job in jobs:
            waiting.append((job, pool.submit(_call, job)))
            if len(waiting) > _AHEAD * workers:
                yield oldest()
        while waiting:
            yield oldest()
    except BrokenProcessPool:
        where = f" near {near(waiting[0][0])}" if near and waiting else ""
        raise UserError(
            f"a worker process died{where} (out of memory, or a library crashed): run again; fewer --workers,"
            " where the command has them, use less memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _start(function: Callable[[Any], Any], start: Callable[[], object] | None) -> None:
    global _function
    _function = function
    # Ctrl-C is the parent's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if start:
        start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _call(job: Any) -> Any:
    assert _function is not None  # _start was called first
    return _function(job)


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on at this moment."""
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])
