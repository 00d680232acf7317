"""Compat at the end of a training: nothing reads data any more when Python ends."""

import sys
import threading

import pytest
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator

from ext_common import compat
from ext_common.compat import training
from tests import processes

compat.apply()


def loading():
    return [t for t in threading.enumerate() if isinstance(t, BackgroundConsumer)]


class Source:
    """Endless work in small pieces; `gate` holds back every item after the first `free`."""

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


@pytest.mark.slow
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
