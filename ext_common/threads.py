"""OpenMP's threads and how they wait, settled before torch loads OpenMP, which looks only once.

A thread that waits for the others of its loop spins, and on a busy machine takes the processor from the very
thread it waits for: a small model becomes up to ten times slower. One that sleeps at once has to be woken: a
quarter more time where nothing else runs. So it spins for a moment and then sleeps (docs/results/speed.md).
torch's wheels bring GNU's OpenMP (libgomp), for which its own variable counts more than the common one;
Intel's and LLVM's read the common one.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping

COUNT = "OMP_NUM_THREADS"
# How threads wait: for so many turns awake, and then passively.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
# each says how threads wait, in the words of one OpenMP or the other
_POLICIES = (*WAITING, "KMP_BLOCKTIME")


# variables that this process set for itself and what it starts
settled: list[str] = []


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads and the policy of waiting, each unless the user did."""
    if COUNT not in environ:
        environ[COUNT] = str(cores())
        settled.append(COUNT)
    if not any(name in environ for name in _POLICIES):
        environ.update(WAITING)
        settled.extend(WAITING)


def given(name: str) -> str | None:
    """The value that the user gave an environment variable."""
    return None if name in settled else os.environ.get(name)


def policy() -> str | None:
    """How the user said that threads wait, as NAME=VALUE …; None where nothing is said."""
    said = {name: value for name in _POLICIES if (value := given(name)) is not None}
    return assignments(said) or None


def assignments(variables: Mapping[str, str]) -> str:
    """Environment variables as a shell takes them: NAME=VALUE …"""
    return " ".join(f"{name}={value}" for name, value in variables.items())


def settle_a_command() -> None:
    """:func:`settle` where Python is about to run a module of the package that calls this (`python -m`)."""
    # what sys.argv holds while the module is looked for, and at no other time
    if getattr(sys, "argv", [])[:1] == ["-m"]:
        settle()


@functools.cache
def settle_fairseq() -> None:
    """Under fairseq's own programs, where torch is there already: set the threads, say what is missing.

    Said by the first process, and only where several threads can wait for each other; again does nothing.
    """
    program, environ = os.path.realpath((getattr(sys, "argv", None) or [""])[0]), os.environ
    name, folder = os.path.basename(program), os.path.basename(os.path.dirname(program))
    if not name.startswith("fairseq-") and folder != "fairseq_cli":
        return
    import multiprocessing

    import torch

    if COUNT not in environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    silent = any(name in environ for name in _POLICIES) or torch.get_num_threads() == 1
    first = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
    if not silent and first and multiprocessing.parent_process() is None:
        print(
            "how threads wait is not set: on a busy machine those that spin meanwhile can make a small model"
            f" ten times slower; export {assignments(WAITING)} before {name.removesuffix('.py')}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def limited(count: int | None) -> Iterator[None]:
    """So many threads of torch within the block, and afterwards as many as before; None changes nothing."""
    if not count:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use, at least 1: hyper-threads count once, a container's quota counts."""
    usable = os.sched_getaffinity(0)
    siblings = {
        _read(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in usable
    }
    count = len(usable) if None in siblings else len(siblings)
    return max(1, min(count, quota() or count))


def quota(root: str = "/sys/fs/cgroup") -> int | None:
    """Processors that the control group of a container has, rounded up; None without a limit."""
    both = _read(f"{root}/cpu.max")
    if both is None:
        both = f"{_read(f'{root}/cpu/cpu.cfs_quota_us')} {_read(f'{root}/cpu/cpu.cfs_period_us')}"
    share, _, period = both.partition(" ")
    if not (share.isdigit() and period.isdigit() and int(period)):
        return None
    return -(-int(share) // int(period))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None
