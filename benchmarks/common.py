"""Two programs beside each other, fairly: in alternation in one process; memory in one each."""

import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


def alternate(
    sides: dict[str, Callable[[], float]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[str], object] = lambda name: None,
    seed: int = 1,
) -> dict[str, list[float]]:
    """Units per second of every side in every round.

    A side is a function that does its work once and returns how many units (utterances, crops).
    In each round every side runs once, in random order: what else the machine does meets all alike.
    `before` is called with the name of the side ahead of each run and is not timed.
    """
    order = random.Random(seed)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        names = list(sides)
        order.shuffle(names)
        for name in names:
            before(name)
            gc.collect()
            began = time.perf_counter()
            units = sides[name]()
            seconds = time.perf_counter() - began
            if number >= warmup:
                rates[name].append(units / seconds)
    return rates


def compare(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the smallest and largest ratio of a round."""
    rounds = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "ratio": statistics.median(ours) / statistics.median(peer),
        "ratio_min": min(rounds),
        "ratio_max": max(rounds),
    }


def summary(rates: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def memory_increase(work: Callable[[], object]) -> dict[str, float]:
    """Peak of this process's resident memory while `work` runs, less what it was before, in MB.

    `file_mb` is how much of it are pages of mapped files, which the system takes back at need.
    """
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status()
    work()
    after = status()
    return {
        "peak_mb": (after["VmHWM"] - before["VmRSS"]) / 1024,
        "file_mb": max(0.0, (after["RssFile"] - before["RssFile"]) / 1024),
    }


def status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in kB."""
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith(("Vm", "Rss"))]
    return {key[:-1]: int(value) for key, value, _ in lines}


def in_fresh_process(arguments: Sequence[str], cwd: str | os.PathLike) -> dict:
    """Run `python ARGUMENTS` in the folder `cwd`; it prints JSON on its last line."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def evict(path: str | os.PathLike) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def chromium() -> str | None:
    """The browser, under the name that Debian or that Ubuntu gives it; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def processor() -> str:
    """Its name, as far as the system tells it."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def machine() -> str:
    """Processor, CPUs, memory and load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{processor()}, {cpus} CPUs, {memory:.0f} GB, load {load:.1f}"
